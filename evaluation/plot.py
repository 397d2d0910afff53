"""
Draw the loss curves of training runs as an SVG picture, and print a line about each run:

    python evaluation/plot.py OUT_DIR... [--svg=FILE]
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import loss_chart, pick_colors, read_run
from evaluation.report import write
from nanochatgpt.configurator import run


@dataclass
class Config:
    svg: str = "loss.svg"  # the file to write


def summary(name, curves):
    """Return a line about a run."""
    # {iter: nats} each; a run that has only begun may lack one
    loss, val_loss = curves.values()
    text = f"{name}: {max(loss | val_loss):,} iters"
    # the training loss is that of the last step that was logged
    if loss:
        text += f", last loss {loss[max(loss)]:.4f}"
    if val_loss:
        best = min(val_loss, key=val_loss.get)
        text += f", best val loss {val_loss[best]:.4f} at iter {best:,}"
    return text


def main():
    # arguments without dashes are runs; the rest goes to the configurator
    out_dirs = []
    knobs = []
    for arg in sys.argv[1:]:
        if arg.startswith("-"):
            knobs.append(arg)
        else:
            out_dirs.append(arg)
    sys.argv[1:] = knobs

    def draw(config):
        if not out_dirs:
            raise ValueError("name a run: python evaluation/plot.py out/chat")

        # the picture
        runs = {out_dir: read_run(out_dir) for out_dir in out_dirs}
        colors = pick_colors(runs)
        write(config.svg, loss_chart(runs, colors))
        print(f"wrote {config.svg}")

        # a line about each run
        for name, curves in runs.items():
            print(summary(name, curves))

    run(draw, Config)


if __name__ == "__main__":
    main()
