# Turn GPT-2 124M into a model that follows instructions, on one GPU with 12 to 24 GB. First:
#   python prepare/hub.py --dataset=HuggingFaceTB/smoltalk --config=all \
#     --val_split=test --max_examples=100000
#   python prepare/hub.py --dataset=OpenAssistant/oasst1 --val_split=validation --where=lang=en
#   python prepare/hub.py --dataset=databricks/databricks-dolly-15k --out_dir=data/dolly
#   python prepare/hub.py --dataset=HuggingFaceH4/ultrachat_200k --split=train_sft \
#     --val_split=test_sft
init_from = "gpt2"
out_dir = "out/hub"
dataset = "smoltalk,oasst1,dolly,ultrachat_200k:0.25"

batch_size = 4
gradient_accumulation_steps = 16  # 65,536 tokens per step
max_epochs = 1.0
learning_rate = 5e-5
warmup_iters = 100
