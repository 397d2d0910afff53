"""Conversations from trees of messages, one record each, as OpenAssistant publishes them:

    {"message_id": ..., "parent_id": ..., "role": "prompter", "text": ..., "rank": ...}

A root has no parent. The other role is "assistant".
"""

import math
from collections import defaultdict

from prepare.formats import n_learned

FIELDS = {"message_id", "parent_id", "role", "text"}  # what a record must have


def conversations(records):
    """Yield (key, messages) of the paths from a root to a leaf; equal keys are of one tree.

    Where there are several replies, the path follows the one of the lowest rank. Where a human
    answers in several ways, each is a path. A reply that paths share is learned in the first.
    All records are in memory.
    """
    children = defaultdict(list)  # id -> the records that follow it
    for record in records:
        children[record["parent_id"] or None].append(record)

    for root in children[None]:
        stack = [(root, [])]  # records to visit, each with the messages before it
        while stack:
            record, before = stack.pop()
            role = "assistant" if record["role"] == "assistant" else "user"
            messages = [*before, {"role": role, "content": (record["text"] or "").strip()}]
            following = children[record["message_id"]]
            replies = [child for child in following if child["role"] == "assistant"]
            if replies:
                following = [min(replies, key=rank)]
            stack += [(child, messages) for child in reversed(following)]
            if not following and n_learned(messages):
                yield root["message_id"], [dict(message) for message in messages]
                for message in messages:  # the other paths share these dicts
                    message["weight"] = 0


def rank(record):
    """Return the rank of a reply, 0 for the best; a reply without one comes last."""
    return math.inf if record.get("rank") is None else float(record["rank"])
