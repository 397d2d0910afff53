"""Conversations in three columns: python prepare/columned_chat.py [--source=PATH]

Without --source, Locutusque's ColumnedChatCombined is downloaded (2.66 GB), the corpus of
gpt2-conversational-or-qa. --source is its formatted_data.json or the folder with it:
{"train": [{"System": ..., "User": ..., "Assistant": ...}, ...], "validation": [...]}. Without a
validation list, the other one is divided 95 to 5.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from nanochatgpt.hub import hub_file
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, prepare
from prepare.json_stream import JsonStream

FILE = "formatted_data.json"  # 2.66 GB
SPLITS = {"train": "train", "validation": "val"}  # list -> split


@dataclass
class Config(CorpusConfig):
    template: str = "user_assistant"
    max_examples: int = 0  # examples per split, the first ones (0 = all); the model saw 245,000
    english: bool = False  # leave out other languages, as told by py3langid
    skip_bad: bool = False  # skip what cannot be read


def records(path, skip_bad):
    """Yield (list's name, number, record) of a file, in pieces. A record that cannot be read is an
    Exception; without skip_bad nothing follows it."""
    list_name = "the file"  # train or validation, once it has begun
    number = 0  # of the record in its list
    with open(path, encoding="utf-8", errors="replace") as file:
        stream = JsonStream(file)
        try:
            # the file is an object with one or two lists
            stream.expect("{")
            while True:
                list_name = stream.value()
                number = 0
                stream.expect(":")  # {"train": [...], ...
                if list_name not in list(SPLITS):
                    raise ValueError("it is neither train nor validation")
                for record in stream.items(skip_bad, SPLITS):  # one record in memory at a time
                    number += 1
                    yield list_name, number, record
                if stream.expect(",", "}") == "}":  # the end of the file's object
                    return
        except (ValueError, RecursionError) as error:
            yield str(list_name)[:40], number + 1, error  # the damage itself, as the last record


def conversation(record):
    """Return a record's messages, [] if the question or the answer is blank."""
    if isinstance(record, Exception):
        raise record  # the caller reports it with its number
    if not isinstance(record, dict):
        raise ValueError(f"is not an object: {record!r:.40}")
    messages = []
    # the columns are called like the roles; there may be no system message
    for column in ("System", "User", "Assistant"):
        text = record.get(column)
        if column == "System" and text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{column} is not a text: {text!r:.40}")
        if text.strip():
            messages.append({"role": column.lower(), "content": text.strip()})
        elif column != "System":
            return []  # nothing to learn without a question or an answer
    return messages


def conversations(config, path, counts):
    """Yield (list's name, messages). Count in `counts` what is left out, by reason."""
    # examples taken from each list
    n_examples = dict.fromkeys(SPLITS, 0)
    for list_name, number, record in records(path, config.skip_bad):
        # stop when both lists are full; an error counts even if its list is
        full = n_examples.get(list_name) == config.max_examples > 0
        if full and not isinstance(record, Exception):
            if min(n_examples.values()) == config.max_examples:
                return
            continue

        try:
            messages = conversation(record)
        except (ValueError, RecursionError) as error:
            problem = f"{path}, record {number:,} of {list_name}: {error}"
            if not config.skip_bad:
                raise ValueError(f"{problem}\n--skip_bad=true skips it") from None
            counts["bad"] += 1
            if counts["bad"] <= 5:  # the first ones show what is wrong
                print(problem, file=sys.stderr)
            continue

        # count it, or take it
        if not messages:
            counts["blank"] += 1
        elif config.english and not is_english(messages):
            counts["not English"] += 1
        else:
            n_examples[list_name] += 1
            yield list_name, messages


def is_english(messages):
    """Return whether messages are in English. Raises ValueError without py3langid."""
    try:
        from py3langid import classify
    except ModuleNotFoundError:
        raise ValueError("english=true needs another package: pip install py3langid") from None
    # 500 characters of each message tell the language, and keep it fast
    text = " ".join(message["content"][:500] for message in messages)
    return classify(text)[0] == "en"


def has_validation(path):
    """Return whether a file has a list named validation. Quotes in a text would be escaped."""
    with open(path, "rb") as file:
        tail = b""  # of the chunk before: the name may be cut
        while chunk := file.read(1 << 24):  # 16 MiB
            if re.search(rb'"validation"\s*:', tail + chunk):
                return True
            tail = chunk[-64:]
    return False


def main(config):
    at_least(0, config, "max_examples")
    # find the file, or download it
    if config.source:
        path = existing(config.source)
        path = existing(path / FILE) if path.is_dir() else path
    else:
        path = hub_file("Locutusque/ColumnedChatCombined", FILE, kind="datasets")
    # what is left out, by reason
    counts = {"bad": 0, "blank": 0, "not English": 0}
    examples = conversations(config, path, counts)  # (list's name, messages)
    # keep the published split; without one, divide by a hash of the conversation
    if has_validation(path):
        examples = ((SPLITS[list_name], messages) for list_name, messages in examples)
    else:
        examples = divide((str(messages), messages) for _, messages in examples)
    prepare(config, "columned_chat", examples)
    print("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()))


if __name__ == "__main__":
    run(main, Config)
