"""Replies that people kept and replies that they did not, to learn a reward from: python prepare/retry.py --source=PATH

PATH is a file of records: .jsonl, .json (a list) or .csv, each also .gz. A record is one of

    {"input_text" or "text": ..., "labels" or "label": 0 or 1}      1: the reply at its end was kept, 0: retried
    {"messages": [...], "label": 0 or 1}                            the same of a conversation, as serve.py keeps thumbs
    {"prompt": text or messages, "chosen": text, "rejected": text}  a pair
    {"messages": [...], "retried": [...]}                           what /save in chat.py writes; a reply was kept if
                                                                    the human went on, so nobody knows of the last one
    DailyDialog++'s contexts with good and adversarial replies, ConvAI2's wild chats with a score for each utterance

or it is chitchat, whose conversations have ratings: --source=chitchat. The shards are like all others: a conversation
a reply, supervised where it was kept. Of a pair the reply that was chosen comes first. Equal contexts stay together.
"""

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from nanochatgpt.configurator import run
from nanochatgpt.files import hub_file
from nanochatgpt.tokenizer import Tokenizer
from prepare import chitchat
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import JsonStream, divide, existing, writing
from prepare.jsonl import problem
from prepare.render import render_batch

TEXTS, LABELS = (
    ("input_text", "text", "input_ids"),
    ("labels", "label"),
)  # names of columns, the first one counts
BAD_REPLIES = {
    "adversarial": ["adversarial_negative_responses"],
    "random": ["random_negative_responses"],
}
BAD_REPLIES["both"] = BAD_REPLIES["adversarial"] + BAD_REPLIES["random"]


@dataclass
class Config(CorpusConfig):
    source: str = ""  # a file of records (see above), or chitchat
    hub: str = (
        ""  # in its place a dataset's file on the Hugging Face hub: org/name/path/of/the/file.jsonl
    )
    negatives: str = (
        "adversarial"  # of DailyDialog++: adversarial, random (replies of other dialogs) or both
    )


def as_label(value):
    """Return 0 or 1. Raises ValueError for anything else."""
    labels = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
    if (label := labels.get(str(value).strip().lower())) is None:
        raise ValueError(f"label {value!r:.40} is not 0 or 1")
    return label


def as_text(value, name):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is no text: {value!r:.40}")
    return value


def turns(texts):
    """Return texts as messages in turn; the next one is the assistant's."""
    return [
        {"role": ("user", "assistant")[(len(texts) - i - 1) % 2], "content": text}
        for i, text in enumerate(texts)
    ]


def spoken(utterances, reply):
    """Return utterances of ConvAI2 as messages; whoever says the `reply` is the assistant. One who says several things
    in a row has one turn."""
    if "sender" not in reply:
        return turns([utterance["text"] for utterance in utterances])
    messages = []
    for utterance in utterances:
        role = "assistant" if utterance["sender"] == reply["sender"] else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f" {utterance['text']}"
        else:
            messages.append({"role": role, "content": utterance["text"]})
    return messages


def said(text):
    return {"role": "assistant", "content": text}


