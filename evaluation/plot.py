"""
Draw the loss curves of training runs into an SVG file, and print a line about each run:

    python evaluation/plot.py OUT_DIR... [--svg=FILE]

Needs matplotlib (pip install matplotlib).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import loss_chart, pick_colors, read_run, svg
from evaluation.report import write
from nanochatgpt.configurator import run


@dataclass
class Config:
    svg: str = "loss.svg"  # the file to write


def main():
    # arguments without dashes are runs; the rest goes to the configurator
    out_dirs = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg.startswith("-")]

    def draw(config):
        if not out_dirs:
            raise ValueError("name a run: python evaluation/plot.py out/chat")

        # the picture
        runs = {out_dir: read_run(out_dir) for out_dir in out_dirs}
        write(config.svg, svg(loss_chart(runs, pick_colors(runs))))
        print(f"wrote {config.svg}")

        # a line about each run; one that has only begun may lack a loss
        for name, (loss, val_loss) in runs.items():
            text = name
            if loss.size:
                it, nats = loss[:, -1]
                text += f", loss {nats:.4f} at iter {it:,.0f}"
            if val_loss.size:
                it, nats = val_loss[:, val_loss[1].argmin()]
                text += f", best val loss {nats:.4f} at iter {it:,.0f}"
            print(text)

    run(draw, Config)


if __name__ == "__main__":
    main()
