"""Your own conversations, one JSON object a line: python prepare/jsonl.py --source=FILE.jsonl --out_dir=data/mine

{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}

A "system" message, if there is one, comes first and is the bot's persona. Equal lines go to the same split.
"""

import gzip
import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config, divide, existing, prepare


def problem(messages):
    """Return what is wrong with a conversation, None if nothing is."""
    if not isinstance(messages, list) or not messages:
        return 'not {"messages": [...]} with a message at least'
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"message {i + 1} is not {{'role': ..., 'content': text}}"
        if message.get("role") not in ("system", "user", "assistant"):
            return (
                f"message {i + 1} has role {message.get('role')!r}, not system, user or assistant"
            )
        if message["role"] == "system" and i > 0:
            return f"message {i + 1} is a system message, which can only come first"
    if all(message["role"] != "assistant" for message in messages):
        return "no message is the assistant's: there is nothing to learn"
    return None


def read(path):
    """Yield (the conversation as text, messages). Raises ValueError naming the first line that is not right."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the messages below have it)
                if not line.strip():
                    continue
                value = json.loads(line)
                messages = value.get("messages") if isinstance(value, dict) else None
                if what := problem(messages):
                    raise TypeError(what)
                yield (
                    json.dumps([(message["role"], message["content"]) for message in messages]),
                    messages,
                )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    except TypeError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged behind line {number}: {error}") from error


def main(config):
    if not config.source:
        raise ValueError("--source=FILE.jsonl is needed: your conversations")
    prepare(config, "jsonl", divide(read(existing(config.source))))


if __name__ == "__main__":
    run(main, Config)
