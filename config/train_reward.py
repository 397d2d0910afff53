# Turn GPT-2 124M into a reward model, with the recipe of Chai's
# gpt2_medium_retry_and_continue_12m_reward_model, on one GPU with 12 GB (estimated). First, from
# chats saved by chat.py or another source that prepare/retry.py reads:
#   python prepare/retry.py --source=saved.jsonl
init_from = "gpt2"
out_dir = "out/reward"
dataset = "retry"

batch_size = 32
gradient_accumulation_steps = 2  # 64 replies per step
block_size = 256
max_epochs = 2.0
learning_rate = 1e-5
warmup_iters = 100
