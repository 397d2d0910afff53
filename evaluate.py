"""
Measure what a model says, beside another: python evaluate.py --init_from=out/chat --base=gpt2 --dataset=personachat

Over the supervised tokens of the validation shards: how well it predicts them. Of its replies to the people there: how
near they are to what was said, how much they repeat, whether they end and keep to their own turn. And without a corpus:
whether it remembers what it was told, with names, facts and sentences that prepare/recall.py does not train on.
"""

import json
import math
import random
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF

from checkpoint import default_model, keep_freed_memory, load_model, pick_device, pick_dtype, replacing
from configurator import run
from generate import generate
from sampling import ChatSampling, Sampling
from shards import Loader, find_shards
from tokenizer import END_OF_TEXT

sys.path.append(str(Path(__file__).with_name("prepare")))
from recall import Speaker, probe

PROBES = {"recall_1": 1, "recall_3": 3, "recall_6": 6, "persona": 0}  # -> exchanges since the fact was told
METRICS = {"bleu": BLEU(force=True), "chrf": CHRF()}  # force: without a warning that PersonaChat is tokenized
SAMPLING = [field.name for field in fields(Sampling)]
ROWS = 256  # of logits at once: 50 MB in float32
REPLIES = 64  # that are generated at once, between two looks at the clock


@dataclass
class Config(ChatSampling):
    max_new_tokens: int = 100
    init_from: str = default_model()  # the model: nano, a directory, gpt2[-medium|-large|-xl], distilgpt2, org/name
    base: str = ""  # a second one, to stand beside it
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with val*.bin: a,b; empty: only what needs no corpus
    max_conversations: int = 0  # look at so many of each shard, the first ones; 0: all
    batch_size: int = 8  # rows at once
    replies: int = 200  # generate so many
    probes: int = 100  # ask for so many facts of each kind
    json: str = ""  # write the figures to this file too
    seed: int = 1337  # of the replies and the probes
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto is float16 on an x86 CPU, bfloat16 on CUDA


# 1. what the model makes of what people said


@torch.no_grad()
def predict(model, loader, device):
    """Return {loss, perplexity, token_accuracy, reward, penalty} over all supervised tokens of a Loader.

    loss: mean cross-entropy in nats; perplexity: its exponential. token_accuracy: the share of tokens that are the
    likeliest ones, which Locutusque's gpt2-conversational-or-qa calls reward ("correct words"). penalty: the share of
    likeliest tokens that are the likeliest one a position before too, within a reply ("words repeated one after the
    other"). 16-bit weights give figures of their own: take dtype=float32 to compare with other programs.
    """
    n = n_pairs = 0
    sums = torch.zeros(3, dtype=torch.float64)  # loss, right, repeated
    n_batches = -(-loader.n_rows // loader.batch_size)
    with progress("predicting", n_batches) as shown:
        for number in range(n_batches):
            x, y, documents = loader.batch(number)
            rows = min(loader.batch_size, loader.n_rows - number * loader.batch_size)
            y[rows:] = -100  # of the next epoch
            at = (y.flatten() != -100).nonzero()[:, 0]  # (N,)
            if not len(at):
                continue
            hidden = model.hidden(x.to(device), documents=documents.to(device))
            hidden, targets = hidden.flatten(0, 1)[at.to(device)], y.flatten()[at].to(device)  # (N, C), (N,)
            likeliest = []
            for h, target in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
                logits = model.lm_head(h).float()  # (rows, V)
                likeliest.append(logits.argmax(-1))
                chosen = logits.gather(1, target[:, None])[:, 0]
                sums[0] += (logits.logsumexp(-1) - chosen).sum().item()
            likeliest = torch.cat(likeliest)
            document = torch.searchsorted(documents, at.int(), right=True)
            follows = (at.diff() == 1) & (document.diff() == 0)  # (N - 1,): the one before is of the same reply
            sums[1] += (likeliest == targets).sum().item()
            sums[2] += (likeliest.diff() == 0)[follows.to(device)].sum().item()
            n, n_pairs = n + len(at), n_pairs + follows.sum().item()
            shown(number + 1)
    loss, right = (sums[:2] / n).tolist()
    figures = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": right, "reward": right}
    return figures | {"penalty": sums[2].item() / max(1, n_pairs)}


# 2. what the model says itself


def openings(shards, tokenizer, n, room, seed):
    """Return ([ids of a prompt, at most `room`], [what a person replied there]), at most `n` of them: each a turn of
    another conversation, both drawn by the seed."""
    draw = random.Random(seed)
    shards = [shard for shard in shards if shard.template]  # text without turns has no replies
    first = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])  # the number of each shard's first one
    prompts, replies = [], []
    for number in np.random.default_rng(seed).permutation(first[-1]):
        if len(prompts) == n:
            break
        which = np.searchsorted(first, number, side="right") - 1
        shard, i = shards[which], number - first[which]
        start, stop = shard.offsets[i : i + 2].tolist()
        stop = min(stop, start + 4 * room)  # a conversation may be a book
        ids, mask = shard.tokens[start:stop].tolist(), shard.mask(start, stop).tolist()
        begins = [at for at in range(1, min(len(ids), room + 1)) if mask[at] and not mask[at - 1]]
        spans = [(at, ids.index(tokenizer.eos_id, at)) for at in begins if tokenizer.eos_id in ids[at:]]
        if spans:
            at, end = draw.choice(spans)
            prompts.append(ids[:at])
            replies.append(tokenizer.decode(ids[at:end]).strip())
    return prompts, replies


