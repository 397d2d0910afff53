# Train the small chat model in assets/nano/ on two CPU cores. First:
#   python assets/nano/start.py
#   python prepare/recall.py --conversations=150000
#   python prepare/personachat.py --natural=false && python prepare/spc.py
#   python prepare/text.py --source=FOLDER  (.txt files: TinyStories, books of Project Gutenberg)
init_from = "out/start"  # random weights with heads that copy
out_dir = "out/nano"
dataset = "recall:0.25,personachat,spc:0.5,text"

n_layer = 4
n_head = 6
n_embd = 192  # 11.5M parameters, 84% of them the token embedding
dropout = 0.0
block_size = 512

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 10_500  # 42M tokens; out/nano/last has the weights after all of them
learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.98
eval_interval = 500
eval_iters = 30
