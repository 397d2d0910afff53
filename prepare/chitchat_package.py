"""
Conversations between people, as the PyPI package chitchat-dataset has them.
"""

import json
from importlib import metadata
from itertools import chain, groupby


def packaged():
    """Return the path of dataset.json. Raises FileNotFoundError without the package."""
    try:
        # find the file without importing the package
        package = metadata.distribution("chitchat-dataset")
    except metadata.PackageNotFoundError:
        install = "pip install chitchat-dataset==0.9.0"
        raise FileNotFoundError(f"the corpus comes in a package: {install}") from None
    return package.locate_file("chitchat_dataset/dataset.json")


def read(path):
    """Yield (id, messages) of dataset.json, {id: {"messages": [[{"text", "sender"}]]}}.

    Messages in a row from one sender are one turn. A conversation comes twice, once with each
    speaker as the bot, unless nobody answers.
    """
    try:
        # the messages come in groups, some of them blank
        for key, conversation in json.loads(path.read_text(encoding="utf-8")).items():
            messages = [m for m in chain(*conversation["messages"]) if m["text"].strip()]
            turns = []  # texts, the speakers in turn
            for _, group in groupby(messages, key=lambda message: message["sender"]):
                turns.append(" ".join(message["text"].strip() for message in group))
            if len(turns) < 2:
                continue  # nobody answers
            # with each speaker as the bot
            for roles in (("user", "assistant"), ("assistant", "user")):
                yield key, [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not chitchat-dataset's dataset.json: {problem}") from error


def mean_ratings():
    """Return {id: mean of the ratings from 0 to 10} of the package's rated conversations."""
    ratings = {}  # the parts of a rating are witty, interesting and upbeat
    for key, conversation in json.loads(packaged().read_text(encoding="utf-8")).items():
        if rating := conversation.get("ratings"):  # conversations without ratings are left out
            ratings[key] = sum(rating.values()) / len(rating)
    return ratings
