"""How fast a model reads prompts and writes new tokens: python benchmarks/decode.py"""

import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ModelConfig, load, peak_memory, run_benchmark
from nanochatgpt.engine import Engine
from nanochatgpt.sampling import Sampling


@dataclass
class Config(ModelConfig):
    rows: int = 1  # prompts decoded together
    prompt_len: int = 128  # tokens per prompt
    new_tokens: int = 128  # tokens generated after each prompt
    repeats: int = 5  # measurements after a warm-up; the result is their median
    record: bool = True  # replay steps without Python: CUDA graphs, on a CPU a trace
    compile: bool = False  # torch.compile the step


def measure(config):
    """Decode rows of random prompts again and again; return the median rates."""
    model, _, device, dtype = load(config)
    c = model.config
    size = config.prompt_len + config.new_tokens
    if size > c.block_size:
        raise ValueError(f"prompt_len + new_tokens = {size} exceeds the context, {c.block_size}")
    engine = Engine(model, config.rows, size, record=config.record, compile=config.compile)
    sampling = Sampling(max_new_tokens=config.new_tokens, top_k=50)

    prompt_seconds = []
    new_seconds = []
    for repeat in range(config.repeats + 1):
        # read new prompts (nothing of them is cached) and draw the first tokens
        t0 = time.perf_counter()
        for row in range(config.rows):
            prompt = random.choices(range(c.vocab_size), k=config.prompt_len)
            engine.add(prompt, sampling, seed=row)
        engine.step()  # returns ids, so the device is done
        t1 = time.perf_counter()
        while engine.step():  # draw the other tokens
            pass
        t2 = time.perf_counter()
        prompt_seconds.append(t1 - t0)
        new_seconds.append(t2 - t1)
        print(f"{repeat}: prompt {t1 - t0:.3f} s, new tokens {t2 - t1:.3f} s", file=sys.stderr)

    prompt = statistics.median(prompt_seconds[1:])  # the first repeat was the warm-up
    new = statistics.median(new_seconds[1:])
    steps = config.new_tokens - 1  # the prompts gave the first token
    weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd  # factors of a step's products
    return {
        "tokens_per_s": config.rows * config.new_tokens / (prompt + new),  # new tokens
        "seconds": prompt + new,  # of a repeat
        "prompt_tokens_per_s": config.rows * config.prompt_len / prompt,
        "new_tokens_per_s": config.rows * steps / new,
        "weights_gb_per_s": weights * dtype.itemsize * steps / new / 1e9,
        "peak_memory_mb": peak_memory(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
