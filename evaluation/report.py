"""Results of an evaluation: progress, a table, JSON, and an HTML page that loads nothing else."""

import json
import sys
from html import escape
from pathlib import Path

from nanochatgpt.files import replacing

ROWS = {  # metric -> its label and format in the table
    "loss": ("loss, nats per token", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "reward": ("token accuracy (Locutusque's reward)", ".1%"),
    "penalty": ("penalty: predicted tokens like the one before", ".1%"),
    "bleu": ("BLEU", ".2%"),
    "chrf": ("chrF", ".2%"),
    "distinct_1": ("distinct words", ".1%"),
    "distinct_2": ("distinct pairs of words", ".1%"),
    "repeated_4grams": ("repeated 4-grams", ".2%"),
    "mean_length": ("tokens in a reply", ".1f"),
    "ended": ("replies that end by themselves", ".1%"),
    "speaks_for_human": ("replies that speak for the human", ".1%"),
    "recall_1": ("recall of what was told 1 exchange ago", ".1%"),
    "recall_3": ("recall of what was told 3 exchanges ago", ".1%"),
    "recall_6": ("recall of what was told 6 exchanges ago", ".1%"),
    "persona": ("recall of its persona", ".1%"),
}
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
pre { overflow-x: auto }
.talk { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid; padding: 1rem 0 }
.talk div { flex: 1 16rem; white-space: pre-wrap; overflow-wrap: anywhere }
</style>"""


def progress(items, label):
    """Yield the items of a sequence. On a terminal, show how many are done."""
    for n, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            end = "\n" if n == len(items) else "\r"  # \r: the next line overwrites this one
            print(f"{label}: {n:,} of {len(items):,}", end=end, file=sys.stderr, flush=True)


def table(metrics, rows=ROWS):
    """Return {name: {metric: value}} as text: a line of names, then one for each metric."""
    width = 2 + max(8, *map(len, metrics))  # of a column
    lines = [" " * 46 + "".join(f"{name:>{width}}" for name in metrics)]
    for key, (label, form) in rows.items():
        line = f"{label:46}"
        for values in metrics.values():
            value = values.get(key)
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
    """Write metrics as JSON, which lacks NaN and infinity: they become null."""
    finite = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    write(path, json.dumps(finite, indent=2) + "\n")


def page(title, table_text, replies, prompts, tokenizer):
    """Return the HTML of a report: a table, and twenty of the conversations. replies:
    {name: [text of a reply to each prompt]}, of models and of people. prompts: [ids]."""
    parts = [HEAD, f"<title>{escape(title)}</title><h1>{escape(title)}</h1>"]
    parts.append(f"<pre>{escape(table_text)}</pre>")

    # a conversation, and the replies to it next to each other
    for i, prompt in enumerate(prompts[:20]):  # they are in random order
        talk = ""
        for message in tokenizer.parse(prompt):
            talk += f"{message['role']}: {message['content']}\n"
        html = f"<div>{escape(talk)}</div>"
        for name, texts in replies.items():
            html += f"<div><b>{escape(name)}</b>\n{escape(texts[i])}</div>"
        parts.append(f'<div class="talk">{html}</div>')
    return "\n".join(parts) + "\n"
