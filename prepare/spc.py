"""Synthetic-Persona-Chat, written by language models: python prepare/spc.py [--source=PATH]

Without --source, its train and validation files are downloaded (18 MB, CC BY 4.0). --source is a
folder with these two, or one file, which is then divided 95 to 5. Each conversation comes twice,
once with each speaker as the bot; half of them keep the bot's persona.
"""

import random
import re
import sys
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare.corpus import Config, prepare
from prepare.records import merge_turns, published, read_records
from prepare.ways import File

REPO = "google/Synthetic-Persona-Chat"  # on the Hugging Face hub, and the same on GitHub:
MIRROR = "https://raw.githubusercontent.com/google-research-datasets/Synthetic-Persona-Chat/main"
FILES = {  # split -> file
    "train": File("data/Synthetic-Persona-Chat_train.csv"),
    "val": File("data/Synthetic-Persona-Chat_valid.csv"),
}
ORIGIN = {  # for the model card
    "name": "Synthetic-Persona-Chat",
    "hub": REPO,
    "url": f"https://huggingface.co/datasets/{REPO}",
    "licence": "CC BY 4.0",
    "language": "en",
}
COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def read(path):
    """Yield (conversation as text, messages). Raises ValueError for a damaged or other file."""
    coin = random.Random(1337)  # the same personas each time
    for *personas, text in read_records(path, itemgetter(*COLUMNS)):
        # "User 1: ..." on each line
        utterances = re.findall(r"^User ([12]): *(.*\S)", text, re.MULTILINE)
        for bot, persona in zip("12", personas, strict=True):  # with each user as the bot
            messages = merge_turns(utterances, bot)
            if coin.random() < 0.5 and persona.strip():  # keep the persona in half of them
                messages.insert(0, {"role": "system", "content": persona.replace("\n", " ")})
            if any(user == bot for user, _ in utterances):  # there is a reply to learn
                yield text, messages


def main(config):
    # both sides of a conversation have its text as key
    prepare(config, "spc", published(config.source, REPO, FILES, read, MIRROR), ORIGIN)


if __name__ == "__main__":
    run(main, Config)
