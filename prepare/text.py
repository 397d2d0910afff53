"""Plain text, to learn a language from: python prepare/text.py --source=PATH

PATH is a .txt file or a folder of them, such as books of Project Gutenberg or TinyStories. A blank
line ends a paragraph; a document ends with its file, or at <|endoftext|>. Paragraphs are divided 95
to 5, and a token between documents says where one ends.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import divide, existing, prepare_text
from prepare.records import open_bytes, text_lines

END = "<|endoftext|>"


@dataclass
class Config:
    source: str = ""  # a .txt file or a folder of them
    out_dir: str = ""  # where train.bin and val.bin go; by default data/text


def lines_of(source):
    """Yield the lines of the text files, with END as a line after each document."""
    paths = [source]
    if source.is_dir():
        # sorted, so that the shards are the same on every machine
        names = re.compile(r".*\.txt(\.gz)?", re.IGNORECASE)
        paths = sorted(path for path in source.rglob("*") if names.fullmatch(path.name))
    if not paths:
        raise ValueError(f"{source} has no .txt file")
    for path in paths:
        with open_bytes(path) as file:
            for line in text_lines(file, path):
                yield from line.strip().replace(END, f"\n{END}\n").split("\n")
        yield END


def paragraphs(lines):
    """Yield (text, (document, text)) for each paragraph: its lines joined by spaces, and the number
    of its document."""
    document = 0
    paragraph = []  # its lines so far
    for line in lines:
        if line.strip() not in ("", END):
            paragraph.append(line.strip())
            continue
        if paragraph:
            text = " ".join(paragraph)
            yield text, (document, text)  # the text is its own key
            paragraph = []
        document += line == END


def joined(paragraphs):
    """Yield (split, text) from (split, (document, text)): a blank line goes before each paragraph
    but a document's first, and None between documents."""
    last = {}  # split -> its latest document
    for split, (document, text) in paragraphs:
        if last.get(split) == document:
            text = "\n\n" + text
        elif split in last:
            yield split, None
        last[split] = document
        yield split, text


def main(config):
    if not config.source:
        raise ValueError("--source=PATH is needed: a .txt file or a folder of them")
    lines = lines_of(existing(config.source))
    prepare_text(config, "text", joined(divide(paragraphs(lines))))


if __name__ == "__main__":
    run(main, Config)
