"""Matplotlib figures (pip install matplotlib) that look right on light and on dark pages."""

from pathlib import Path

from nanochatgpt.files import replacing

GRAY = "#777"  # axes and labels, legible on white and on black
STYLE = {  # matplotlib's settings
    "savefig.transparent": True,  # the page is the background
    "text.color": GRAY,
    "text.parse_math": False,  # $ is a dollar sign
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
    "figure.figsize": (7, 3.3),  # inches
    "figure.constrained_layout.use": True,  # labels do not overlap
    "svg.fonttype": "none",  # text stays text
}


def new_figure():
    """Return an empty Figure. Raises ValueError without matplotlib."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("charts need matplotlib: pip install matplotlib") from None
    rcParams.update(STYLE)
    return Figure()


def save(figure, path):
    """Write a Figure in the format of the path's suffix, such as .svg or .png."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".") or "svg")
    print(f"wrote {path}")
