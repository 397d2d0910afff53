"""Results of an evaluation: progress, a table, JSON, and an HTML page that loads nothing else."""

import json
import sys
import time
from html import escape
from pathlib import Path

from evaluation.charts import length_chart, loss_chart, pick_colors
from nanochatgpt.files import replacing

ROWS = {  # metric -> its label and format in the table
    # predictions of what people said
    "loss": ("loss, nats per token", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "token_accuracy": ("token accuracy", ".1%"),
    "reward": ("Locutusque's reward (= token accuracy)", ".1%"),
    "penalty": ("penalty: predicted tokens like the one before", ".1%"),
    # replies to people
    "bleu": ("BLEU", ".2%"),
    "chrf": ("chrF", ".2%"),
    "distinct_1": ("distinct words", ".1%"),
    "distinct_2": ("distinct pairs of words", ".1%"),
    "repeated_4grams": ("repeated 4-grams", ".2%"),
    "mean_length": ("tokens in a reply", ".1f"),
    # all replies, those to probes included
    "ended": ("replies that end by themselves", ".1%"),
    "speaks_for_human": ("replies that speak for the human", ".1%"),
    # probes
    "recall_1": ("recall of what was told 1 exchange ago", ".1%"),
    "recall_3": ("recall of what was told 3 exchanges ago", ".1%"),
    "recall_6": ("recall of what was told 6 exchanges ago", ".1%"),
    "persona": ("recall of its persona", ".1%"),
}
# the styles are in the page, which follows the browser's light or dark theme
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
td { padding: .2rem .8rem; text-align: right } td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
.talk { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .6rem;
  border-top: 1px solid #8884; padding: 1rem 0; overflow-wrap: anywhere }
.talk > pre { grid-column: 1 / -1; opacity: .7 } pre { white-space: pre-wrap; font: inherit }
.reply { background: #8881; border-left: 4px solid; padding: .4rem .7rem }
</style>"""


def progress(items, label):
    """Yield the items of a sequence. On a terminal, show how many are done and the time left."""
    terminal = sys.stderr.isatty()
    start = time.perf_counter()  # seconds
    try:
        for n, item in enumerate(items, 1):
            yield item
            # overwrite the line: \r goes to its start, \033[K clears it
            if terminal:
                left = (time.perf_counter() - start) * (len(items) / n - 1)
                line = f"\r\033[K{label}: {n:,} of {len(items):,}, {left:.0f} s left"
                print(line, end="", file=sys.stderr, flush=True)
    finally:
        # also after an exception, so that the message has a line of its own
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def table(metrics, rows=ROWS):
    """Return {name: {metric: value}} as rows of text: the names, then each metric that any has."""
    lines = [["", *metrics]]  # the head
    for key, (label, form) in rows.items():
        cells = [label]
        for column in metrics.values():
            value = column.get(key)
            cells.append("" if value is None else f"{value:{form}}")
        # no row for a metric that was not asked for
        if any(cells[1:]):
            lines.append(cells)
    return lines


def print_table(rows):
    """Print what `table` returns."""
    # a column is as wide as its name, at least 10
    widths = [max(len(name) + 2, 10) for name in rows[0][1:]]
    for label, *cells in rows:
        columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        print(f"{label:46}{''.join(columns)}".rstrip())


def write(path, text):
    """Write a file, and make the folder it is in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, metrics):
    """Write metrics as JSON."""
    # JSON lacks NaN and infinity: they become null
    finite = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    write(path, json.dumps(finite, indent=2) + "\n")


def page(title, rows, runs, lengths, talks):
    """Return the HTML of a report.

    rows: as `table` returns them. runs: {name: curves of read_run}. lengths: {name: [tokens of a
    reply]}. talks: [(messages, {name: the reply to them})].
    """
    # a model has the same color everywhere
    colors = pick_colors([*rows[0][1:], *lengths, *runs])
    parts = [HEAD, f"<title>{escape(title)}</title><h1>{escape(title)}</h1>"]

    # the table
    parts.append("<table>")
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append("</table>")

    # the charts
    if runs:
        parts.append("<h2>Training loss (lines) and validation loss (dots)</h2>")
        parts.append(loss_chart(runs, colors))
    if lengths:
        parts.append("<h2>Lengths of replies</h2>")
        parts.append(length_chart(lengths, colors))

    # the conversations
    if talks:
        parts.append("<h2>Replies</h2>")
    for messages, replies in talks:
        parts.append(_talk(messages, replies, colors))
    return "\n".join(parts) + "\n"


def _talk(messages, replies, colors):
    """Return the HTML of a conversation and the replies to it, next to each other."""
    # the conversation, a line per turn
    speakers = {"system": "persona", "user": "human", "assistant": "bot"}
    turns = [f"{speakers[message['role']]}: {message['content']}" for message in messages]
    text = "\n".join(turns)
    html = f"<pre>{escape(text)}</pre>"

    # a box for each model's reply, with the color of its curves
    for name, text in replies.items():
        reply = f"<small>{escape(name)}</small><pre>{escape(text)}</pre>"
        html += f'<div class="reply" style="border-color:{colors[name]}">{reply}</div>'
    return f'<div class="talk">{html}</div>'
