"""Conversations between people, from the PyPI package chitchat-dataset: python prepare/chitchat.py

Of its 7,168 conversations, the 4,017 in which somebody answers. Each comes twice, once with each
speaker as the bot, in the same split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.chitchat_package import packaged, read
from prepare.corpus import divide, prepare

ORIGIN = {  # for the model card
    "name": "chitchat-dataset",
    "url": "https://pypi.org/project/chitchat-dataset/",
    "licence": "MIT",
    "language": "en",
}


@dataclass
class Config:
    out_dir: str = ""  # where train.bin and val.bin go; by default data/chitchat
    template: str = "human_bot"  # how conversations are written: one of TEMPLATES in tokenizer.py


def main(config):
    # the id of a conversation decides its split
    talks = divide((key, talk) for key, talk, _ in read(packaged()))
    prepare(config, "chitchat", talks, ORIGIN)


if __name__ == "__main__":
    run(main, Config)
