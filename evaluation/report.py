"""
What came of a run or an evaluation, to look at: the log of a run, tables, and one HTML page that needs nothing else.
"""

import math
from html import escape
from pathlib import Path

from nanochatgpt.monitor import read_log

FIGURES = {  # of an evaluation: their labels and formats
    "loss": ("loss, nats a token", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "token_accuracy": ("token accuracy", ".1%"),
    "reward": ("reward: predicted tokens that are right", ".1%"),
    "penalty": ("penalty: predicted tokens like the one before", ".1%"),
    "bleu": ("BLEU", ".2%"),
    "chrf": ("chrF", ".2%"),
    "distinct_1": ("distinct words", ".1%"),
    "distinct_2": ("distinct pairs of words", ".1%"),
    "repeated_4grams": ("repeated 4-grams", ".2%"),
    "mean_length": ("tokens in a reply", ".1f"),
    "ended": ("replies that end by themselves", ".1%"),
    "speaks_for_human": ("replies that go on with another turn", ".1%"),
    "recall_1": ("recall of what was told 1 exchange ago", ".1%"),
    "recall_3": ("recall of what was told 3 exchanges ago", ".1%"),
    "recall_6": ("recall of what was told 6 exchanges ago", ".1%"),
    "persona": ("recall of its persona", ".1%"),
}
CONVAI2 = {  # if it is asked for
    "f1": ("ConvAI2: F1", ".1%"),
    "hits_1": ("ConvAI2: Hits@1 of 20 candidates", ".1%"),
    "persona_perplexity": ("ConvAI2: perplexity with the persona", ".2f"),
    "plain_perplexity": ("ConvAI2: perplexity without", ".2f"),
}
BATCH_COLUMNS = ("loss", "reward", "penalty", "bleu")  # of a batch of training
COLOURS = (
    "#2f6fde",
    "#d9731a",
    "#3a9d5d",
    "#9b59b6",
)  # of the columns; legible on white and on black
WIDTH, HEIGHT, LEFT, ABOVE, BELOW = 640, 250, 46, 24, 24  # of a picture, and of its margins
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #888 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right }
th:first-child { text-align: left; font-weight: normal } tbody tr:nth-child(odd) { background: var(--soft) }
thead th { border-bottom: 1px solid var(--line) }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor }
.legend span { margin-right: 1.2rem } .legend b { font-size: 1.3em; line-height: 0; vertical-align: -.1em }
.talk { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .6rem;
  border-top: 1px solid var(--line); padding: 1rem 0; overflow-wrap: anywhere }
.said { grid-column: 1 / -1; white-space: pre-wrap; color: var(--quiet) }
.reply { background: var(--soft); border-left: 4px solid; border-radius: 4px; padding: .4rem .7rem }
.reply p { margin: 0; white-space: pre-wrap }
.reply small { display: block; color: var(--quiet) }
"""


def read_run(directory):
    """Return {"loss": {iter: nats}, "val_loss": {iter: nats}, "tokens_per_s": {iter: tokens a second}} of a run.

    Raises FileNotFoundError where there is no metrics.jsonl, ValueError where it has no losses or is another's.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        what = path if Path(directory).is_dir() else directory
        raise FileNotFoundError(f"{what} does not exist: give the out_dir of a run of train.py")
    curves = {"loss": {}, "val_loss": {}, "tokens_per_s": {}}
    for _, record in read_log(path):
        for name in curves.keys() & record.keys():
            curves[name][record["iter"]] = math.nan if record[name] is None else record[name]
    if not losses([curves]):
        raise ValueError(
            f"{path} has no losses: train for longer, or lower log_interval (train_ppo.py has none)"
        )
    return curves


def losses(runs):
    """Return all losses of the runs but the NaN or infinite one of a run that diverged, which cannot be drawn."""
    return [
        y
        for curves in runs
        for name in ("loss", "val_loss")
        for y in curves[name].values()
        if math.isfinite(y)
    ]


def table(figures):
    """Return {name: figures} as rows of cells: one for each figure that there is, a column for each name."""
    rows = [["", *figures]]
    for key, (label, form) in (FIGURES | CONVAI2).items():
        values = [row.get(key) for row in figures.values()]
        if any(value is not None for value in values):
            rows.append([label, *("" if value is None else f"{value:{form}}" for value in values)])
    return rows


def table_of_batches(figures):
    """Return {name: [figures of a batch]} as text: a row for each batch, four columns for each name."""
    width = 10 * len(BATCH_COLUMNS)
    lines = ["     " + "".join(f"  {name:>{width - 2}}" for name in figures)]
    lines.append("batch" + "".join(f"{key:>10}" for key in BATCH_COLUMNS) * len(figures))
    for number, row in enumerate(zip(*figures.values(), strict=True), 1):
        cells = (
            f"{batch[key]:>10{'.4f' if key == 'loss' else '.1%'}}"
            for batch in row
            for key in BATCH_COLUMNS
        )
        lines.append(f"{number:5}{''.join(cells)}")
    return "\n".join(lines)


