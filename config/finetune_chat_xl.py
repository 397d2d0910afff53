# GPT-2 XL, 1.5B parameters, to a chat model, on a GPU with 80 GB; or on several:
#   torchrun --nproc_per_node=8 train.py config/finetune_chat_xl.py
# Weights, gradients and AdamW's moments are float32: 25 GB before the first activation, 31 GB with several GPUs.
init_from = "gpt2-xl"
out_dir = "out/chat-xl"
dataset = "personachat,eli5,chitchat"

batch_size = 2
gradient_accumulation_steps = 32  # 65,536 tokens a step
max_iters = 750  # about two epochs
learning_rate = 1e-5
warmup_iters = 50
