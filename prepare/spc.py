"""Synthetic-Persona-Chat, written by language models: python prepare/spc.py [--source=PATH]

Without --source, its train and validation files are downloaded (18 MB, CC BY 4.0). --source is a
folder with these two, or one file, which is then divided 95 to 5. Each conversation comes twice,
once with each speaker as the bot; half of them keep the bot's persona.
"""

import csv
import random
import re
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from nanochatgpt.hub import hub_file
from prepare.corpus import Config, divide, existing, prepare

REPO = "google/Synthetic-Persona-Chat"  # on the Hugging Face hub
FILES = {"train": "Synthetic-Persona-Chat_train.csv", "val": "Synthetic-Persona-Chat_valid.csv"}
# both personas and the conversation, "User 1: ..." on each line
COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def read(path):
    """Yield (conversation as text, messages). Raises ValueError for a damaged or other file."""
    coin = random.Random(1337)  # the same personas each time
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            table = csv.DictReader(line.replace("\0", "") for line in file)  # drop NUL bytes
            for column in COLUMNS:
                if column not in (table.fieldnames or ()):
                    corpus = "Synthetic-Persona-Chat"
                    raise ValueError(f"{path} has no column '{column}': it is not {corpus}")
            for row in table:
                *personas, text = (row[column] or "" for column in COLUMNS)  # a short row has None

                # messages in a row from one user are one turn
                lines = re.findall(r"^User ([12]): *(.*\S)", text, re.MULTILINE)
                turns = []  # (user, text)
                for user, group in groupby(lines, key=lambda line: line[0]):
                    turns.append((user, " ".join(line for _, line in group)))

                # with each user as the bot
                for bot, persona in zip("12", personas, strict=True):
                    messages = []
                    if coin.random() < 0.5 and persona.strip():  # keep the persona in half of them
                        messages.append({"role": "system", "content": persona.replace("\n", " ")})
                    for user, content in turns:
                        role = "assistant" if user == bot else "user"
                        messages.append({"role": role, "content": content})
                    # without a reply there is nothing to learn
                    if any(message["role"] == "assistant" for message in messages):
                        yield text, messages
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def conversations(source):
    """Yield (split, messages) of the published files, of a folder with them, or of one file."""
    if source and source.is_file():  # one file
        yield from divide(read(source))  # both sides of a conversation have its text as key
        return
    # the published split
    for split, name in FILES.items():
        if source:
            path = existing(source / name)
        else:
            path = hub_file(REPO, f"data/{name}", kind="datasets")
        for _, messages in read(path):
            yield split, messages


def main(config):
    prepare(config, "spc", conversations(config.source and existing(config.source)))


if __name__ == "__main__":
    run(main, Config)
