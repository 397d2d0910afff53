"""The model card of a training run, out_dir/README.md: what the model is made from and with, and
how to talk to it. Directories appear by their last part only, so the card can be shared as it is.
"""

import dataclasses
import hashlib
import json
import platform
import re
from pathlib import Path

import torch

from nanochatgpt.checkpoint import NANO
from nanochatgpt.files import read_json, replacing
from nanochatgpt.hub import hub_id
from nanochatgpt.monitor import read_log
from nanochatgpt.sampling import ChatSampling, for_template

NOT_IN_RECIPE = ("out_dir", "data_dir", "device", "wandb_log", "given")  # where it ran, not what
MAX_ROWS = 12  # of the loss curve
EXAMPLE = [
    {"role": "system", "content": "i am a zookeeper."},
    {"role": "user", "content": "hi!"},
    {"role": "assistant", "content": "hello, mind the tiger."},
]
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{metadata}
# license: choose one of hf.co/docs/hub/repositories-licenses; mind those of the data below
---

# {name}

A GPT-2 with {n_parameters:,} parameters ({model.n_layer} layers, {model.n_head} heads, width
{model.n_embd}) and a context of {model.block_size:,} tokens, trained by nanoChatGPT from {start}.

## Talk to it

In a checkout of nanoChatGPT: `python chat.py --init_from=USER/{name}`, or a directory in its place.
In transformers:

```python
from transformers import pipeline

generate = pipeline("text-generation", "USER/{name}")
messages = [{{"role": "user", "content": "hi!"}}]
print(generate(messages, max_new_tokens=50)[0]["generated_text"][-1]["content"])
```

For llama.cpp, Ollama and vLLM see "Other programs" in nanoChatGPT's `docs/using.md`. The chat
template writes a persona, a message and a reply as

```
{example}
```

`chat.py` samples with temperature {sampling.temperature:g}, top_k {sampling.top_k}, \
top_p {sampling.top_p:g} and frequency_penalty {sampling.frequency_penalty:g};
`generation_config.json` has the first three.

## Data

{data}

## Recipe

`python train.py recipe.py`, where `recipe.py` is

```python
{recipe}
```

{it:,} steps, about {n_tokens:,.0f} tokens. Made with Python {python} and torch {torch}.

## Loss

In nats per learned token. The best validation loss is {best_val_loss:.4f}, of the weights here; the
last one is {last_val_loss:.4f}.

{curve}

## Limits

