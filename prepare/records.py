"""Read files of records, one record in memory at a time, and check the conversations in them."""

import codecs
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

FOREIGN = {  # first bytes -> what to do about it
    codecs.BOM_UTF16_LE: "it is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "it is UTF-16: save it as UTF-8",
    b"PAR1": "it is Parquet: write it as JSON Lines, with to_json of pandas or datasets",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it with `zstd -d`",
    b"PK\x03\x04": "it is a zip file: unpack it",
}
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


def open_bytes(path):
    """Return a file of UTF-8 text, maybe gzipped, opened for bytes, without a byte-order mark.
    Raises ValueError that names what else it is."""
    file = open(path, "rb")  # noqa: SIM115
    if file.peek(4)[:2] == b"\x1f\x8b":
        file = gzip.open(file)  # noqa: SIM115
    head = file.peek(4)[:4]
    for magic, problem in FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(problem)
    if head.startswith(codecs.BOM_UTF8):
        file.read(3)
    return file


def read_records(path, parse, list_name=""):
    """Yield parse(record) for each record of a file, also gzipped: a .csv with column names, a JSON
    list, or one JSON object per line. list_name: read this list of a JSON object instead.
    Records for which `parse` returns None are left out and counted. Raises ValueError that names
    the first record that is damaged or that `parse` cannot use."""
    number = 1  # of the current record or line
    unit = "record"
    n_records = 0
    n_left_out = 0
    try:
        with open_bytes(path) as file:
            # choose the reader
            if path.name.lower().removesuffix(".gz").endswith(".csv"):
                text = io.TextIOWrapper(file, "utf-8", newline="")
                records = csv.DictReader(text, restval="")  # of a short row
            elif list_name:
                records = ijson.items(file, f"{list_name}.item", use_float=True)
            elif file.peek(1).lstrip()[:1] == b"[":
                records = ijson.items(file, "item", use_float=True)
            else:
                unit = "line"
                records = (json.loads(line) if line.strip() else "" for line in file)
            for record in records:  # one in memory at a time
                if record == "" and unit == "line":  # a blank one
                    number += 1
                    continue
                if not isinstance(record, dict):
                    raise ValueError(f"it is not an object: {record!r:.40}")
                example = parse(record)
                n_records += 1
                if example is None:
                    n_left_out += 1
                else:
                    yield example
                number += 1
            if n_left_out:
                print(f"{path}: {n_left_out:,} of {n_records:,} records left out")
    except (*DAMAGE, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.partition("\n")[0]  # ijson draws a picture below it
        place = f"{unit} {number:,}" + (f" of {list_name}" if list_name else "")
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
