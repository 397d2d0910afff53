"""Plain text, to learn a language from: python prepare/text.py --source=PATH

PATH is a .txt file or a folder of them, such as books of Project Gutenberg or TinyStories. A blank
line ends a paragraph; paragraphs are divided 95 to 5.
"""

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import divide, existing, prepare_text


@dataclass
class Config:
    source: str = ""  # a .txt file or a folder of them
    out_dir: str = ""  # where train.bin and val.bin go; by default data/text


def paragraphs(source):
    """Yield (text, text) for each paragraph: a blank line, then its lines joined by spaces."""
    # sorted, so that the shards are the same on every machine
    paths = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    if not paths:
        raise ValueError(f"{source} has no .txt file")
    for path in paths:
        lines = []  # of the paragraph
        with open(path, encoding="utf-8-sig", errors="replace") as file:  # drops a byte order mark
            for line in chain(file, ["\n"]):  # the end of a file ends a paragraph
                if "\0" in line:
                    raise ValueError(f"{path} is not text: it has NUL bytes")
                if line.strip() not in ("", "<|endoftext|>"):  # which TinyStories has
                    lines.append(line.strip())
                elif lines:
                    text = "\n\n" + " ".join(lines)  # paragraphs join with a blank line
                    yield text, text  # the text is its own key
                    lines = []


def main(config):
    if not config.source:
        raise ValueError("--source=PATH is needed: a .txt file or a folder of them")
    prepare_text(config, "text", divide(paragraphs(existing(config.source))))


if __name__ == "__main__":
    run(main, Config)
