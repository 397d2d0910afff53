"""
What a training run says of itself: its log, its speed, its trouble; and how it is asked to stop.
"""

import contextlib
import json
import math
import re
import resource
import signal
import statistics
import sys
from collections import defaultdict, deque
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import replacing

# pattern in the device's name -> dense bf16 or fp16 FLOP/s, accumulated in fp32, from the makers' datasheets
PEAK_FLOPS = {r"H200|H100(?! PCIe)": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, r"L4\b": 121e12}
PEAK_FLOPS |= {"RTX 4090": 165e12, "RTX 3090": 71e12, "RTX A6000": 155e12, "V100": 125e12, r"T4\b": 65e12}
# a value is too high beyond so many times the usual, and so much more
LIMITS = {"loss": (2, 1), "validation loss": (2, 1), "gradient norm": (100, 100)}


class Log:
    """Appends to metrics.jsonl, and to Weights & Biases where it is switched on."""

    def __init__(self, config, first_iter):
        path = Path(config.out_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if first_iter:
            for line in path.read_text().splitlines() if path.exists() else ():
                with contextlib.suppress(ValueError):  # a line that a kill cut short
                    record = json.loads(line)
                    evaluation = any(name.startswith("val_") for name in record)  # the one there comes again
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
                self.wandb = wandb.init(project=config.wandb_project, name=name, config=asdict(config))
            except wandb.Error as error:
                raise ValueError(f"wandb: {error}; run `wandb login`, or set WANDB_MODE=offline") from error

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
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def peak_flops(device):
    """Return the FLOP/s of a CUDA device's tensor cores, None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)


def peak_memory(device):
    """Return the most memory in use so far, in MB: on CUDA what PyTorch had allocated, else the process's own."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if Path("/proc/self/status").exists():  # getrusage would count the process that we were forked from
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
