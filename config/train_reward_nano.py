# Turn the model in the box into a reward model, in minutes on two CPU cores. First, with a file of
# https://github.com/iitmnlp/DailyDialog-plusplus:
#   python prepare/retry.py --source=dailydialogpp_dev.jsonl
init_from = "nano"
out_dir = "out/reward"
dataset = "retry"

batch_size = 32
gradient_accumulation_steps = 1
max_epochs = 2.0
learning_rate = 5e-4
warmup_iters = 20
eval_interval = 100
