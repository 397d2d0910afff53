"""Conversations in three columns, System, User and Assistant: python prepare/columned_chat.py [--source=PATH]

Without --source, Locutusque's ColumnedChatCombined is downloaded (2.66 GB), from which gpt2-conversational-or-qa was
made. --source takes its formatted_data.json, {"train": [...], "validation": [...]}, or the folder; it is read piece
by piece. Where it has no validation list, or was cut before it, the other one is divided 95 to 5.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from nanochatgpt.files import hub_file
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import JsonStream, divide, existing, prepare

FILE = "formatted_data.json"
SPLITS = {"train": "train", "validation": "val"}
COLUMNS = {"System": "system", "User": "user", "Assistant": "assistant"}  # -> role


@dataclass
class Config(CorpusConfig):
    template: str = "user_assistant"
    max_examples: int = (
        0  # take so many of each split, the first ones; 0: all. The model was made from 245,000
    )
    english: bool = False  # leave out what is not English, by py3langid
    skip_bad: bool = False  # go on behind what cannot be read


def conversation(record):
    """Return the messages of a record; none where the question or the answer is blank. Raises ValueError for one that
    has no such columns."""
    if not isinstance(record, dict):
        raise ValueError(f"is no object: {str(record)[:40]!r}")
    texts = {role: record.get(column) for column, role in COLUMNS.items()}
    if texts["system"] is None:
        texts["system"] = ""
    for column, role in COLUMNS.items():
        if not isinstance(texts[role], str):
            raise ValueError(
                f"has {f'{texts[role]!r:.40} as' if column in record else 'no'} {column}"
            )
    texts = {role: text.strip() for role, text in texts.items()}
    if not (texts["user"] and texts["assistant"]):
        return []
    return [{"role": role, "content": text} for role, text in texts.items() if text]


def records(path, bad, skip_bad):
    """Yield (train or validation, number, record) of a file.

    What cannot be read goes to bad(where, error); with skip_bad, the rest is read then as far as there is one.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        stream, list_name, number = JsonStream(file), "the file", 0

        def skip(error):
            nonlocal number
            number += 1
            bad(f"record {number:,} of {list_name}", error)

        try:
            stream.expect("{")
            while True:
                list_name, number = stream.value(), 0
                stream.expect(":")
                if not isinstance(list_name, str) or list_name not in SPLITS:
                    raise ValueError("it is neither train nor validation")
                for record in stream.items(skip if skip_bad else None, SPLITS):
                    number += 1
                    yield list_name, number, record
                if stream.expect(",", "}") == "}":
                    break
        except (ValueError, RecursionError) as error:
            bad(f"record {number + 1:,} of {str(list_name)[:40]}", error)


def has_validation(path):
    """Return whether a file has a list of that name: within a text its quotes would be escaped."""
    with open(path, "rb") as file:
        before = b""
        while chunk := file.read(1 << 24):
            if re.search(rb'"validation"\s*:', before + chunk):
                return True
            before = chunk[-64:]
    return False


def conversations(config, path, counts):
    """Yield (train or validation, messages), and count in `counts` what is left out, by its reason."""

    def bad(where, error):
        """Count it, and show the first five. Raises ValueError unless it may be skipped."""
        if not config.skip_bad:
            raise ValueError(
                f"{path}, {where}: {error}\n--skip_bad=true goes on behind it"
            ) from None
        counts["bad"] += 1
        if counts["bad"] <= 5:
            print(f"{path}, {where}: {error}", file=sys.stderr)

    in_english = classifier() if config.english else None
    taken = dict.fromkeys(SPLITS, 0)
    for list_name, number, record in records(path, bad, config.skip_bad):
        if taken[list_name] == config.max_examples > 0:
            if min(taken.values()) == config.max_examples:
                return
            continue
        try:
            messages = conversation(record)
        except ValueError as error:
            bad(f"record {number:,} of {list_name}", error)
            continue
        if not messages:
            counts["blank"] += 1
        elif in_english and not in_english(messages):
            counts["not English"] += 1
        else:
            taken[list_name] += 1
            yield list_name, messages


def classifier():
    """Return the function that says whether messages are English. Raises ValueError without the package it needs."""
    try:
        from py3langid import classify
    except ModuleNotFoundError:
        raise ValueError(
            "english=true needs a package that tells languages apart: pip install py3langid"
        ) from None
    return lambda messages: (
        classify(" ".join(message["content"][:500] for message in messages))[0] == "en"
    )


def main(config):
    at_least(0, config, "max_examples")
    if config.source:
        path = existing(config.source)
        path = existing(path / FILE) if path.is_dir() else path
    else:
        path = hub_file("Locutusque/ColumnedChatCombined", FILE, kind="datasets")
    counts = {"bad": 0, "blank": 0, "not English": 0}
    found = conversations(config, path, counts)
    if has_validation(path):
        found = ((SPLITS[list_name], messages) for list_name, messages in found)
    else:
        found = divide((str(messages), messages) for _, messages in found)
    prepare(config, "columned_chat", found)
    print("left out: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))


if __name__ == "__main__":
    run(main, Config)
