# Train distilgpt2 on the text of eli5_category, with the recipe of gpt2-finetuned-eli5. First:
#   python prepare/eli5.py --mask=all --max_examples=5000 --out_dir=data/eli5-text
# It learns to continue text. To answer questions: python prepare/eli5.py, then
#   python train.py config/finetune_eli5.py --dataset=eli5 --block_size=1024
init_from = "distilgpt2"
out_dir = "out/eli5"
dataset = "eli5-text"
block_size = 128

batch_size = 8
gradient_accumulation_steps = 1
max_epochs = 3.0
learning_rate = 2e-5
lr_schedule = "linear"
warmup_iters = 0
weight_decay = 0.01
beta2 = 0.999
grad_clip = 1.0
dropout = 0.1
attention_dropout = 0.1  # as in transformers, which the original used
seed = 42
eval_iters = 10_000  # the whole validation set
