# The small chat model in assets/nano/, from scratch on two CPU cores. First:
#   python prepare/recall.py && python prepare/personachat.py && python prepare/spc.py
init_from = "scratch"
out_dir = "out/nano"
dataset = "recall:0.35,personachat,spc"

n_layer = 4
n_head = 6
n_embd = 192  # 11.5M parameters, 84% of them the token embedding
dropout = 0.0
block_size = 512
induction_heads = True

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 4500  # 18M tokens, about three epochs
learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.98
adam_eps = 1e-5
eval_interval = 500
eval_iters = 30
