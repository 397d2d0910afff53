"""Your own conversations: python prepare/jsonl.py --source=FILE.jsonl --out_dir=data/mine

FILE is JSON Lines, a JSON list, CSV or Parquet, also gzipped. A record is one of

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"instruction": "say hello", "input": "", "output": "hello", "history": [["hi", "hello"]]}
    {"prompt": "hi", "completion": "hello"}
    {"dialog": ["hi", "hello"]}

Dolly's "context" and "response" are read like "input" and "output". "system", as a role or next to
these, is the bot's persona. A reply with "weight": 0 or "train": false is context and not learned.
Equal conversations share a split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, prepare
from prepare.formats import ConversationReader
from prepare.records import read_records


@dataclass
class Config(CorpusConfig):
    source: str = ""  # the file


def read(source):
    """Yield (key, messages) of a file's conversations, then print what they were."""
    reader = ConversationReader()
    yield from read_records(source, reader)
    print(f"{source}: {reader.report()}")


def main(config):
    if not config.source:
        raise ValueError("--source=FILE.jsonl is needed: your conversations")
    prepare(config, "jsonl", divide(read(existing(config.source))))


if __name__ == "__main__":
    run(main, Config)
