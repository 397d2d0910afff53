# What `make demo` does: the model in the box learns a corpus that it has not seen, one to four minutes on two cores.
init_from = "nano"
out_dir = "out/demo-chitchat"
dataset = "chitchat,recall"  # without the second it forgets to remember: recall of 75% becomes 5%

dropout = 0.0
block_size = 512

batch_size = 4
gradient_accumulation_steps = 1
max_iters = 250
learning_rate = 5e-4
min_lr = 5e-5
warmup_iters = 20
eval_interval = 125
eval_iters = 15
