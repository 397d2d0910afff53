"""What ranking 20 candidate replies costs, compared with scoring one, on PersonaChat:
python benchmarks/candidates.py --source=FILE"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import resolve, run_benchmark
from evaluation.ranking import continuation, loglikelihoods
from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.tokenizer import fit_context
from prepare.personachat import examples


@dataclass
class Config:
    source: str = ""  # PersonaChat's or ConvAI2's archive, folder or validation file
    lines: int = 50  # lines to score, chosen at random
    init_from: str = "random:gpt2"  # as for chat.py, or random:NAME: that shape, random weights
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def measure(config):
    """Return the time of scoring 20 candidates after one context, and `ratio`: that time divided by
    the time of scoring the reply alone."""
    at_least(1, config, "lines")
    if not Path(config.source or "-").exists():
        expected = "the archive of PersonaChat or its validation file"
        raise FileNotFoundError(f"source={config.source} does not exist: give {expected}")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(resolve(config.init_from), device, dtype, inference=True)

    draw = random.Random(0)
    lines = examples(Path(config.source))
    all_replies = [reply for _, _, reply, _ in lines]
    n_tokens = 0
    seconds = 0.0
    seconds_alone = 0.0
    for persona, messages, reply, candidates in draw.sample(lines, min(config.lines, len(lines))):
        # files without candidates: other replies of the file
        candidates = candidates or [*draw.choices(all_replies, k=19), reply]
        continuations = [continuation(tokenizer, text) for text in candidates]
        if persona:
            messages = [{"role": "system", "content": persona}, *messages]
        room = model.config.block_size - max(len(ids) for ids in continuations) + 1
        context, _ = fit_context(tokenizer, messages, room)

        # the scores are floats, so the device is done
        t0 = time.perf_counter()
        loglikelihoods(model, context, continuations)
        t1 = time.perf_counter()
        loglikelihoods(model, context, continuations[-1:])
        t2 = time.perf_counter()
        seconds += t1 - t0
        seconds_alone += t2 - t1
        n_tokens += len(context) + sum(len(ids) for ids in continuations)
        print(f"{len(context)} tokens of context: {t1 - t0:.3f} s", file=sys.stderr)
    return {
        "tokens_per_s": n_tokens / seconds,
        "seconds": seconds,
        "seconds_alone": seconds_alone,
        "ratio": seconds / seconds_alone,
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
