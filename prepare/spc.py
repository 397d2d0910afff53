"""Synthetic-Persona-Chat, conversations written by language models: python prepare/spc.py [--source=PATH]

Without --source, its train and validation files are downloaded (18 MB, CC BY 4.0). --source takes a folder with these
two, or one file, which is then divided 95 to 5. Each conversation appears twice, with the one and with the other
speaker as bot; half of them keep the bot's persona.
"""

import csv
import random
import re
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from nanochatgpt.files import hub_file
from prepare.corpus import Config, divide, existing, prepare

REPO = "google/Synthetic-Persona-Chat"
FILES = {"train": "Synthetic-Persona-Chat_train.csv", "val": "Synthetic-Persona-Chat_valid.csv"}
COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def read(path):
    """Yield (the conversation as text, messages) from one file. Raises ValueError where it is another's or damaged."""
    coin = random.Random(1337)
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            table = csv.DictReader(line.replace("\0", "") for line in file)  # csv knows no NUL
            if missing := [column for column in COLUMNS if column not in (table.fieldnames or ())]:
                raise ValueError(
                    f"{path} has no column '{missing[0]}': it is not a file of Synthetic-Persona-Chat"
                )
            for row in table:
                *personas, text = (row[column] or "" for column in COLUMNS)
                said = re.findall(r"^User ([12]): *(.*\S)", text, re.MULTILINE)
                turns = [
                    (who, " ".join(t for _, t in group))
                    for who, group in groupby(said, key=lambda turn: turn[0])
                ]
                for bot, persona in zip("12", personas, strict=True):
                    messages = [
                        {"role": "assistant" if who == bot else "user", "content": t}
                        for who, t in turns
                    ]
                    if coin.random() < 0.5 and persona.strip():
                        messages.insert(
                            0, {"role": "system", "content": " ".join(persona.split("\n"))}
                        )
                    if any(message["role"] == "assistant" for message in messages):
                        yield text, messages
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def conversations(source):
    """Yield (split, messages) of the published files, of a folder with them, or of one file alone."""
    if source and source.is_file():
        yield from divide(read(source))
        return
    for split, name in FILES.items():
        path = (
            existing(source / name) if source else hub_file(REPO, f"data/{name}", kind="datasets")
        )
        for _, messages in read(path):
            yield split, messages


def main(config):
    prepare(config, "spc", conversations(config.source and existing(config.source)))


if __name__ == "__main__":
    run(main, Config)
