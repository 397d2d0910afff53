"""Plain text, to learn a language from: python prepare/text.py --source=PATH

PATH is a .txt file or a folder of them, such as Project Gutenberg's books or TinyStories. Paragraphs, which end in a
blank line, are divided 95 to 5.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import divide, existing, prepare_text


@dataclass
class Config:
    source: str = ""  # a .txt file or a folder of them
    out_dir: str = ""  # where train.bin and val.bin go; by default data/text


def paragraphs(source):
    """Yield the paragraphs of a file or a folder, each with the blank line before it, the lines of each joined."""
    paths = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    if not paths:
        raise ValueError(f"{source} has no .txt file in it")
    for path in paths:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            lines = []
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{path} is no text: it has NUL bytes")
                if line.strip() not in ("", "<|endoftext|>"):
                    lines.append(line.strip())
                elif lines:
                    yield "\n\n" + " ".join(lines)
                    lines = []
            if lines:
                yield "\n\n" + " ".join(lines)


def main(config):
    if not config.source:
        raise ValueError("--source=PATH is needed: a .txt file or a folder of them")
    prepare_text(
        config, "text", divide((text, text) for text in paragraphs(existing(config.source)))
    )


if __name__ == "__main__":
    run(main, Config)
