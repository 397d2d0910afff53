"""Replies that people kept or rejected, to learn a reward: python prepare/retry.py --source=PATH

PATH is a file of records: .jsonl, .json (a list), .csv or Parquet, also .gz. A record is one of

    {"input_text" or "text": ..., "labels" or "label": 0 or 1}      1: the reply at its end was kept
    {"messages": [...], "label": 0 or 1}, {"prompt": ..., "completion": ..., "label": true or false}
    {"prompt", "question" or "instruction": ..., "chosen": ..., "rejected": ...}
                                                a pair; each is a text or messages
    {"chosen": ..., "rejected": ...}            the same, where the prompt is what both begin with;
                                                messages, or texts as in Anthropic's hh-rlhf
    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    {"messages": [...], "retried": [...]}                           what /save in chat.py writes
    DailyDialog++'s contexts with good and adversarial replies
    ConvAI2's wild chats with scores of utterances

--source=chitchat takes the rated conversations of chitchat. A shard has one conversation per reply,
supervised if the reply was kept, the chosen reply of a pair first. Equal contexts share a split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer
from prepare.chitchat_package import packaged, read
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, output_folder, shard_writers
from prepare.preferences import examples, with_label
from prepare.records import read_records


@dataclass
class Config(CorpusConfig):
    source: str = ""  # the file, or chitchat


def from_file(path):
    """Yield (key, [(text or messages, label)]) of a file's records."""
    seen = set()  # hashes of what saved chats had: a chat may be saved twice

    def new_examples(record):
        key, labelled = examples(record)
        if "messages" in record:
            labelled = [example for example in labelled if hash(str(example)) not in seen]
            seen.update(hash(str(example)) for example in labelled)
        return (key, labelled) if labelled else None

    return read_records(path, new_examples)


def from_chitchat():
    """Yield (key, [(messages, label)]): 1 for a mean rating of 6 of 10 or more, 0 for 4 or less."""
    for key, messages, rating in read(packaged()):
        if rating is not None and not 4 < rating < 6:
            if messages[-1]["role"] == "user":
                messages.pop()  # end with a reply
            yield key, [(messages, int(rating >= 6))]


def main(config):
    if not config.source:
        raise ValueError("--source=PATH is needed: a file of replies with labels, or chitchat")
    chitchat = config.source == "chitchat"
    replies = from_chitchat() if chitchat else from_file(existing(config.source))

    # write each reply to the shard of its split
    tokenizer = Tokenizer(config.template)
    counts = {"train": [0, 0], "val": [0, 0]}  # replies with label 0, with label 1
    with output_folder(config, "retry") as folder, shard_writers(folder, tokenizer) as writers:
        for split, labelled in divide(replies):
            for content, label in labelled:
                writers[split].write([render(tokenizer, content, label)])
                counts[split][label] += 1

        # a reward model learns from both labels, in both splits
        for split, (bad, good) in counts.items():
            if not (bad and good):
                problem = f"{split}.bin would have {good:,} kept and {bad:,} rejected replies"
                raise ValueError(f"{problem}, needs both: add chats with different beginnings")
    for split, (bad, good) in counts.items():
        n = bad + good
        n_tokens = writers[split].n_tokens  # of the finished shard
        print(f"{folder / split}.bin: {n:,} replies, {n_tokens:,} tokens, {good / n:.1%} kept")


def render(tokenizer, content, label):
    """Return (ids, mask) of a text or messages. The mask is `label` on the last reply and its end,
    or on a whole text, and 0 before."""
    if isinstance(content, str):
        ids = tokenizer.encode(content)
        return ids, [label] * len(ids)
    return tokenizer.render(with_label(content, label))


if __name__ == "__main__":
    run(main, Config)
