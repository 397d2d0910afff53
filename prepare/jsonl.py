"""Your own conversations, one JSON object per line:

    python prepare/jsonl.py --source=FILE.jsonl --out_dir=data/mine

{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}

A "system" message may come first; it is the bot's persona. Equal conversations share a split.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config, divide, existing, prepare
from prepare.records import check_messages, read_records


def parse(record):
    """Return (key, messages). Equal conversations have equal keys, whatever other fields differ."""
    messages = check_messages(record.get("messages"))
    turns = [(message["role"], message["content"]) for message in messages]
    return json.dumps(turns), messages


def main(config):
    if not config.source:
        raise ValueError("--source=FILE.jsonl is needed: your conversations")
    prepare(config, "jsonl", divide(read_records(existing(config.source), parse)))


if __name__ == "__main__":
    run(main, Config)