def reply(model, tokenizer, prompts, sampling, seed, what):
    """Return a Reply to each prompt; prompt i has the seed `seed` + i."""
    replies = []
    with progress(what, len(prompts)) as shown:
        for first in range(0, len(prompts), REPLIES):
            these = prompts[first : first + REPLIES]
            # only its end stops a reply: whether it would go on to speak for the human is to be seen
            options = sampling | {"seed": seed + first, "stop_ids": (tokenizer.eos_id, END_OF_TEXT)}
            for ids in generate(model, these, tokenizer=tokenizer, **options):
                text = tokenizer.decode(ids)
                openers = [at for opener in tokenizer.stop_strings if (at := text.find(opener)) >= 0]
                ended = len(ids) < sampling["max_new_tokens"]
                replies.append(Reply(text[: min(openers, default=None)].strip(), ended, bool(openers)))
            shown(len(replies))
    return replies


@dataclass
class Reply:
    text: str  # up to where another turn would begin
    ended: bool  # by itself, before max_new_tokens
    spoke_on: bool  # wrote the opener of another turn


def words(text):
    """Return the words and punctuation marks of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text, n):
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def manner(texts, tokenizer):
    """Return how varied replies are and how long, in tokens: {distinct_1, distinct_2, repeated_4grams, mean_length}."""
    figures = {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}
    mean_length = sum(len(tokenizer.encode(text)) for text in texts) / len(texts)
    return figures | {"repeated_4grams": repeated_4grams(texts), "mean_length": mean_length}


def distinct(texts, n):
    """Return the share of different n-grams among all (Li et al. 2016, arXiv 1510.03055); of words."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repeated_4grams(texts):
    """Return the share of 4-grams of words that came before in the same text."""
    grams = [ngrams(text, 4) for text in texts]
    return sum(len(g) - len(set(g)) for g in grams) / max(1, sum(map(len, grams)))


def likeness(texts, references):
    """Return {bleu, chrf} of a corpus by sacrebleu, each from 0 to 1."""
    return {name: metric.corpus_score(texts, [references]).score / 100 for name, metric in METRICS.items()}


# 3. what the model remembers


def remembers(text, value):
    """Return whether a reply names the value that was asked for: as whole words, in any case."""
    return f" {' '.join(words(value))} " in f" {' '.join(words(text))} "


# 4. one model, or two side by side

