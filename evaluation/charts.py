"""Charts by matplotlib (pip install matplotlib): loss curves, lengths of replies, any lines."""

import io
import itertools
import math
from pathlib import Path

import numpy as np

from nanochatgpt.monitor import read_log

COLORS = ("#2f6fde", "#d9731a", "#3a9d5d", "#9b59b6")  # legible on white and on black
GRAY = "#777"  # axes and labels, legible on both too
STYLE = {  # matplotlib's settings
    "savefig.transparent": True,  # the page is the background
    "text.color": GRAY,
    "text.parse_math": False,  # $ is a dollar sign
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "figure.figsize": (7, 3.3),  # inches
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "",  # the same chart is the same file
}


def pick_colors(names):
    """Return {name: color}."""
    return dict(zip(names, itertools.cycle(COLORS)))


def new_figure():
    """Return a matplotlib Figure. Raises ValueError without matplotlib."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("charts need matplotlib: pip install matplotlib") from None
    rcParams.update(STYLE)
    return Figure()


def svg(figure):
    """Return a Figure as the text of an SVG file."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def read_run(out_dir):
    """Return the curves of a run of train.py, (loss (2, n), val_loss (2, m)): a row of iters, a row
    of nats. Raises FileNotFoundError without metrics.jsonl, ValueError without losses."""
    path = Path(out_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the out_dir of a run of train.py")

    # a record has one of the losses, or none; null is a loss that was NaN
    points = {"loss": [], "val_loss": []}
    for _, record in read_log(path):
        for name in points.keys() & record.keys():
            value = record[name]
            if value is not None and math.isfinite(value):
                points[name].append((record["iter"], value))
    if not any(points.values()):
        raise ValueError(f"{path} has no losses: train for longer, or lower log_interval")
    return [np.reshape(curve, (-1, 2)).T for curve in points.values()]


def loss_chart(runs, colors):
    """Return a Figure of {name: curves of read_run}: a thin line for single steps, a thick one for
    their moving mean, dots for the validation loss."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="iter", ylabel="loss (nats)")
    for name, (loss, val_loss) in runs.items():
        color = colors[name]
        axes.plot(*loss, color=color, linewidth=0.4, label=name)
        axes.plot(*val_loss, "o", color=color, markersize=4)
        if loss.size:
            iters, nats = loss
            n = 1 + len(nats) // 50  # steps in a mean
            means = np.convolve(nats, np.ones(n) / n, "valid")
            axes.plot(iters[n - 1 :], means, color=color)
    axes.legend()
    return figure


def length_chart(lengths, colors):
    """Return a Figure of the distributions of {name: [tokens of a reply]}."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="tokens in a reply", ylabel="share of replies per token")
    axes.hist(
        lengths.values(),
        bins=20,
        density=True,
        histtype="step",
        color=[colors[name] for name in lengths],
        label=list(lengths),
    )
    axes.legend()
    return figure
