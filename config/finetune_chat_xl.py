# Turn GPT-2 XL, 1.5B parameters, into a chat model, on one GPU with 80 GB or on several:
#   torchrun --nproc_per_node=8 train.py config/finetune_chat_xl.py
# Weights, gradients and AdamW's moments are float32: 25 GB without activations, 31 GB with DDP.
init_from = "gpt2-xl"
out_dir = "out/chat-xl"
dataset = "personachat,eli5,chitchat"

batch_size = 2
gradient_accumulation_steps = 32  # 65,536 tokens per step
max_iters = 750  # about two epochs
learning_rate = 1e-5
warmup_iters = 50
