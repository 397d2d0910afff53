"""Your own conversations: python prepare/jsonl.py --source=FILE.jsonl --out_dir=data/mine

FILE is JSON Lines or a JSON list, also gzipped. A record is one of

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"instruction": "say hello", "input": "", "output": "hello", "history": [["hi", "hello"]]}
    {"prompt": "hi", "completion": "hello"}
    {"dialog": ["hi", "hello"]}

Dolly's "context" and "response" are read like "input" and "output". "system", as a role or next to
these, is the bot's persona. A reply with "weight": 0 or "train": false is context and not learned.
Equal conversations share a split.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, prepare
from prepare.formats import conversation, n_learned
from prepare.records import read_records


@dataclass
class Config(CorpusConfig):
    source: str = ""  # the file


def read(source):
    """Yield (key, messages) of a file's conversations, then print what they were. Equal ones have
    equal keys, whatever other fields differ; those without a reply to learn are left out."""
    counts = Counter()  # records of each format
    n_blank = 0  # replies

    def parse(record):
        nonlocal n_blank
        for field in ("label", "labels", "weight"):
            if record.get(field) in (0, "0"):
                raise ValueError(f"{field} is 0: read replies that were rejected with retry.py")
        name, messages, n = conversation(record)
        counts[name] += 1
        n_blank += n
        turns = [(message["role"], message["content"]) for message in messages]
        return (json.dumps(turns), messages) if n_learned(messages) else None

    yield from read_records(source, parse)
    formats = ", ".join(f"{name} ({n:,})" for name, n in counts.items()) or "nothing"
    print(f"{source}: recognised {formats}; left out {n_blank:,} blank replies")


def main(config):
    if not config.source:
        raise ValueError("--source=FILE.jsonl is needed: your conversations")
    prepare(config, "jsonl", divide(read(existing(config.source))))


if __name__ == "__main__":
    run(main, Config)
