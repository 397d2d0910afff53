"""Conversations between people, from the PyPI package chitchat-dataset: python prepare/chitchat.py

Of its 7,168 conversations, the 4,017 in which somebody answers. Each comes twice, once with each
speaker as the bot, in the same split.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

from nanochatgpt.configurator import run
from prepare.chitchat_package import packaged, read
from prepare.corpus import Config, divide, existing, prepare


def main(config):
    source = existing(config.source) if config.source else packaged()  # dataset.json
    # the id of a conversation decides its split
    prepare(config, "chitchat", divide(read(source)))


if __name__ == "__main__":
    run(main, Config)
