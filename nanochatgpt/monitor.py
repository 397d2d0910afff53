"""Logging, divergence checks and clean shutdown of a training run."""

import json
import math
import os
import signal
import statistics
import time
from collections import defaultdict, deque
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from nanochatgpt.files import naming, replacing

# (factor, offset): above factor * the usual value + offset the run is diverging
LIMITS = {"loss": (2, 1), "validation loss": (2, 1), "gradient norm": (100, 100)}


class Log:
    """Appends to out_dir/metrics.jsonl and, if switched on, to Weights & Biases."""

    def __init__(self, config, first_iter):
        """first_iter: where a resumed run starts; drop later records; those steps run again."""
        path = Path(config.out_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = ""  # the records of the steps that are done
        if first_iter and path.exists():
            for line, record in read_log(path):
                evaluation = any(name.startswith("val_") for name in record)
                # the evaluation at first_iter is repeated too
                if record["iter"] < first_iter + (not evaluation):
                    kept += line + "\n"
        with replacing(path) as part:
            part.write_text(kept)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)

        # a run at Weights & Biases, named after out_dir; a resumed run goes on in the same one
        self.wandb = None
        if config.wandb_log:
            import wandb

            id_path = path.with_name("wandb_id")
            options = {
                "project": os.environ.get("WANDB_PROJECT", "nanochatgpt"),
                "name": os.environ.get("WANDB_NAME", path.parent.name),
                "config": {name: knob for name, knob in asdict(config).items() if name != "given"},
            }
            if first_iter and id_path.exists():
                options |= {"id": id_path.read_text(), "resume": "allow"}
            try:
                self.wandb = wandb.init(**options)
            except wandb.Error as error:
                raise ValueError(f"{error}: run `wandb login`, or WANDB_MODE=offline") from error
            with replacing(id_path) as part:
                part.write_text(self.wandb.id)

    def __call__(self, **record):
        # JSON cannot hold NaN or inf (a diverged loss, fp16 overflow): write null
        finite = {}
        for name, value in record.items():
            finite[name] = value if value is not None and math.isfinite(value) else None
        with naming(self.file.name):
            self.file.write(json.dumps(finite) + "\n")  # flushed line by line
        # Weights & Biases can show NaN, so it gets the record as it is
        if self.wandb:
            self.wandb.log(record, step=record["iter"])


def read_log(path):
    """Yield (line, record) of a metrics.jsonl. Raises ValueError if Log did not write it."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a kill cut short
            continue
        # a record is {name: number or null} with an integer iter
        valid = isinstance(record, dict) and type(record.get("iter")) is int
        if not valid or not all(isinstance(value, int | float | None) for value in record.values()):
            raise ValueError(f"{path} is not the log of a run: {line[:60]!r}")
        yield line, record


class DivergenceCheck:
    """Stops a run that goes wrong before it overwrites its good checkpoint."""

    def __init__(self):
        self.history = defaultdict(lambda: deque(maxlen=100))  # name -> its last 100 values

    def check(self, name, value, it, usual=None):
        """Raise ValueError if the value is NaN or far above the usual one: the median of 100."""
        history = self.history[name]
        if usual is None:
            usual = statistics.median(history) if len(history) >= 10 else math.inf  # too few yet
        factor, offset = LIMITS[name]
        if not value < factor * usual + offset:  # `not <` also catches NaN
            before = f", {usual:.4g} before" if usual < math.inf else ""
            remedy = "lower learning_rate or raise warmup_iters; the saved checkpoints predate this"
            problem = f"the {name} is {value:.4g} at iter {it}{before}: training diverges"
            raise ValueError(f"{problem}; {remedy}")
        history.append(value)  # only values that passed the check


class StopSignal:
    """Ctrl-C and SIGTERM ask for a checkpoint and a clean end after the step; a second one ends the
    run at once."""

    def __init__(self):
        self.asked = False  # the training loop reads it after each step
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, kill
            signal.signal(number, self._ask)

    def _ask(self, number, _frame):
        self.asked = True
        # the second signal has the default effect
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


class Timer:
    """Measures the seconds per step since its last restart."""

    def __init__(self, it):
        self.restart(it)

    def restart(self, it):
        self.it = it  # step of the last restart
        self.time = time.perf_counter()  # seconds

    def seconds_per_step(self, it):
        """Return the mean over the steps up to `it`, and restart."""
        seconds = (time.perf_counter() - self.time) / (it - self.it)
        self.restart(it)
        return seconds


def time_left(seconds):
    """Return a duration as 0:12:34."""
    return str(timedelta(seconds=round(seconds)))
