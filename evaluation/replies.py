"""Load a model and let it reply to many prompts: its texts, whether it emits the end token, and
whether it writes the user's next turn."""

import re
import sys
from dataclasses import dataclass

from evaluation.report import progress
from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.device import keep_freed_memory, pick_device, pick_dtype
from nanochatgpt.generate import generate
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.tokenizer import END_OF_TEXT

CHUNK = 64  # replies generated between two updates of the progress line


@dataclass
class ReplyConfig(ChatSampling):
    max_new_tokens: int = 100  # new tokens in a reply, at most
    init_from: str = default_model()  # the model: nano, a directory, gpt2, ..., org/name
    seed: int = 1337  # of the replies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto = the fastest here


@dataclass
class Reply:
    text: str  # up to where the next turn begins
    ended: bool  # emitted the end token before max_new_tokens
    speaks_for_human: bool  # wrote the opener of the user's next turn


def load(init_from, config):
    """Return (model, Tokenizer) for inference, as the knobs of a ReplyConfig say."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    if device == "cpu":
        keep_freed_memory()
    model, tokenizer = load_model(init_from, device, dtype, inference=True)
    if tokenizer.notice:
        print(tokenizer.notice, file=sys.stderr)
    return model, tokenizer


def reply_to(prompts, model, tokenizer, config, label):
    """Return [Reply], one to each prompt (a list of ids), sampled as a ReplyConfig says: prompt i
    with config.seed + i. label: for the progress line."""
    # only the end token stops a reply, to see whether it goes on to speak for the human
    stop_ids = (tokenizer.eos_id, END_OF_TEXT)
    openers = re.compile("|".join(map(re.escape, tokenizer.stop_strings)))
    sampling = for_template(config, tokenizer.template)
    replies = []
    for start in progress(range(0, len(prompts), CHUNK), label):
        chunk = prompts[start : start + CHUNK]
        seed = config.seed + start
        rows = generate(model, chunk, sampling, seed=seed, stop_ids=stop_ids, tokenizer=tokenizer)
        for ids in rows:
            # cut the reply where another turn begins
            text, *next_turns = openers.split(tokenizer.decode(ids), maxsplit=1)
            ended = len(ids) < config.max_new_tokens
            replies.append(Reply(text.strip(), ended, bool(next_turns)))
    return replies
