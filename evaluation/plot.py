"""
Draw the loss curves of training runs: python plot.py OUT_DIR... [--png=FILE]

Each OUT_DIR is the out_dir of a run of train.py, whose metrics.jsonl is read. Without matplotlib the curves are drawn
in the terminal.
"""

import math
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.report import losses, read_run
from nanochatgpt.configurator import run
from nanochatgpt.files import replacing

GLYPHS = ("·●", "+■", "×◆", "~▲", "-▼", "=★")  # in the terminal: a run's loss, its validation loss


@dataclass
class Plot:
    png: str = "loss.png"  # where the picture is written


def summary(name, curves):
    """Return a line on what the run has come to."""
    loss, val_loss = curves["loss"], curves["val_loss"]
    parts = [f"{max(loss | val_loss):,} iters"]
    if loss:
        parts.append(f"last loss {list(loss.values())[-1]:.4f}")
    if val_loss:
        best = min(val_loss, key=val_loss.get)
        parts.append(f"best val loss {val_loss[best]:.4f} at iter {best:,}")
    if curves["tokens_per_s"]:
        parts.append(f"{statistics.median(curves['tokens_per_s'].values()):,.0f} tokens/s")
    return f"{name}: {', '.join(parts)}"


def draw_png(runs, log, path):
    """Write the curves of {name: curves} to `path`. Raises ModuleNotFoundError without matplotlib, OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, curves in runs.items():
        loss, val_loss = curves["loss"], curves["val_loss"]
        n = (
            1 + len(loss) // 50
        )  # losses of single steps are noisy: over them a moving mean of so many
        means = np.convolve(list(loss.values()), np.ones(n) / n, "valid") if loss else []
        (line,) = axes.plot(list(loss)[n - 1 :], means, linewidth=1.5, label=name)
        axes.plot(list(loss), list(loss.values()), color=line.get_color(), linewidth=0.5, alpha=0.4)
        axes.plot(
            list(val_loss), list(val_loss.values()), "o-", color=line.get_color(), markersize=4
        )
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="iter", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(title="training: thin each step, bold their mean; dots: validation")
    with replacing(path) as part:
        figure.savefig(part, format="png")


def draw_text(runs, log):
    """Return the lines of a plot of {name: curves}, as large as the terminal."""
    columns, lines = shutil.get_terminal_size()
    width, height = (
        max(20, columns - 10),
        max(8, lines - 3 * len(runs) - 3),
    )  # a summary may take two lines
    scale, unscale = (math.log, math.exp) if log else (float, float)
    top, bottom = scale(max(losses(runs.values()))), scale(min(losses(runs.values())))
    last = max(it for curves in runs.values() for it in curves["loss"] | curves["val_loss"]) or 1
    rows = [[" "] * width for _ in range(height)]

    def column(it):
        return round(it / last * (width - 1))

    def put(x, loss, glyph):
        rows[round((top - scale(loss)) / (top - bottom or 1) * (height - 1))][x] = glyph

    glyphs = dict(zip(runs, GLYPHS * len(runs), strict=False))
    for name, curves in runs.items():
        loss = {it: y for it, y in curves["loss"].items() if math.isfinite(y)}
        for x in range(column(min(loss)), column(max(loss)) + 1) if loss else ():
            put(
                x,
                np.interp(x / (width - 1) * last, list(loss), list(loss.values())),
                glyphs[name][0],
            )
    for name, curves in runs.items():  # over all the lines
        for it, y in curves["val_loss"].items():
            put(column(it), y, glyphs[name][1])
    ticks = [unscale(top - (top - bottom) * row / (height - 1)) for row in range(height)]
    plot = [
        f"{f'{ticks[i]:.4g}' if i % 4 == 0 else '':>7} │{''.join(row)}".rstrip()
        for i, row in enumerate(rows)
    ]
    axis = f"{'nats':>7} └0{f' iter {last:,}':─>{width - 1}}"
    return [
        *plot,
        axis,
        *(f"{thin} loss, {dot} val_loss: {name}" for name, (thin, dot) in glyphs.items()),
    ]


def main():
    directories = [
        arg for arg in sys.argv[1:] if not arg.startswith("-") and not arg.endswith(".py")
    ]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg not in directories]  # knobs and config files

    def draw(config):
        if not directories:
            raise ValueError("no OUT_DIR given: python plot.py out/chat; --help says more")
        runs = {directory: read_run(directory) for directory in directories}
        ys = losses(runs.values())
        log = 0 < 10 * min(ys) < max(ys)  # over less than a decade it would only crowd the ticks
        try:
            draw_png(runs, log, Path(config.png))
            print(f"wrote {config.png}")
        except ModuleNotFoundError:
            print(*draw_text(runs, log), "for a PNG: pip install matplotlib", sep="\n")
        for name, curves in runs.items():
            print(summary(name, curves))

    run(draw, Plot)


if __name__ == "__main__":
    main()
