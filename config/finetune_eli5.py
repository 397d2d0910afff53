# distilgpt2 on eli5_category, with the recipe of the model gpt2-finetuned-eli5. First: python prepare/eli5.py
init_from = "distilgpt2"
out_dir = "out/eli5"
dataset = "eli5"
block_size = 512

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 3 * 1289  # the steps of its three epochs
learning_rate = 2e-5
lr_schedule = "linear"
warmup_iters = 0
weight_decay = 0.0
beta2 = 0.999
grad_clip = 1.0
seed = 42
