"""
What a training run says of itself: its log and its trouble; and how it is asked to stop.
"""

import json
import math
import signal
import statistics
from collections import defaultdict, deque
from dataclasses import asdict
from pathlib import Path

from evaluation.report import read_log
from nanochatgpt.atomic import replacing

# a value is too high beyond so many times the usual, and so much more
LIMITS = {"loss": (2, 1), "validation loss": (2, 1), "gradient norm": (100, 100)}


class Log:
    """Appends to metrics.jsonl, and to Weights & Biases where it is switched on."""

    def __init__(self, config, first_iter):
        path = Path(config.out_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if first_iter:
            for line, record in read_log(path) if path.exists() else ():
                evaluation = any(
                    name.startswith("val_") for name in record
                )  # the one there comes again
                if record["iter"] + evaluation <= first_iter:
                    kept.append(line + "\n")
        with replacing(path) as part:
            part.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.wandb = None
        if config.wandb_log:
            import wandb

            try:
                name = config.wandb_run_name or None
                self.wandb = wandb.init(
                    project=config.wandb_project, name=name, config=asdict(config)
                )
            except wandb.Error as error:
                raise ValueError(
                    f"wandb: {error}; run `wandb login`, or set WANDB_MODE=offline"
                ) from error

    def __call__(self, **record):
        # JSON has no NaN and no infinity, which a loss can be, and the norm of a step that float16 skips
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["iter"])


class Trouble:
    """Says when a run goes wrong, so that it ends before what it has become is saved over what it was."""

    def __init__(self):
        self.seen = defaultdict(lambda: deque(maxlen=100))

    def check(self, name, value, it, usual=None):
        """Raise ValueError where the value is no number or far above the usual: the median of those before, from the
        tenth on, where it is not given."""
        seen = self.seen[name]
        if usual is None:
            usual = statistics.median(seen) if len(seen) >= 10 else math.inf
        times, more = LIMITS[name]
        if not value < times * usual + more:
            was = f", {usual:.4g} before" if usual < math.inf else ""
            raise ValueError(
                f"the {name} is {value:.4g} at iter {it}{was}: the run diverges. Lower learning_rate, or raise "
                f"warmup_iters; the checkpoints are from before"
            )
        seen.append(value)


class StopSignal:
    """Ctrl-C and SIGTERM ask for a checkpoint and a clean end after the step; a second one ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, _frame):
        self.asked = True
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
