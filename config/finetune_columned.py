# Train GPT-2 124M on Locutusque's ColumnedChatCombined, in the chat format of his
# gpt2-conversational-or-qa. First:
#   python prepare/columned_chat.py --max_examples=245000
init_from = "gpt2"
out_dir = "out/columned"
dataset = "columned_chat"
template = "user_assistant"

batch_size = 4
gradient_accumulation_steps = 8  # 32,768 tokens per step
max_epochs = 1.0
learning_rate = 5e-5
warmup_iters = 100
