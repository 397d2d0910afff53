# Turn GPT-2 124M into a chat model, on one GPU with 12 to 24 GB. First:
#   python prepare/personachat.py && python prepare/eli5.py && python prepare/chitchat.py
init_from = "gpt2"
out_dir = "out/chat"
dataset = "personachat,eli5,chitchat"  # about 25M tokens

batch_size = 4
gradient_accumulation_steps = 8  # 32,768 tokens per step
max_iters = 1500  # about two epochs
learning_rate = 5e-5
warmup_iters = 100
