"""
What ranking the candidates of a line of PersonaChat costs, beside scoring its reply alone.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evaluation.convai2 import continuation, loglikelihoods
from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.tokenizer import fit_context
from prepare.personachat import examples


@dataclass
class Config:
    source: str = ""  # PersonaChat's or ConvAI2's archive, folder or valid file; candidates it lacks are other replies
    lines: int = 50  # of it, drawn at random
    init_from: str = "random:gpt2"  # as for chat.py
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def measure(config):
    """Return the time of scoring 20 candidates behind one context as a multiple of that of the reply alone (`ratio`),
    and the tokens of context and candidates a second."""
    at_least(1, config, "lines")
    if not Path(config.source or "-").exists():
        raise FileNotFoundError(
            f"source={config.source} does not exist: the archive of PersonaChat, or its valid file"
        )
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    draw = random.Random(0)
    found = examples(Path(config.source))
    replies = [reply for _, _, reply, _ in found]
    seconds, n_tokens = [[], []], 0
    for persona, said, reply, others in draw.sample(found, min(config.lines, len(found))):
        texts = others or [*draw.choices(replies, k=19), reply]
        continuations = [continuation(tokenizer, text) for text in texts]
        system = [{"role": "system", "content": persona}] if persona else []
        context, _ = fit_context(
            tokenizer, system + said, model.config.block_size - max(map(len, continuations)) + 1
        )
        for which, scored in enumerate((continuations, continuations[-1:])):
            t0 = time.perf_counter()
            loglikelihoods(model, context, scored)  # whose floats say that the device is done
            seconds[which].append(time.perf_counter() - t0)
        n_tokens += len(context) + sum(map(len, continuations))
        print(f"{len(seconds[0])} lines", file=sys.stderr)
    all_of_them, alone = map(sum, seconds)
    return {
        "tokens_per_s": n_tokens / all_of_them,
        "seconds": all_of_them,
        "seconds_alone": alone,
        "ratio": all_of_them / alone,
    }
