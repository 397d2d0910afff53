"""Conversations between people, as the PyPI package chitchat-dataset has them."""

import itertools
import json
from importlib import metadata

from prepare.records import merge_turns


def packaged():
    """Return the path of dataset.json, without importing the package."""
    package = metadata.distribution("chitchat-dataset")
    return package.locate_file("chitchat_dataset/dataset.json")


def read(path):
    """Yield (id, messages, mean rating from 0 to 10 or None) of dataset.json. Each conversation in
    which somebody answers comes twice, once with each speaker as the bot."""
    # {id: {"messages": [[{"text", "sender"}]], "ratings": {"witty", "int", "upbeat"}}}
    for key, conversation in json.loads(path.read_text(encoding="utf-8")).items():
        utterances = []  # (sender, text), without blank ones
        for message in itertools.chain(*conversation["messages"]):
            if text := message["text"].strip():
                utterances.append((message["sender"], text))

        ratings = conversation.get("ratings")  # few conversations have them
        mean = sum(ratings.values()) / len(ratings) if ratings else None

        speakers = dict.fromkeys(sender for sender, _ in utterances)  # in order
        if len(speakers) == 2:
            for bot in reversed(speakers):  # first the one who answers
                yield key, merge_turns(utterances, bot), mean
