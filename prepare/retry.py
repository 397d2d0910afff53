"""Replies that people kept or rejected, to learn a reward: python prepare/retry.py --source=PATH

PATH is a file of records: .jsonl, .json (a list) or .csv, also with .gz. A record is one of

    {"input_text" or "text": ..., "labels" or "label": 0 or 1}      1: the reply at its end was kept
    {"messages": [...], "label": 0 or 1}                            the same, as serve.py keeps it
    {"prompt": text or messages, "chosen": text, "rejected": text}  a pair
    {"messages": [...], "retried": [...]}                           what /save in chat.py writes
    DailyDialog++'s contexts with good and adversarial replies
    ConvAI2's wild chats with scores of utterances

--source=chitchat takes the rated conversations of chitchat. A shard has one conversation per reply,
supervised if the reply was kept, the chosen reply of a pair first. Equal contexts share a split.
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
from nanochatgpt.hub import hub_file
from nanochatgpt.tokenizer import Tokenizer
from prepare.chitchat_package import mean_ratings, packaged, read
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, output_folder, shard_writers
from prepare.json_stream import JsonStream
from prepare.messages import problem
from prepare.render import render_batch

# --negatives -> fields of a DailyDialog++ record
BAD_REPLIES = {
    "adversarial": ["adversarial_negative_responses"],
    "random": ["random_negative_responses"],
    "both": ["adversarial_negative_responses", "random_negative_responses"],
}


@dataclass
class Config(CorpusConfig):
    source: str = ""  # a file of records (see above), or chitchat
    hub: str = ""  # instead of source, a file on the Hugging Face hub: org/name/path/of/file.jsonl
    negatives: str = "adversarial"  # of DailyDialog++: adversarial, random (of other dialogs), both


def examples(record, negatives="adversarial"):
    """Return (key, [(text or messages, label)]) of a record; equal keys share a split.

    Raises ValueError if the record has no known form or its label is not 0 or 1.
    """
    if not isinstance(record, dict):
        raise ValueError(f"is not an object: {record!r:.40}")

    # a pair
    if {"prompt", "chosen", "rejected"} <= record.keys():
        context = record["prompt"]
        if isinstance(context, str):  # one message of the user
            context = [{"role": "user", "content": as_text(context, "prompt")}]
        texts = [as_text(record[name], name) for name in ("chosen", "rejected")]
        if reason := problem(context and [*context, reply(texts[0])]):
            raise ValueError(f"prompt: {reason}")
        # the pair differs in its last message only
        chosen, rejected = ([*context, reply(text)] for text in texts)
        return beginning(context), [(chosen, 1), (rejected, 0)]

    # a chat
    if "messages" in record:
        messages = record["messages"]
        if reason := problem(messages):
            raise ValueError(reason)
        if "label" not in record:
            return saved_chat(messages, record.get("retried", ()))  # written by /save
        if messages[-1]["role"] != "assistant":
            raise ValueError("messages do not end with the reply that has the label")
        return beginning(messages[:-1]), [(messages, as_label(record["label"]))]

    # DailyDialog++: good and bad replies in turn, so that two are a pair
    if "positive_responses" in record:
        texts = [as_text(text, "context") for text in record["context"]]
        # the bot speaks after the last text
        context = in_turn(texts, itertools.cycle((0, 1)), len(texts) % 2)
        # replies that do not fit the context
        bad = [text for name in BAD_REPLIES[negatives] for text in record[name]]
        labelled = []
        for pair in itertools.zip_longest(record["positive_responses"], bad):
            for text, label in zip(pair, (1, 0), strict=True):
                if text is not None:  # the shorter list has run out
                    labelled.append(([*context, reply(as_text(text, "a response"))], label))
        return beginning(context), labelled

    # ConvAI2: utterances, some with a score
    if "dialog" in record:
        texts = [as_text(utterance["text"], "text") for utterance in record["dialog"]]
        # without senders, the two take turns
        speakers = [utterance.get("sender", i % 2) for i, utterance in enumerate(record["dialog"])]
        labelled = []
        for i, utterance in enumerate(record["dialog"]):
            if utterance["evaluation_score"] is not None:
                context = in_turn(texts[:i], speakers, speakers[i])
                label = as_label(utterance["evaluation_score"])
                labelled.append(([*context, reply(texts[i])], label))
        return str(texts), labelled

    # a text with a label
    text = record.get("input_text", record.get("text", record.get("input_ids")))
    label = as_label(record.get("labels", record.get("label")))
    # the first line is the key, so texts with the same first line share a split
    return as_text(text, "text").strip().partition("\n")[0], [(text, label)]


def saved_chat(messages, retried):
    """Return what `examples` does for a chat. A reply was kept if the human went on, so the last
    one has no label."""
    persona = messages[: messages[0]["role"] == "system"]  # one system message or none
    turns = messages[len(persona) :]  # without the persona

    # a reply is kept if something follows it
    ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
    labelled = [(messages[:end], 1) for end in ends if end < len(messages)]  # kept

    # a retried reply is rejected
    for attempt in retried:
        before = attempt["before"]  # number of turns
        if type(before) is not int or not 0 < before <= len(turns):
            expected = f"is not from 1 to {len(turns)}"
            raise ValueError(f"before={before!r:.40} of a retried reply {expected}")
        rejected = [*persona, *turns[:before], reply(as_text(attempt["content"], "retried"))]
        if (rejected, 1) not in labelled:  # the same reply may have come again and been kept
            labelled.append((rejected, 0))
    return str(messages[: ends[0]]), labelled


def in_turn(texts, speakers, bot):
    """Return texts as messages; what one speaker says in a row is one turn."""
    messages = []
    for text, speaker in zip(texts, speakers, strict=False):
        # the speaker whose reply is rated is the bot
        role = "assistant" if speaker == bot else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f" {text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def reply(text):
    return {"role": "assistant", "content": text}


def beginning(messages):
    """Return the texts up to the first reply, which stay the same while a conversation grows."""
    first = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
    return str([message["content"] for message in first])


def as_text(value, name):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is not a text: {value!r:.40}")
    return value


def as_label(value):
    label = str(value).strip().lower()  # numbers, booleans and texts are all in use
    if label not in ("0", "0.0", "false", "1", "1.0", "true"):
        raise ValueError(f"label {value!r:.40} is not 0 or 1")
    return int(label in ("1", "1.0", "true"))


def records(path):
    """Yield (place, record) of a file. Raises ValueError that names the place of damage."""
    kind = Path(path.name.removesuffix(".gz")).suffix  # the suffix without .gz
    unit = "line" if kind == ".jsonl" else "record"  # for error messages
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            newline = "" if kind == ".csv" else None  # csv splits lines itself
            text = io.TextIOWrapper(file, "utf-8", "replace", newline=newline)

            # open the values of the file; a list counts as its values
            if kind == ".jsonl":
                values = (json.loads(line) if line.strip() else [] for line in text)
            elif kind == ".json":
                values = JsonStream(text).items()
            elif kind == ".csv":
                values = csv.DictReader(line.replace("\0", "") for line in text)
            else:
                raise ValueError("it is not .jsonl, .json or .csv")
            for number, value in enumerate(values, 1):
                # a blank line counts as an empty list
                for record in value if isinstance(value, list) else [value]:
                    yield f"{path}, {unit} {number:,}", record
    except (ValueError, RecursionError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after {unit} {number:,}: {error}") from error


def from_file(path, negatives):
    """Yield (key, [(text or messages, label)]). Raises ValueError that names a bad record."""
    seen = set()  # hashes of what saved chats had: it may be saved twice
    for place, record in records(path):
        try:
            key, labelled = examples(record, negatives)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {reason}") from error
        if "messages" in record:  # drop what was saved before
            labelled = [example for example in labelled if hash(str(example)) not in seen]
            seen.update(hash(str(example)) for example in labelled)
        if labelled:
            yield key, labelled


def from_chitchat():
    """Yield (key, [(messages, label)]): 1 if a conversation's mean rating is 6 of 10 or more, 0 if
    it is 4 or less."""
    ratings = mean_ratings()  # id -> 0 to 10
    for key, messages in read(packaged()):
        rating = ratings.get(key, 5)  # neither good nor bad
        if not 4 < rating < 6:
            if messages[-1]["role"] == "user":
                messages.pop()  # end with a reply
            yield key, [(messages, int(rating >= 6))]


def main(config):
    if config.negatives not in BAD_REPLIES:
        raise ValueError(f"negatives={config.negatives} is not one of {', '.join(BAD_REPLIES)}")
    if config.hub:
        if config.hub.count("/") < 2:
            raise ValueError(f"hub={config.hub} is not org/name/FILE")
        org, name, file = config.hub.split("/", 2)  # the file's path may contain slashes
        replies = from_file(hub_file(f"{org}/{name}", file, kind="datasets"), config.negatives)
    elif config.source == "chitchat":
        replies = from_chitchat()
    elif config.source:
        replies = from_file(existing(config.source), config.negatives)
    else:
        raise ValueError("--source=PATH or --hub=org/name/FILE is needed: replies with labels")
    prepare(config, divide(replies))


def prepare(config, replies):
    """Write (split, [(text or messages, label)]) to two shards and print a report."""
    tokenizer = Tokenizer(config.template)
    counts = {"train": [0, 0], "val": [0, 0]}  # replies with label 0, with label 1
    with output_folder(config, "retry") as folder, shard_writers(folder, tokenizer) as writers:
        # 1,000 conversations at a time, so that memory does not grow with the file
        while batch := list(itertools.islice(replies, 1000)):
            for split, writer in writers.items():
                # all replies of the split in this batch
                labelled = [pair for s, group in batch if s == split for pair in group]
                writer.write(render_replies(tokenizer, labelled))
                for _, label in labelled:
                    counts[split][label] += 1

        # a reward model learns from both labels, in both splits
        for split, (bad, good) in counts.items():
            if not (bad and good):
                shard = f"{split}.bin would have {good:,} kept replies and {bad:,} rejected ones"
                remedy = "more conversations with different beginnings are needed"
                raise ValueError(f"{shard}, and needs both: {remedy}")
    for split, (bad, good) in counts.items():
        n = bad + good
        n_tokens = writers[split].n_tokens  # of the finished shard
        print(f"{folder / split}.bin: {n:,} replies, {n_tokens:,} tokens, {good / n:.1%} kept")


def render_replies(tokenizer, labelled):
    """Return [(ids, mask)] of [(text or messages, label)]. The mask is 1 on the last reply and its
    end, or on a whole text, if the label is 1."""
    # render all chats in one batch, then put them back in order
    chats = [content for content, _ in labelled if not isinstance(content, str)]
    rendered = iter(render_batch(tokenizer, chats))
    pairs = []
    for content, label in labelled:
        if isinstance(content, str):
            ids = np.array(tokenizer.encode(content), np.uint16)  # (n,)
            start = 0  # of what may be supervised
        else:
            ids, mask = next(rendered)
            start = np.flatnonzero(mask == 0)[-1] + 1  # after the opener of the last reply
        supervised = np.zeros(len(ids), np.uint8)
        supervised[start:] = label  # a rejected reply is not supervised at all
        pairs.append((ids, supervised))
    return pairs


if __name__ == "__main__":
    run(main, Config)
