"""Conversations in three columns: python prepare/columned_chat.py [--source=PATH]

Without --source, Locutusque's ColumnedChatCombined is downloaded (2.66 GB), the corpus of
gpt2-conversational-or-qa. --source is its formatted_data.json or the folder with it:
{"train": [{"System": ..., "User": ..., "Assistant": ...}, ...], "validation": [...]}. Without a
validation list, the other one is divided 95 to 5.
"""

import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import at_least, run
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, prepare
from prepare.records import find_file, read_records
from prepare.ways import File

REPO = "Locutusque/ColumnedChatCombined"  # on the Hugging Face hub
ORIGIN = {  # for the model card
    "name": "ColumnedChatCombined",
    "hub": REPO,
    "url": f"https://huggingface.co/datasets/{REPO}",
    "licence": "see its page",
}


@dataclass
class Config(CorpusConfig):
    template: str = "user_assistant"
    max_examples: int = 0  # examples per split, the first ones (0 = all); the model saw 245,000
    skip_bad: bool = False  # skip bad records; use a damaged file up to the damage


def conversation(record, skip_bad):
    """Return a record's messages, None to leave it out: if the question or the answer is blank, or,
    with skip_bad, not a text."""
    messages = []
    for column in ("System", "User", "Assistant"):  # the columns are called like the roles
        text = record.get(column)
        if text is None and column == "System":  # there may be none
            continue
        if not isinstance(text, str):
            if skip_bad:
                return None
            raise ValueError(f"{column} is not a text: {text!r:.40}")
        if text.strip():
            messages.append({"role": column.lower(), "content": text.strip()})
        elif column != "System":
            return None  # nothing to learn without a question or an answer
    return messages


def conversations(config, path, list_name):
    """Yield the messages of a list's records, the first max_examples."""
    parse = functools.partial(conversation, skip_bad=config.skip_bad)
    try:
        records = read_records(path, parse, list_name)
        yield from itertools.islice(records, config.max_examples or None)  # None: all of them
    except ValueError as error:
        if not config.skip_bad:
            raise ValueError(f"{error}\n--skip_bad=true goes on") from None
        print(error, file=sys.stderr)  # where the file is damaged


def examples(config, path):
    """Yield (split, messages)."""
    n_val = 0  # the validation list comes first, to know if there is one
    for messages in conversations(config, path, "validation"):
        n_val += 1
        yield "val", messages
    train = conversations(config, path, "train")
    if n_val:  # the published split
        for messages in train:
            yield "train", messages
    else:
        yield from divide((str(messages), messages) for messages in train)


def main(config):
    at_least(0, config, "max_examples")
    path = find_file(config.source, REPO, File("formatted_data.json"))  # 2.66 GB
    prepare(config, "columned_chat", examples(config, path), ORIGIN)


if __name__ == "__main__":
    run(main, Config)
