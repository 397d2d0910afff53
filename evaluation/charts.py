"""Charts as SVG, without a drawing library: losses of training runs, lengths of replies, curves."""

import itertools
import math
from html import escape
from pathlib import Path

import numpy as np

from nanochatgpt.monitor import read_log

COLORS = ("#2f6fde", "#d9731a", "#3a9d5d", "#9b59b6")  # legible on white and on black
GRAY = "#777"  # axes and labels
WIDTH = 640  # of a chart, in pixels
HEIGHT = 300  # pixels
MARGIN = 46  # on each side


def pick_colors(names):
    """Return {name: color}; a name may come more than once."""
    names = dict.fromkeys(names)
    return dict(zip(names, itertools.cycle(COLORS)))


class Chart:
    """Two axes, and the curves between them; x starts at 0."""

    def __init__(self, x_label, y_label, x_max, y_max, y_min=0.0):
        self.x_max = x_max or 1  # not 0 for a run that has only begun
        self.y_max = y_max
        self.y_range = (y_max - y_min) or 1
        self.parts = []  # SVG elements

        # the names of the axes
        self._text(WIDTH - MARGIN, HEIGHT - 10, x_label)
        self._text(2, 14, y_label, anchor="start")

        # five values on each axis, and a thin line across at those of y
        for i in range(5):
            x = self.x_max * i / 5
            y = y_min + self.y_range * i / 4
            self._text(self._x(x), HEIGHT - 28, f"{x:,.0f}", anchor="middle")
            self._text(MARGIN - 6, self._y(y) + 4, f"{y:.3g}")
            self.line([0, self.x_max], [y, y], GRAY, width=0.3)

    def line(self, xs, ys, color, width=1.5):
        """Connect points. width: in pixels."""
        points = ""
        for x, y in zip(xs, ys, strict=True):
            points += f"{self._x(x):.1f},{self._y(y):.1f} "
        stroke = f'fill="none" stroke="{color}" stroke-width="{width}"'
        self.parts.append(f'<polyline points="{points.rstrip()}" {stroke}/>')

    def dots(self, xs, ys, color):
        for x, y in zip(xs, ys, strict=True):
            center = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            self.parts.append(f'<circle {center} r="3.5" fill="{color}"/>')

    def svg(self, label, colors):
        """Return the chart as text. label: for screen readers; colors: {name: color}."""
        # the legend, in the corner
        y = 14
        for name, color in colors.items():
            self._text(WIDTH - MARGIN, y, f"● {name}", color)
            y += 13

        # the element itself, in pixels; pages may scale it
        head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}"'
        size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        body = "\n".join(self.parts)
        return f'{head} {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'

    # values to pixels; y grows downward
    def _x(self, value):
        fraction = value / self.x_max
        return MARGIN + fraction * (WIDTH - 2 * MARGIN)

    def _y(self, value):
        fraction = (self.y_max - value) / self.y_range
        return MARGIN + fraction * (HEIGHT - 2 * MARGIN)

    def _text(self, x, y, text, color=GRAY, anchor="end"):
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {place} fill="{color}">{escape(text)}</text>')


def read_run(out_dir):
    """Return the curves of a run of train.py: {"loss": {iter: nats}, "val_loss": {iter: nats}},
    without NaN. Raises FileNotFoundError without metrics.jsonl, ValueError without losses."""
    path = Path(out_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the out_dir of a run of train.py")

    # a record has one of the losses, or none
    curves = {"loss": {}, "val_loss": {}}
    for _, record in read_log(path):
        for name, curve in curves.items():
            value = record.get(name)  # nats
            if value is not None and math.isfinite(value):
                curve[record["iter"]] = value
    if not curves["loss"] and not curves["val_loss"]:
        raise ValueError(f"{path} has no losses: train for longer, or lower log_interval")
    return curves


def loss_chart(runs, colors):
    """Return the curves of {name: curves of read_run} as SVG: a thin line for single steps, a thick
    one for their moving mean, dots for the validation loss."""
    # the axes are wide enough for all runs
    iters = []
    losses = []
    for curves in runs.values():
        for curve in curves.values():
            iters += curve.keys()
            losses += curve.values()
    chart = Chart("iter", "loss (nats)", max(iters), max(losses), min(losses))

    # the curves
    for name, curves in runs.items():
        iters = list(curves["loss"])
        losses = list(curves["loss"].values())
        color = colors[name]
        if losses:
            n = 1 + len(losses) // 50  # steps in a mean
            means = np.convolve(losses, np.ones(n) / n, "valid")
            chart.line(iters, losses, color, width=0.4)
            chart.line(iters[n - 1 :], means, color)
        val_loss = curves["val_loss"]
        chart.dots(val_loss.keys(), val_loss.values(), color)
    return chart.svg("loss curves", {name: colors[name] for name in runs})


def length_chart(lengths, colors):
    """Return the distribution of {name: [tokens of a reply]} as SVG."""
    # twenty bins
    longest = max(max(tokens) for tokens in lengths.values())
    edges = np.arange(21) * (longest // 20 + 1)  # (21,) tokens
    centers = (edges[:-1] + edges[1:]) / 2

    # the share of replies in each bin
    percents = {}
    for name, tokens in lengths.items():
        counts, _ = np.histogram(tokens, edges)
        percents[name] = counts * 100 / len(tokens)  # (20,)
    highest = max(percent.max() for percent in percents.values())
    chart = Chart("tokens", "% of replies", edges[-1], highest)
    for name, percent in percents.items():
        chart.line(centers, percent, colors[name])
    return chart.svg("lengths of replies", {name: colors[name] for name in lengths})
