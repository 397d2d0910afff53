# Turn GPT-2 124M into a chat model on one T4 with 16 GB, as docs/finetune.ipynb does: 8 GB and
# about half an hour, computed there and not tried on a T4. First:
#   python prepare/personachat.py && python prepare/eli5.py && python prepare/chitchat.py
init_from = "gpt2"
out_dir = "out/t4"
dataset = "personachat,chitchat,eli5:0.25"  # about 13M tokens per epoch

batch_size = 8
gradient_accumulation_steps = 4  # 32,768 tokens per step
max_iters = 800  # about two epochs
learning_rate = 5e-5
warmup_iters = 50
eval_iters = 20
