"""Draw the loss curves of training runs, and print the best validation loss of each:

    python evaluation/plot.py out/chat out/small [--svg=FILE]

Thin lines are single steps, thick ones their moving mean, dots the validation loss. Needs
matplotlib (pip install matplotlib).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import new_figure, save
from nanochatgpt.configurator import run
from nanochatgpt.monitor import read_log


@dataclass
class Config:
    out_dir: str = "out/chat"  # the runs: a,b, which can also be given as plain arguments
    svg: str = "loss.svg"  # the file to write


def read_curve(out_dir, name):
    """Return (iters, nats), two arrays, of a loss in the log of a run."""
    iters = []
    losses = []
    for _, record in read_log(Path(out_dir) / "metrics.jsonl"):
        if record.get(name) is not None:  # null: it was NaN
            iters.append(record["iter"])
            losses.append(record[name])
    return np.array(iters), np.array(losses)


def main(config):
    figure = new_figure()
    axes = figure.add_subplot(xlabel="iter", ylabel="loss (nats)")
    for i, out_dir in enumerate(config.out_dir.split(",")):
        # each step, and the mean of n steps; a run that has only begun has none
        color = f"C{i}"  # color i of matplotlib's cycle
        iters, losses = read_curve(out_dir, "loss")
        axes.plot(iters, losses, color=color, linewidth=0.4)
        if len(losses):
            n = 1 + len(losses) // 50
            means = np.convolve(losses, np.ones(n) / n, "valid")
            axes.plot(iters[n - 1 :], means, color=color)

        # the validation loss
        iters, losses = read_curve(out_dir, "val_loss")
        axes.plot(iters, losses, "o", color=color, markersize=4, label=out_dir)
        if len(losses):
            best = losses.argmin()
            print(f"{out_dir}: best val loss {losses[best]:.4f} at iter {iters[best]:,}")
    axes.legend()
    save(figure, config.svg)


if __name__ == "__main__":
    # plain arguments are the runs
    out_dirs = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    knobs = [arg for arg in sys.argv[1:] if arg.startswith("-")]
    if out_dirs:
        knobs.append(f"--out_dir={','.join(out_dirs)}")
    sys.argv[1:] = knobs
    run(main, Config)
