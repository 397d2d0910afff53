"""Your own conversations, one JSON object per line:

    python prepare/jsonl.py --source=FILE.jsonl --out_dir=data/mine

{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}

A "system" message may come first; it is the bot's persona. Equal conversations share a split.
"""

import gzip
import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config, divide, existing, prepare
from prepare.messages import problem


def read(path):
    """Yield (conversation as text, messages). Raises ValueError that names the first bad line."""
    number = 0  # of the line
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the errors below name it)
                if not line.strip():  # blank lines are allowed
                    continue
                record = json.loads(line)
                messages = record.get("messages") if isinstance(record, dict) else None
                if reason := problem(messages):
                    raise TypeError(reason)  # not a ValueError, which is about JSON
                # equal conversations have equal keys, whatever other fields they have
                key = json.dumps([(message["role"], message["content"]) for message in messages])
                yield key, messages
    # a damaged .gz, a line that is not JSON, or not a conversation
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    except TypeError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def main(config):
    if not config.source:
        raise ValueError("--source=FILE.jsonl is needed: your conversations")
    # 5% of the conversations go to val
    prepare(config, "jsonl", divide(read(existing(config.source))))


if __name__ == "__main__":
    run(main, Config)
