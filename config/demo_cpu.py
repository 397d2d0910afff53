# What `make demo` trains: a small GPT from scratch on chitchat, two CPU cores, three to four minutes.
init_from = "scratch"
out_dir = "out/demo"
dataset = "chitchat"

n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0
block_size = 256

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 400
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20
eval_interval = 200
eval_iters = 20
