"""
How fast a model reads prompts and writes: tokens a second, bytes of weights a second, memory, start-up.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import peak_memory, pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.sampling import Sampling

ITEMSIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.int8: 1}


@dataclass
class Config:
    init_from: str = (
        "random:gpt2"  # as for chat.py; random:gpt2 has that shape and needs no weights
    )
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    rows: int = 1  # prompts at once
    prompt_len: int = 128  # tokens in a prompt
    new_tokens: int = 128  # tokens that follow it
    repeats: int = 5  # measurements, after one that does not count; the median is given
    record: bool = True  # replay steps without Python: by CUDA graphs, on a CPU by a trace
    compile: bool = False  # torch.compile the step


def measure(config):
    """Return tokens a second for prompts (`prompt_tokens_per_s`), what follows (`new_tokens_per_s`) and both together
    (`tokens_per_s`: new tokens by the whole time, as the peers are measured)."""
    at_least(1, config, "rows", "prompt_len", "new_tokens", "repeats")
    start = time.perf_counter()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, _ = load_model(config.init_from, device, dtype, inference=True)
    size, vocab_size = config.prompt_len + config.new_tokens, model.config.vocab_size
    if size > model.config.block_size:
        raise ValueError(
            f"prompt_len={config.prompt_len} and new_tokens={config.new_tokens} are more than the context of "
            f"{model.config.block_size} tokens"
        )
    engine = Engine(model, config.rows, size, record=config.record, compile=config.compile)
    sampling = Sampling(max_new_tokens=config.new_tokens, top_k=50)
    choose, seconds, started = random.Random(0), [], 0.0
    for repeat in range(config.repeats + 1):
        t0 = time.perf_counter()
        for row in range(
            config.rows
        ):  # another prompt each time: none can be taken over from the one before
            engine.add(
                [choose.randrange(vocab_size) for _ in range(config.prompt_len)], sampling, seed=row
            )
        engine.step()  # the prompts, and a token each; the ids on the host say that the device is done
        t1 = time.perf_counter()
        while engine.step():
            pass
        t2 = time.perf_counter()
        started = started or t1 - start
        seconds.append((t1 - t0, t2 - t1))
        print(f"{repeat}: prompt {t1 - t0:.3f} s, new tokens {t2 - t1:.3f} s", file=sys.stderr)
    prompt, new = (statistics.median(s) for s in zip(*seconds[1:], strict=True))
    steps = config.new_tokens - 1
    c = model.config
    weights = (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) * ITEMSIZE[
        dtype
    ]  # that a step multiplies with
    return {
        "tokens_per_s": config.rows * config.new_tokens / (prompt + new),
        "seconds": prompt + new,
        "prompt_tokens_per_s": config.rows * config.prompt_len / prompt,
        "new_tokens_per_s": config.rows * steps / new if steps else None,
        "weights_gb_per_s": weights * steps / new / 1e9 if steps else None,
        "first_token_s": started,  # since the imports, with loading and whatever is set up at first use
        "warm_up_s": sum(seconds[0]) - prompt - new,
        "peak_memory_mb": peak_memory(device),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else device,
    }
