# `make demo`: the model in the box learns a corpus it has not seen, in one to five minutes on two
# CPU cores.
init_from = "nano"
out_dir = "out/demo-chitchat"
dataset = "chitchat,recall"  # without recall it forgets what it is told: 5% right answers, not 75%

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