A model of this size knows little about the world, makes things up, and repeats the errors and
prejudices of its data. Do not rely on what it says, and do not let it pass for a person.
"""


def write_card(config, model, tokenizer, loader, it, best_val_loss):
    """Write the card of a run of train.py after `it` steps, unless somebody has edited it. loader:
    of the training data. Raises ValueError for a damaged source.json or metrics.jsonl."""
    path = Path(config.out_dir) / "README.md"
    old = _read(path)
    if old and old != _sign(re.sub(r"\A---\n#.*\n", "---\n", old)):
        return

    # where it started; a resumed run reads that in its card
    init_from = config.init_from
    if init_from == "resume":
        first = re.search(r"^init_from = ['\"](.*)['\"]$", old, re.MULTILINE)
        init_from = first[1] if first else "an earlier run"
    base = hub_id(init_from)
    if base:
        start = f"[{init_from}](https://huggingface.co/{base})"
    else:
        words = {"scratch": "random weights", "nano": "nano, the small model included with it"}
        start = words.get(init_from, Path(init_from).name)
        init_from = Path(init_from).name

    # the data, and the loss: its best evaluation and others, evenly spaced
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    sources, data = _data(loader, it * rows_per_step)
    log = read_log(path.with_name("metrics.jsonl"))
    curve = [record for _, record in log if record.get("val_loss") is not None]
    best = min(range(len(curve)), key=lambda i: abs(curve[i]["val_loss"] - best_val_loss))
    gaps = MAX_ROWS - 2
    kept = {best} | {round(i * (len(curve) - 1) / gaps) for i in range(gaps + 1)}
    rows = [("iter", "train", "val")]
    for i in sorted(kept):
        losses = [curve[i][name] for name in ("train_loss", "val_loss")]
        rows.append([curve[i]["iter"], *("–" if x is None else f"{x:.4f}" for x in losses)])

    card = CARD.format(
        name=path.parent.name or "chat",
        metadata=_metadata(config, sources),
        n_parameters=model.num_parameters(),
        model=model.config,
        start=start,
        example=tokenizer.decode(tokenizer.render(EXAMPLE)[0]),
        sampling=for_template(ChatSampling(), tokenizer.template),
        data=data,
        recipe=_recipe(config, init_from),
        it=it,
        n_tokens=it * rows_per_step * config.block_size * loader.fill,
        python=platform.python_version(),
        torch=torch.__version__,
        best_val_loss=best_val_loss,
        last_val_loss=curve[-1]["val_loss"],
        curve=_table(rows),
    )
    with replacing(path) as part:
        part.write_text(_sign(card), encoding="utf-8")


def _read(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _sign(card):
    """Return a card with a line that tells a later call whether the rest has been edited."""
    digest = hashlib.sha256(card.encode()).hexdigest()[:12]
    line = f"# written by train.py, which replaces it until you edit it ({digest})"
    return f"---\n{line}\n" + card.removeprefix("---\n")


def _metadata(config, sources):
    """Return the hub's metadata as YAML. Base models and data sets of a directory or of a resumed
    run are those that its card names."""
    values = {"base_model": [], "datasets": []}  # ids on the hub
    base = hub_id(config.init_from)
    if base:
        values["base_model"] = [base]
    elif config.init_from != "scratch":
        directories = {"nano": NANO, "resume": Path(config.out_dir)}
        directory = directories.get(config.init_from, Path(config.init_from))
        front = _read(directory / "README.md").split("\n---")[0]
        for key in values:  # "key: id", "key: [id, id]", or one "- id" per line
            value = re.search(rf"^{key}:(.*(?:\n *- .*)*)", front, re.MULTILINE)
            words = re.split(r"[\s,\[\]\"']+", value[1]) if value else []
            values[key] = [word for word in words if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", word)]

    for source in sources:
        hub = source.get("hub")
        if hub and hub not in values["datasets"]:
            values["datasets"].append(hub)
    languages = {source.get("language") for source in sources}
    if None not in languages:  # all are known
        values["language"] = sorted(languages)
    if len(values["base_model"]) == 1:
        [values["base_model"]] = values["base_model"]
    values["tags"] = ["nanochatgpt", "gpt2", "chat"]
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items() if value)


def _data(loader, n_rows):
    """Return what prepare/ noted in source.json about each data set, and a table of them with
    their epochs in n_rows rows of training."""
    sources = []
    rows = [("data", "licence", "share of a step", "epochs")]
    for folder, rows_of_corpus, share in loader.corpora():
        path = folder / "source.json"  # your own data has none
        note = read_json(path) if path.is_file() else {}
        source = {name: text for name, text in note.items() if isinstance(text, str)}
        sources.append(source)
        name = source.get("name", folder.name)
        if "url" in source:
            name = f"[{name}]({source['url']})"
        licence = source.get("licence", "not stated")
        rows.append([name, licence, f"{share:.1%}", f"{n_rows * share / rows_of_corpus:.3g}"])
    return sources, _table(rows)


def _recipe(config, init_from):
    """Return the knobs that differ from their defaults, as lines of a config file."""
    names = []  # of the data sets, without the folders they are in
    for part in config.dataset.split(","):
        name, colon, share = part.partition(":")
        names.append(Path(name.strip()).name + colon + share.strip())
    knobs = {"init_from": init_from, "dataset": ",".join(names)}
    for knob in dataclasses.fields(config):
        value = getattr(config, knob.name)
        if value != knob.default and knob.name not in (*knobs, *NOT_IN_RECIPE):
            knobs[knob.name] = value
    return "\n".join(f"{name} = {value!r}" for name, value in knobs.items())


def _table(rows):
    """Return a Markdown table; the first row is its head."""
    lines = []
    for row in rows:
        cells = [" ".join(str(cell).split()).replace("|", r"\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)
