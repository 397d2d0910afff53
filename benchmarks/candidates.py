"""What ranking 20 candidate replies costs, compared with scoring one, on PersonaChat:
python benchmarks/candidates.py --source=FILE"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ModelConfig, load, run_benchmark
from evaluation.ranking import continuation, loglikelihoods
from nanochatgpt.configurator import at_least
from nanochatgpt.tokenizer import fit_context
from prepare.parlai import examples


@dataclass
class Config(ModelConfig):
    source: str = ""  # PersonaChat's or ConvAI2's archive, folder or validation file
    lines: int = 50  # lines to score, chosen at random


def measure(config):
    """Score 20 candidates after a context, and the reply alone after the same context."""
    at_least(1, config, "lines")
    if not config.source:
        raise ValueError("set source: the archive of PersonaChat, or its validation file")
    lines = examples(Path(config.source))  # [(persona, messages, reply, candidates)]
    model, tokenizer, _, _ = load(config)

    draw = random.Random(0)
    all_replies = [reply for _, _, reply, _ in lines]
    n_tokens = 0  # of contexts and candidates
    seconds = 0.0  # for all candidates of a line
    seconds_alone = 0.0  # for the reply alone
    for persona, messages, reply, candidates in draw.sample(lines, min(config.lines, len(lines))):
        # files without candidates: other replies of the file
        candidates = candidates or [*draw.choices(all_replies, k=19), reply]
        continuations = [continuation(tokenizer, text) for text in candidates]

        # the context: as many turns as fit
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
        "seconds": seconds,  # of 20 candidates
        "seconds_alone": seconds_alone,  # of one reply
        "ratio": seconds / seconds_alone,
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
