# Train a chat model of 124M parameters for the reward of out/reward, on one GPU with 12 GB
# (estimated). First:
#   python prepare/personachat.py && python prepare/eli5.py && python prepare/chitchat.py
#   python train.py config/finetune_chat.py
#   python prepare/retry.py --source=saved.jsonl && python train_reward.py config/train_reward.py
init_from = "out/chat"
reward = "out/reward"
out_dir = "out/ppo"
dataset = "personachat"

rollouts = 256
batch_size = 32
max_new_tokens = 64
max_iters = 200
learning_rate = 1e-5
