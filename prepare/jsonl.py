"""Your own conversations: python prepare/jsonl.py --source=FILE.jsonl --out_dir=data/mine

FILE is JSON Lines or a JSON list, also gzipped. A record is one of

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"instruction": "say hello", "input": "", "output": "hello", "history": [["hi", "hello"]]}
    {"prompt": "hi", "completion": "hello"}

"system", as a role or next to these, is the bot's persona. A reply with "weight": 0 or "train":
false is context and not learned. Equal conversations share a split.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config, divide, existing, prepare
from prepare.formats import conversation, n_learned
from prepare.records import read_records


def parse(record, counts=None):
    """Return (key, messages), None if there is nothing to learn. Equal conversations have equal
    keys, whatever other fields differ. counts: a Counter of formats and blank replies."""
    name, messages, n_blank = conversation(record)
    if counts is not None:
        counts[name] += 1
        counts["blank"] += n_blank
    turns = [(message["role"], message["content"]) for message in messages]
    return (json.dumps(turns), messages) if n_learned(messages) else None


def main(config):
    if not config.source:
        raise ValueError("--source=FILE.jsonl is needed: your conversations")
    source = existing(config.source)
    counts = Counter()
    prepare(config, "jsonl", divide(read_records(source, lambda record: parse(record, counts))))
    n_blank = counts.pop("blank")
    formats = ", ".join(f"{n:,} records with {name}" for name, n in counts.items())
    print(f"{source}: {formats}; {n_blank:,} blank replies left out")


if __name__ == "__main__":
    run(main, Config)
