"""Conversations between people, from the PyPI package chitchat-dataset: python prepare/chitchat.py

Of its 7,168 the 4,017 in which somebody answers. Each appears twice, with the one and with the other speaker as bot,
both times in the same split.
"""

import json
import sys
from importlib import metadata
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config, divide, existing, prepare


def turns(conversation):
    """Return the texts of one conversation's turns: consecutive messages of one speaker are one."""
    messages = [
        message
        for group in conversation["messages"]
        for message in group
        if message["text"].strip()
    ]
    grouped = groupby(messages, key=lambda message: message["sender"])
    return [" ".join(message["text"].strip() for message in group) for _, group in grouped]


def read(path):
    """Yield (conversation's id, messages) from dataset.json, {id: {"messages": [[{"text", "sender"}]]}}."""
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        for key, conversation in conversations.items():
            texts = turns(conversation)
            if len(texts) < 2:
                continue
            for roles in (("user", "assistant"), ("assistant", "user")):
                yield key, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not chitchat-dataset's dataset.json: {type(error).__name__}: {error}"
        ) from error


def packaged():
    """Return the path of the package's dataset.json. Raises FileNotFoundError without the package."""
    try:
        return metadata.distribution("chitchat-dataset").locate_file(
            "chitchat_dataset/dataset.json"
        )
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            "the corpus comes in a package: pip install chitchat-dataset==0.9.0"
        ) from None


def main(config):
    prepare(
        config, "chitchat", divide(read(existing(config.source) if config.source else packaged()))
    )


if __name__ == "__main__":
    run(main, Config)