def examples(record, negatives="adversarial"):
    """Return (key, [(text or messages, label)]) of a record, the key that of its conversation.

    Raises ValueError where a record is of no known form or its label is not 0 or 1.
    """
    if not isinstance(record, dict):
        raise ValueError(f"is no object: {record!r:.40}")
    if {"prompt", "chosen", "rejected"} <= record.keys():
        context = record["prompt"]
        if isinstance(context, str):
            context = turns([as_text(context, "prompt")])
        pair = [as_text(record[name], name) for name in ("chosen", "rejected")]
        if what := problem([*context, said(pair[0])] if isinstance(context, list) else context):
            raise ValueError(f"prompt: {what}")
        return beginning(context), [([*context, said(text)], 1 - i) for i, text in enumerate(pair)]
    if "messages" in record:
        messages = record["messages"]
        if what := problem(messages):
            raise ValueError(what)
        if "label" in record:
            if messages[-1]["role"] != "assistant":
                raise ValueError("messages do not end in the reply that has the label")
            return beginning(messages[:-1]), [(messages, as_label(record["label"]))]
        of = [
            (messages[: i + 1], 1) for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"
        ]
        kept = [content for content, _ in of]
        persona = [m for m in messages if m["role"] == "system"]
        said_before = [m for m in messages if m["role"] != "system"]
        for retried in record.get("retried", ()):
            before = retried["before"]
            if type(before) is not int or not 0 < before <= len(said_before):
                raise ValueError(
                    f"before={before!r:.40} of a retried reply is not from 1 to {len(said_before)}"
                )
            again = [*persona, *said_before[:before], said(as_text(retried["content"], "retried"))]
            if again not in kept:  # the same words came again, and were kept then
                of.append((again, 0))
        return str(
            messages[
                : next((i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"), None)
            ]
        ), of
    if "positive_responses" in record:
        if not isinstance(record["context"], list):
            raise ValueError(f"context is no list: {record['context']!r:.40}")
        context = turns([as_text(text, "context") for text in record["context"]])
        good = [as_text(text, "positive_responses") for text in record["positive_responses"]]
        bad = [as_text(text, name) for name in BAD_REPLIES[negatives] for text in record[name]]
        # in turn, so that as many of one as of the other are pairs
        of = [
            (text, label)
            for pair in itertools.zip_longest(good, bad)
            for text, label in zip(pair, (1, 0), strict=True)
        ]
        return beginning(context), [
            ([*context, said(text)], label) for text, label in of if text is not None
        ]
    if "dialog" in record:
        utterances = record["dialog"]
        texts = [as_text(utterance["text"], "text") for utterance in utterances]
        of = [
            ([*spoken(utterances[:i], utterances[i]), said(utterances[i]["text"])], as_label(score))
            for i, score in enumerate(utterance["evaluation_score"] for utterance in utterances)
            if score is not None
        ]
        return str(texts), of
    text, label = (
        next((record[name] for name in names if name in record), None) for names in (TEXTS, LABELS)
    )
    if text is None or label is None:
        missing = " nor ".join(TEXTS if text is None else LABELS)
        raise ValueError(
            f"has neither {missing}, nor is it a pair, a chat or one of the other forms"
        )
    text = as_text(text, "text")
    return text.strip().partition("\n")[0], [(text, as_label(label))]


def beginning(messages):
    """Return what a conversation begins with, up to the first reply: it stays the same while it grows."""
    return str(
        [m["content"] for m in itertools.takewhile(lambda m: m["role"] != "assistant", messages)]
    )


def records(path):
    """Yield (what it is called, record) of a file. Raises ValueError naming the place that cannot be read."""
    kind, number = Path(path.name.removesuffix(".gz")).suffix, 0
    what = "line" if kind == ".jsonl" else "record"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            text = io.TextIOWrapper(
                file, "utf-8", "replace", newline="" if kind == ".csv" else None
            )
            if kind == ".jsonl":
                found = (json.loads(line) if line.strip() else None for line in text)
            elif kind == ".json":
                found = flat(JsonStream(text).items())
            elif kind == ".csv":
                found = csv.DictReader(line.replace("\0", "") for line in text)  # csv knows no NUL
            else:
                raise ValueError("it is not .jsonl, .json or .csv")
            for number, record in enumerate(found, 1):
                if record is not None:
                    yield f"{what} {number:,}", record
    except (ValueError, RecursionError, csv.Error, EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        raise ValueError(f"{path}, behind {what} {number:,}: {error}") from error


def flat(values):
    """Yield the values of a list, and those of lists in it."""
    for value in values:
        yield from value if isinstance(value, list) else [value]


def from_file(path, negatives):
    """Yield (key, [(text or messages, label)]). Raises ValueError with the place of a record that is not right."""
    saved = set()  # replies of chats: one that is saved twice counts once
    for where, record in records(path):
        try:
            key, of = examples(record, negatives)
        except (ValueError, KeyError, TypeError) as error:
            reason = {KeyError: f"there is no {error}", TypeError: "is of no known form"}.get(
                type(error), error
            )
            raise ValueError(f"{path}, {where}: {reason}") from error
        if "messages" in record:
            of = [reply for reply in of if hash(str(reply)) not in saved]
            saved |= {hash(str(reply)) for reply in of}
        if of:
            yield key, of


def from_chitchat():
    """Yield (key, [(messages, label)]) of chitchat: 1 where a conversation was rated 6 or more of 10 on average, 0
    where it was 4 or less; each from both sides."""
    path = chitchat.packaged()
    ratings = {
        key: talk.get("ratings")
        for key, talk in json.loads(path.read_text(encoding="utf-8")).items()
    }
    for key, messages in chitchat.read(path):
        if not (rating := ratings[key]):
            continue
        mean = sum(rating.values()) / len(rating)
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        if not 4 < mean < 6:
            yield key, [(messages[: last + 1], int(mean >= 6))]


def main(config):
    if config.negatives not in BAD_REPLIES:
        raise ValueError(f"negatives={config.negatives} is not one of {', '.join(BAD_REPLIES)}")
    if config.hub:
        if config.hub.count("/") < 2:
            raise ValueError(f"hub={config.hub} is not org/name/FILE")
        org, name, file = config.hub.split("/", 2)
        found = from_file(hub_file(f"{org}/{name}", file, kind="datasets"), config.negatives)
    elif config.source == "chitchat":
        found = from_chitchat()
    elif config.source:
        found = from_file(existing(config.source), config.negatives)
    else:
        raise ValueError(
            "--source=PATH is needed, or --hub=org/name/FILE: replies with labels, or pairs"
        )
    prepare(config, divide(found))


def prepare(config, found):
    """Write (split, [(text or messages, label)]) into a shard for each split, and print how many of them were kept."""
    tokenizer = Tokenizer(config.template)
    folder = Path(config.out_dir or "data/retry")
    counts = {"train": [0, 0], "val": [0, 0]}  # of label 0, of label 1
    with writing(folder, tokenizer) as writers:
        while batch := list(itertools.islice(found, 1000)):
            for split, writer in writers.items():
                replies = [reply for which, of in batch if which == split for reply in of]
                writer.write(tokenized(tokenizer, replies))
                for _, label in replies:
                    counts[split][label] += 1
        for split, (bad, good) in counts.items():
            if not (bad and good):
                counted = f"{split}.bin would have {good:,} replies that were kept and {bad:,} that were not"
                if not any(map(sum, counts.values())):
                    counted = "there is no reply of which it is known whether it was kept"
                elif not good + bad:
                    counted += ", since what begins with the same message stays in one of the two, and here all does"
                raise ValueError(f"{counted}: more conversations are needed, with both")
    for split, (bad, good) in counts.items():
        n_tokens = writers[split].n_tokens
        share = good / (good + bad)
        print(
            f"{folder / split}.bin: {good + bad:,} replies, {n_tokens:,} tokens, {share:.1%} of them were kept"
        )


def tokenized(tokenizer, replies):
    """Return [(ids, mask)] of [(text or messages, label)]; the mask is 1 on the last reply and its end, or on a whole
    text, of what was kept, else 0."""
    rendered = iter(
        render_batch(tokenizer, [content for content, _ in replies if not isinstance(content, str)])
    )
    pairs = []
    for content, label in replies:
        if isinstance(content, str):
            ids = np.array(tokenizer.encode(content), np.uint16)
            start = 0
        else:
            ids, mask = next(rendered)
            start = np.flatnonzero(mask == 0)[-1] + 1  # behind the opener of the last reply
        pairs.append(
            (ids, (np.arange(len(ids)) >= (start if label else len(ids))).astype(np.uint8))
        )
    return pairs


if __name__ == "__main__":
    run(main, Config)