ROWS_OF_TABLE = {
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


class Material:
    """What models are measured by, the same for all of them: conversations of people, and probes."""

    def __init__(self, config, tokenizer, context):
        """context: of the model that has the least. Raises ValueError where it is too short for what is asked for."""
        room = context - config.max_new_tokens
        self.probes = {}  # name -> ([ids of a prompt], [the value to be remembered])
        for name, k in PROBES.items():
            speaker = Speaker("val", config.seed)
            asked = [probe(speaker, k) for _ in range(config.probes)]
            prompts = [tokenizer.render(messages, add_generation_prompt=True)[0] for messages, _ in asked]
            if prompts and (longest := max(map(len, prompts))) > room:
                short = f"max_new_tokens={config.max_new_tokens} and a probe of {longest} tokens are beyond the context"
                raise ValueError(f"{short}, {context}: lower the one, or leave the other out by --probes=0")
            self.probes[name] = prompts, [value for _, value in asked]
        self.loader, self.prompts, self.references = None, [], []
        if config.dataset:
            shards = [(path, 1.0) for path, _ in find_shards(config.data_dir, config.dataset, "val")]
            batch = (config.batch_size, context, config.seed, tokenizer)
            self.loader = Loader(shards, *batch, max_conversations=config.max_conversations)
            shards = [part.shard for part in self.loader.parts]
            self.prompts, self.references = openings(shards, tokenizer, config.replies, room, config.seed)
            if config.replies and not self.prompts and any(shard.template for shard in shards):
                short = f"no reply in {config.dataset} has max_new_tokens={config.max_new_tokens} left of {context}"
                raise ValueError(f"{short} tokens: lower it, or ask for none by --replies=0")


def evaluate(config, model, tokenizer, material):
    """Return {name: figure} of a model, for each name in ROWS_OF_TABLE, None where nothing was asked for.

    `ended` and `speaks_for_human` are of all replies, those to the probes too; the latter counts the openers of other
    turns, the human's or another of its own.
    """
    figures, said = dict.fromkeys(ROWS_OF_TABLE), []
    sampling = {name: getattr(config, name) for name in SAMPLING}
    if material.loader:
        figures |= predict(model, material.loader, model.transformer.wpe.weight.device)
    if material.prompts:
        said = reply(model, tokenizer, material.prompts, sampling, config.seed, "replying")
        texts = [r.text for r in said]
        figures |= likeness(texts, material.references) | manner(texts, tokenizer)
    for name, (prompts, values) in material.probes.items():
        if prompts:
            answers = reply(model, tokenizer, prompts, sampling, config.seed, name)
            right = [remembers(answer.text, value) for answer, value in zip(answers, values, strict=True)]
            figures[name] = sum(right) / len(right)
            said += answers
    if said:
        figures["ended"] = sum(r.ended for r in said) / len(said)
        figures["speaks_for_human"] = sum(r.spoke_on for r in said) / len(said)
    return figures


@contextmanager
def progress(what, total):
    """Yield shown(done): on a terminal, how much of `total` is done and how long the rest will take."""
    start, terminal = time.perf_counter(), sys.stderr.isatty()

    def shown(done):
        if terminal:
            left = (time.perf_counter() - start) * (total / done - 1)
            print(f"\r\033[K{what}: {done:,} of {total:,}, {left:.0f} s left", end="", file=sys.stderr, flush=True)

    try:
        yield shown
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(config):
    for name, least in (
        ("max_conversations", 0),
        ("replies", 0),
        ("probes", 0),
        ("batch_size", 1),
        ("max_new_tokens", 1),
    ):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} is too small")
    names = [config.base] * bool(config.base) + [config.init_from]
    if len(set(names)) < len(names):
        raise ValueError(f"base={config.base} is the model itself")
    for name in names:
        if Path(name).is_dir() and not any((Path(name) / file).exists() for file in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(f"{name} has no tokenizer.json: figures would be of tokens that nobody knows")
    if not Path(config.json or ".").parent.is_dir():
        raise FileNotFoundError(f"json={config.json}: there is no such folder")
    if config.dataset:
        find_shards(config.data_dir, config.dataset, "val")  # before models are fetched
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    if device == "cpu":
        keep_freed_memory()
    models = {name: load_model(name, device, dtype, inference=True) for name in names}
    for name, (model, tokenizer) in models.items():
        if tokenizer.n_vocab > (n := model.config.vocab_size):
            raise ValueError(f"{name} knows {n} tokens, its tokenizer makes {tokenizer.n_vocab}: another vocabulary")
    if len({tokenizer.template for _, tokenizer in models.values()}) > 1:
        which = " and ".join(f"{name} {tokenizer.n_vocab} tokens" for name, (_, tokenizer) in models.items())
        raise ValueError(f"the two have different vocabularies, {which}: evaluate each by itself, on shards of its own")
    tokenizer = models[config.init_from][1]
    material = Material(config, tokenizer, min(model.config.block_size for model, _ in models.values()))
    if material.loader and (lost := material.loader.n_lost):
        print(f"{lost:,} tokens are left out, of exchanges beyond the context")
    figures = {name: evaluate(config, *models[name], material) for name in names}
    people = {"people": manner(material.references, tokenizer)} if material.references else {}
    print(table(figures | people))
    if people:
        print("\n".join(f"sacrebleu's {name}: {metric.get_signature()}" for name, metric in METRICS.items()))
    if config.json:
        with replacing(Path(config.json)) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n")


def table(figures):
    """Return {name: figures} as text: a row for each figure that there is, a column for each name."""
    lines = [" " * 46 + "".join(f"{name:>{max(len(name) + 2, 10)}}" for name in figures)]
    for key, (label, form) in ROWS_OF_TABLE.items():
        cells = [(row.get(key), max(len(name) + 2, 10)) for name, row in figures.items()]
        if any(value is not None for value, _ in cells):
            cells = (" " * width if value is None else f"{value:>{width}{form}}" for value, width in cells)
            lines.append(f"{label:46}{''.join(cells)}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Config)
