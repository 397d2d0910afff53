"""Replies that people kept or rejected, recognised by their fields (--help of retry.py lists them).

A reply comes with its context as messages, and with a label: 1 if it was kept, 0 if not.
"""

import itertools
import os
import re

from prepare.formats import as_message, as_turns, conversation, turns_of
from prepare.records import merge_turns


def examples(record):
    """Return (key, [(text or messages, label)]) of a record; equal keys share a split."""
    label = record.get("labels", record.get("label"))
    texts = [record[name] for name in ("input_text", "text", "input_ids") if name in record]
    if "chosen" in record or "preferred_output" in record:
        return pair(record)
    if "positive_responses" in record:
        return dailydialog(record)
    if "dialog" in record:
        return convai2(record)
    if texts:
        text = texts[0]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"there is no text: {text!r:.40}")
        return text.strip().partition("\n")[0], [(text, as_label(label))]  # the key is a line
    if label is None:
        return saved_chat(record)
    messages = ending_in_reply(record)
    return beginning(messages[:-1]), [(messages, as_label(label))] if messages else []


def ending_in_reply(record):
    """Return the messages of a record, [] if the reply at their end is blank. Raises ValueError if
    there is no reply."""
    _, messages, n_blank = conversation(record)
    if messages and messages[-1]["role"] == "assistant":
        return messages
    if n_blank:
        return []
    raise ValueError("the messages do not end with a reply")


def pair(record):
    """A chosen and a rejected reply to a prompt; none if they are equal, if one is blank, or if
    they answer different prompts."""
    replies = [record.get("chosen"), record.get("rejected")]
    if "preferred_output" in record:  # OpenAI's
        replies = [record["preferred_output"], record["non_preferred_output"]]
    prompt = prompt_of(record)
    if not prompt and all(isinstance(reply, str) for reply in replies):
        # the prompt is what both begin with, up to white space
        prompt = re.sub(r"\S+\Z", "", os.path.commonprefix(replies))  # noqa: RUF071
        replies = [reply.removeprefix(prompt) for reply in replies]

    dialogs = []
    for reply in replies:
        turns = as_dialog(prompt, reply)
        dialogs.append(ending_in_reply(record | {"messages": turns}))  # and its system
    chosen, rejected = dialogs
    if not chosen or not rejected or chosen == rejected or chosen[:-1] != rejected[:-1]:
        return "", []
    return beginning(chosen[:-1]), [(chosen, 1), (rejected, 0)]


def prompt_of(record):
    """Return what comes before the replies of a pair, a text or turns; "" if only they have it."""
    for name in ("prompt", "question"):
        if record.get(name):
            return record[name]
    if isinstance(record.get("input"), dict):  # OpenAI's
        return record["input"]["messages"]
    if "instruction" in record:
        return turns_of(record | {"output": ""})[1][:-1]
    if isinstance(record.get("input"), str):
        return record["input"]
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return record[name]
    return ""


def as_dialog(prompt, reply):
    """Return the turns of a prompt and a reply, texts or turns each. Texts may be in the form of
    Anthropic's hh-rlhf, which begins with a speaker; turns may have the prompt in them."""
    if isinstance(prompt, str) and isinstance(reply, str):
        text = (prompt + reply).lstrip()
        head, *parts = re.split(r"(?:\A|\n\n)(System|Human|Assistant):", text)
        if parts and not head:
            pairs = zip(parts[::2], parts[1::2], strict=True)  # speaker, text
            return [{"from": speaker, "value": text} for speaker, text in pairs]
    before = as_turns(prompt, "user")
    turns = as_turns(reply, "assistant")
    if turns and as_message(turns[0], len(before) + 1)["role"] != "assistant":
        return turns  # a whole conversation
    return before + turns


def dailydialog(record):
    """Good and adversarial replies in turn, so that two are a pair."""
    utterances = [(i % 2, text) for i, text in enumerate(record["context"])]
    context = merge_turns(utterances, bot=len(utterances) % 2)  # the bot speaks next
    positive = record["positive_responses"]
    negative = record["adversarial_negative_responses"]
    labelled = []
    for texts in zip(positive, negative, strict=False):
        good, bad = [ending_in_reply({"messages": [*context, reply(text)]}) for text in texts]
        if good and bad:
            labelled += [(good, 1), (bad, 0)]
    return beginning(context), labelled


def convai2(record):
    """The utterances that have a score; the one who speaks is the assistant."""
    utterances = []  # (sender, text), the context of the next one
    labelled = []
    for utterance in record["dialog"]:
        sender = utterance["sender"]
        text = utterance["text"]
        score = utterance["evaluation_score"]
        if score is not None:
            context = merge_turns(utterances, bot=sender)
            messages = ending_in_reply({"messages": [*context, reply(text)]})
            if messages:
                labelled.append((messages, as_label(score)))
        utterances.append((sender, text))
    return str([text for _, text in utterances]), labelled


def saved_chat(record):
    """A reply was kept if the human went on, so the last one has no label."""
    _, turns = turns_of(record)
    messages = [as_message(turn, number) for number, turn in enumerate(turns, 1)]
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]  # also blank ones

    def example(turns):
        return ending_in_reply(record | {"messages": system + turns})

    ends = [i for i, message in enumerate(turns, 1) if message["role"] == "assistant"]
    if not ends:
        raise ValueError("no message is the assistant's, so there is nothing to learn")
    kept = [example(turns[:end]) for end in ends if end < len(turns)]
    labelled = [(messages, 1) for messages in kept if messages]

    # a retried reply is rejected; `before` counts the turns before it
    for attempt in record.get("retried", []):
        rejected = example([*turns[: attempt["before"]], reply(attempt["content"])])
        if rejected and rejected not in kept:  # the same reply may have come again and been kept
            labelled.append((rejected, 0))
    return str(system + turns[: ends[0]]), labelled


def reply(text):
    return {"role": "assistant", "content": text}


def beginning(messages):
    """Return the texts up to the first reply, which stay the same while a conversation grows."""
    first = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
    return str([message["content"] for message in first])


def as_label(value):
    label = str(value).lower()  # numbers, booleans and texts are all in use
    if label in ("1", "1.0", "true"):
        return 1
    if label in ("0", "0.0", "false"):
        return 0
    raise ValueError(f"label {value!r:.40} is not 0 or 1")


def with_label(messages, label):
    """Return messages in which only the last reply is learned, and that only if label is 1."""
    context = [message | {"weight": 0} for message in messages[:-1]]
    return [*context, messages[-1] | {"weight": label}]
