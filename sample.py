"""Continue a prompt: python sample.py --init_from=gpt2 --start="Once upon a time" """

import sys
from dataclasses import dataclass
from pathlib import Path

from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.generate import stream
from nanochatgpt.sampling import Sampling
from nanochatgpt.tokenizer import END_OF_TEXT


@dataclass
class Config(Sampling):
    init_from: str = default_model()  # nano, gpt2..., distilgpt2, org/name on the hub, a directory
    start: str = "Once upon a time"  # the prompt, or FILE:PATH, a file that holds it
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 200
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8


def read_start(start):
    """Return the text to continue: `start`, or what the file holds if it is FILE:PATH. Raises
    OSError if there is no such file, ValueError if it is not UTF-8."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:")).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        position = f"byte {error.start} is {error.object[error.start]:#x}"
        raise ValueError(f"{path} is not UTF-8 text, {position}: save it as UTF-8") from error


def main(config):
    start = read_start(config.start)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    engine = Engine(model, n_vocab=tokenizer.n_vocab)

    # <|endoftext|> is the token; GPT-2 saw it before each text
    first, *rest = start.split("<|endoftext|>")
    prompt = tokenizer.encode(first)
    for text in rest:
        prompt += [END_OF_TEXT, *tokenizer.encode(text)]
    prompt = prompt or [END_OF_TEXT]
    context = model.config.block_size
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the context {context}: shorten it")

    # stream each continuation after the prompt
    cut = False  # whether the context ended one early
    for i in range(config.num_samples):
        if i > 0:
            print("-" * 20)
        print(start, end="", flush=True)
        seed = config.seed + i
        pieces = stream(engine, tokenizer, prompt, config, stop_ids=tokenizer.stop_ids, seed=seed)
        for text in pieces:
            print(text, end="", flush=True)
        print()
        cut |= len(engine.rows[0].ids) == context < len(prompt) + config.max_new_tokens
    if cut:
        n = f"{context - len(prompt)} tokens instead of max_new_tokens={config.max_new_tokens}"
        print(f"{n}: the context of {context} tokens ended", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
