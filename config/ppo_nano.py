# Train the model in the box for the reward of out/reward, on two CPU cores. First:
#   python prepare/personachat.py --natural=false
#   python train_reward.py config/train_reward_nano.py
init_from = "nano"
reward = "out/reward"
out_dir = "out/ppo"
dataset = "personachat"

rollouts = 64
batch_size = 32
max_new_tokens = 32
max_prompt = 128
max_iters = 60
learning_rate = 2e-4
kl_horizon = 1000
eval_interval = 10
dtype = "float32"  # the figures in docs/course.md were measured in it
