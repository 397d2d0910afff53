"""Results of an evaluation: progress, a table, JSON, and an HTML page that loads nothing else."""

import contextlib
import json
import sys
from base64 import b64encode
from html import escape
from pathlib import Path

from evaluation.charts import length_chart, loss_chart, pick_colors, read_run, svg
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
img { max-width: 100% } .table { overflow-x: auto }
.talk { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .6rem;
  border-top: 1px solid #8884; padding: 1rem 0; overflow-wrap: anywhere }
.talk pre { white-space: pre-wrap; font: inherit } .talk > pre { grid-column: 1 / -1; opacity: .7 }
.reply { background: #8881; border-left: 4px solid; padding: .4rem .7rem }
</style>"""


def progress(items, label):
    """Yield the items of a sequence. On a terminal, show how many are done."""
    terminal = sys.stderr.isatty()
    for n, item in enumerate(items, 1):
        yield item
        # \033[K clears the line; \r goes to its start, where the next output overwrites it
        if terminal:
            print(f"\033[K{label}: {n:,} of {len(items):,}", end="\r", file=sys.stderr, flush=True)
    if terminal:
        print(end="\033[K", file=sys.stderr, flush=True)


def table(metrics, rows=ROWS):
    """Return {name: {metric: value}} as text: a line of names, then one for each metric that any
    has."""
    # a column is as wide as its name, at least 10
    widths = {name: max(len(name) + 2, 10) for name in metrics}
    lines = [" " * 46 + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for key, (label, form) in rows.items():
        line = f"{label:46}"
        for name, width in widths.items():
            value = metrics[name].get(key)
            cell = "" if value is None else f"{value:{form}}"
            line += f"{cell:>{width}}"
        # no line for a metric that was not asked for
        if line.strip() != label:
            lines.append(line.rstrip())
    return "\n".join(lines)


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


def page(title, table_text, replies, prompts, tokenizer):
    """Return the HTML of a report: a table, charts, and twenty of the conversations.

    replies: {name: [text of a reply to each prompt]}, of models and of people; a model that is the
    out_dir of a run gets loss curves. prompts: [ids].
    """
    colors = pick_colors(replies)  # a model has the same color everywhere
    parts = [HEAD, f"<title>{escape(title)}</title><h1>{escape(title)}</h1>"]
    parts.append(f'<pre class="table">{escape(table_text)}</pre>')

    # the charts
    runs = {}
    lengths = {}
    for name, texts in replies.items():
        with contextlib.suppress(FileNotFoundError, ValueError):  # not a run, or without losses
            runs[name] = read_run(name)
        if texts:
            lengths[name] = [len(tokenizer.encode(text)) for text in texts]
    if runs:
        parts.append("<h2>Training loss (lines) and validation loss (dots)</h2>")
        parts.append(_image(loss_chart(runs, colors)))
    if lengths:
        parts.append("<h2>Lengths of replies</h2>")
        parts.append(_image(length_chart(lengths, colors)))

    # the conversations, each with the replies to it next to each other
    if prompts:
        parts.append("<h2>Replies</h2>")
    for i in range(0, len(prompts), 1 + (len(prompts) - 1) // 20):
        talk = ""
        for message in tokenizer.parse(prompts[i]):
            talk += f"{message['role']}: {message['content']}\n"
        html = f"<pre>{escape(talk)}</pre>"
        for name, texts in replies.items():
            reply = f"<small>{escape(name)}</small><pre>{escape(texts[i])}</pre>"
            html += f'<div class="reply" style="border-color:{colors[name]}">{reply}</div>'
        parts.append(f'<div class="talk">{html}</div>')
    return "\n".join(parts) + "\n"


def _image(figure):
    """Return the HTML of a chart, which holds its SVG."""
    data = b64encode(svg(figure).encode()).decode()
    return f'<img alt="chart" src="data:image/svg+xml;base64,{data}">'
