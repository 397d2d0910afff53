"""Conversations that teach a model to remember: python prepare/recall.py

The human tells facts, talks of other things and asks for the facts; the bot has a persona and is
asked about it. The conversations are made up from the sentences in recall.txt. train and val share
no name, no fact and no sentence.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import prepare
from prepare.recall_generator import Speaker, conversation

ORIGIN = {  # for the model card
    "name": "recall, made up by nanoChatGPT's prepare/recall.py",
    "licence": "MIT",
    "language": "en",
}


@dataclass
class Config:
    out_dir: str = ""  # where train.bin and val.bin go; by default data/recall
    template: str = "human_bot"  # how conversations are written: one of TEMPLATES in tokenizer.py
    conversations: int = 60_000  # number of conversations, a twentieth of them for val
    seed: int = 1337  # the same seed makes the same conversations


def conversations(config):
    """Yield (split, messages)."""
    # a Speaker per split, each with its own sentences and values
    speakers = {split: Speaker(split, config.seed) for split in ("train", "val")}
    for number in range(config.conversations):
        split = "train" if number % 20 else "val"  # the first one is for val
        yield split, conversation(speakers[split])


def main(config):
    prepare(config, "recall", conversations(config), ORIGIN)


if __name__ == "__main__":
    run(main, Config)
