"""
Measure: python bench.py decode|train|prepare|fidelity|candidates|best_of|serve [--knob=value ...]

    decode      how fast a model reads prompts and writes: tokens a second, bytes of weights a second, memory, start-up
    train       how fast it learns: tokens and supervised tokens a second, beside nanoGPT's and transformers' loop
    prepare     how fast conversations become a shard, beside tiktoken alone, and in how much memory
    fidelity    what a dtype costs: how far its next-token distributions are from float32's, on real text
    candidates  what ranking the candidates of a line of PersonaChat costs, beside scoring its reply alone
    best_of     what choosing the best of several replies costs, beside one reply, and how much better it is
    serve       what many clients of serve.py get at once, beside one: tokens a second, time to the first, memory

Progress goes to stderr; the last line on stdout is the result as one JSON object.
"""

import importlib
import json
import platform
from dataclasses import asdict

import torch

from nanochatgpt.configurator import run, take_mode

MODES = (
    "decode",
    "train",
    "prepare",
    "fidelity",
    "candidates",
    "best_of",
    "serve",
)  # benchmarks/MODE.py


def main():
    mode = take_mode(MODES, __doc__)
    benchmark = importlib.import_module(f"benchmarks.{mode}")

    def report(config):
        result = benchmark.measure(config)
        rounded = {
            name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in result.items()
        }
        about = {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        print(
            json.dumps(
                {"bench": mode}
                | rounded
                | {"config": asdict(config), "torch": torch.__version__}
                | about
            )
        )

    run(report, benchmark.Config)


if __name__ == "__main__":
    main()