def page(title, rows, runs, lengths, talks):
    """Return the HTML of a report that fetches nothing.

    rows: the table's, a list of cells each, the names of the columns first. runs: {name: as read_run returns it}.
    lengths: {name: [tokens of a reply]}. talks: [(messages so far, {name: the reply there})].
    """
    names = list(dict.fromkeys([*rows[0][1:], *lengths, *runs]))
    colour = dict(zip(names, COLOURS * len(names), strict=False))
    parts = [f"<h1>{escape(title)}</h1>", _table(rows)]
    if runs:
        parts += [
            "<h2>Loss in training</h2><p>Lines: training. Dots: validation.</p>",
            _legend(runs, colour),
        ]
        parts.append(_curves(runs, colour))
    if lengths:
        parts += [
            "<h2>How long replies are</h2>",
            _legend(lengths, colour),
            _histogram(lengths, colour),
        ]
    if talks:
        parts.append("<h2>What is said</h2>")
        parts += [_talk(messages, replies, colour) for messages, replies in talks]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _table(rows):
    head, *body = ["".join(f"<th>{escape(cell)}</th>" for cell in rows[0])] + [
        f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        for row in rows[1:]
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"</tr>".join(body)}</tr></tbody></table></div>'


def _legend(names, colour):
    convai2_metrics = (
        f'<span><b style="color:{colour[name]}">●</b> {escape(name)}</span>' for name in names
    )
    return f'<p class="legend">{"".join(convai2_metrics)}</p>'


def _axes(x_last, y_last, x_label, y_label, y_first=0.0):
    """Return (the SVG of two axes with five ticks each, x -> pixel, y -> pixel)."""

    def across(x):
        return LEFT + x / (x_last or 1) * (WIDTH - LEFT - 10)

    def down(y):
        return ABOVE + (y_last - y) / ((y_last - y_first) or 1) * (HEIGHT - ABOVE - BELOW - 10)

    svg = [
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 2}" text-anchor="end">{x_label}</text><text x="2" y="11">{y_label}</text>'
    ]
    for i in range(5):
        x, y = x_last * i / 5, y_first + (y_last - y_first) * i / 4
        svg.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{x:,.0f}</text>'
        )
        svg.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        line = f'x1="{LEFT}" x2="{WIDTH - 10}" y1="{down(y):.1f}" y2="{down(y):.1f}"'
        svg.append(f'<line {line} stroke="currentColor" stroke-opacity=".15"/>')
    return svg, across, down


def _picture(svg, what):
    return f'<svg role="img" aria-label="{what}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{"".join(svg)}</svg>'


def _curves(runs, colour):
    ys = losses(runs.values())
    last = max(it for curves in runs.values() for it in curves["loss"] | curves["val_loss"])
    svg, across, down = _axes(last, max(ys), "iter", "nats", min(ys))
    for name, curves in runs.items():
        points = {
            key: [(across(it), down(y)) for it, y in curves[key].items() if math.isfinite(y)]
            for key in curves
        }
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points["loss"])
        svg.append(
            f'<polyline points="{line}" fill="none" stroke="{colour[name]}" stroke-opacity=".6"/>'
        )
        svg += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour[name]}"/>'
            for x, y in points["val_loss"]
        ]
    return _picture(svg, "loss curves")


def _histogram(lengths, colour, bins=20):
    longest = max(max(ns) for ns in lengths.values()) + 1
    size = -(-longest // bins)  # tokens in a bin
    shares = {
        name: [sum(n // size == i for n in ns) / len(ns) for i in range(bins)]
        for name, ns in lengths.items()
    }
    svg, across, down = _axes(
        size * bins, 100 * max(map(max, shares.values())), "tokens", "% of replies"
    )
    width = (across(size) - across(0)) * 0.9 / len(shares)  # of a bar
    for column, (name, heights) in enumerate(shares.items()):
        for i, share in enumerate(heights):
            x, y = across(size * i) + column * width, down(100 * share)
            place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{down(0) - y:.1f}"'
            svg.append(f'<rect {place} fill="{colour[name]}"/>')
    return _picture(svg, "histogram of the lengths of replies")


def _talk(messages, replies, colour):
    who = {"system": "persona", "user": "human", "assistant": "bot"}
    said = escape(
        "\n".join(f"{who[message['role']]}: {message['content']}" for message in messages)
    )
    boxes = (
        f'<div class="reply" style="border-color:{colour[name]}">'
        f"<small>{escape(name)}</small><p>{escape(text)}</p></div>"
        for name, text in replies.items()
    )
    return f'<div class="talk"><div class="said">{said}</div>{"".join(boxes)}</div>'
