"""Read files of records, one record in memory at a time, and check the conversations in them."""

import csv
import gzip
import io
import itertools
import json
import zlib
from pathlib import Path

import ijson

from nanochatgpt.hub import hub_file
from prepare.corpus import divide, existing

DAMAGE = (ijson.JSONError, csv.Error, gzip.BadGzipFile, zlib.error, EOFError, RecursionError)


def find_file(source, repo, name, size=None, sha256=None):
    """Return the path of a corpus's file: `source`, in the folder `source`, or downloaded from
    `repo` on the Hugging Face hub if source is ""."""
    if not source:
        return hub_file(repo, name, size, sha256, kind="datasets")
    path = existing(source)
    return existing(path / Path(name).name) if path.is_dir() else path


def published(source, repo, files, read):
    """Yield (split, example) of a corpus; read(path) yields (key, example). files: {split: (name in
    `repo`, size, sha256)}. If source is a file, it is divided by key."""
    if Path(source).is_file():
        yield from divide(read(Path(source)))
        return
    for split, file in files.items():
        for _, example in read(find_file(source, repo, *file)):
            yield split, example


def read_records(path, parse, list_name=""):
    """Yield parse(record) for each record of a file, also gzipped: a .csv with column names, a JSON
    list, or one JSON object per line. list_name: read this list of a JSON object instead.
    Records for which `parse` returns None are left out and counted. Raises ValueError that names
    the first record that is damaged or that `parse` cannot use."""
    number = 1  # of the current record
    n_left_out = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            # choose the reader
            if path.name.removesuffix(".gz").endswith(".csv"):
                text = io.TextIOWrapper(file, "utf-8", "replace", newline="")
                records = csv.DictReader(text, restval="")  # of a short row
            elif list_name:
                records = ijson.items(file, f"{list_name}.item", use_float=True)
            elif file.peek(1).lstrip()[:1] == b"[":
                records = ijson.items(file, "item", use_float=True)
            else:
                records = (json.loads(line) for line in file if line.strip())  # one per line
            for record in records:  # one in memory at a time
                if not isinstance(record, dict):
                    raise ValueError(f"it is not an object: {record!r:.40}")
                example = parse(record)
                if example is None:
                    n_left_out += 1
                else:
                    yield example
                number += 1
            if n_left_out:
                print(f"{path}: {n_left_out:,} of {number - 1:,} records left out")
    except (*DAMAGE, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.partition("\n")[0]  # ijson draws a picture below it
        place = f"record {number:,} of {list_name}" if list_name else f"record {number:,}"
        raise ValueError(f"{path}, {place}: {reason}") from error


def check_messages(messages):
    """Return messages. Raises ValueError if they are no conversation a model can learn from."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('not {"messages": [...]} with one message or more')
    # each message by itself; messages count from 1 in the report
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} is not {{'role': ..., 'content': text}}")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number} has role {role!r}, not system, user or assistant")
        if role == "system" and number > 1:  # the persona opens the conversation
            raise ValueError(f"message {number} is a system message, which can only come first")
    # training supervises the assistant's messages only
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn")
    return messages


def merge_turns(utterances, bot):
    """Return (speaker, text) pairs as messages; what one side says in a row is one message. `bot`
    is the speaker who is the assistant."""
    messages = []
    for is_bot, group in itertools.groupby(utterances, key=lambda pair: pair[0] == bot):
        content = " ".join(text for _, text in group)
        messages.append({"role": "assistant" if is_bot else "user", "content": content})
    return messages
