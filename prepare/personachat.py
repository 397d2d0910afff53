"""PersonaChat, or ConvAI2's larger edition of it: python prepare/personachat.py [--source=PATH]

Without --source, PersonaChat is downloaded (223 MB). --source is that archive or ConvAI2's, its
unpacked folder, or one of its files, which is then divided 95 to 5. The bot is the speaker whose
persona the file gives. Half of the conversations keep it, so the model learns to do with and
without one.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from nanochatgpt.files import download
from prepare.corpus import Config, divide, existing, prepare
from prepare.parlai import dialogs, files, messages

URL = "http://parl.ai/downloads/personachat/personachat.tgz"  # ParlAI's archive
SIZE = 223_221_886  # bytes
SHA256 = "507cf8641d333240654798870ea584d854ab5261071c5e3521c20d8fa41d5622"  # of the archive
ORIGIN = {  # for the model card
    "name": "PersonaChat",
    "hub": "bavard/personachat_truecased",
    "url": "https://parl.ai/projects/personachat/",
    "licence": "CC BY 4.0",
    "language": "en",
}


def read(lines, name):
    """Yield (key, conversation) from a file, half of them with the bot's persona. ConvAI2 has
    each dialog from both sides. The side in which the bot begins lacks the last utterance, which
    has no reply. The key is what both have in common, so they share a split."""
    coin = random.Random(1337)  # the same personas in every run
    for persona, exchanges in dialogs(lines, name):
        if not any(reply for _, reply, _ in exchanges):  # nothing to learn from
            continue
        conversation = messages(exchanges)
        texts = [message["content"] for message in conversation]
        key = "\n".join(texts[: (len(texts) - 1) | 1])  # an odd number of texts
        if persona and coin.random() < 0.5:
            conversation.insert(0, {"role": "system", "content": " ".join(persona)})
        yield key, conversation


def conversations(source):
    """Yield (split, conversation) of all files in `source`."""
    for split, name, lines in files(source):
        if split:  # as published
            for _, conversation in read(lines, name):
                yield split, conversation
        else:  # a single file has no published split
            yield from divide(read(lines, name))


def main(config):
    if config.source:
        source = existing(config.source)
    else:
        source = download(URL, Path("data/downloads/personachat.tgz"), SIZE, SHA256)
    prepare(config, "personachat", conversations(source), ORIGIN)


if __name__ == "__main__":
    run(main, Config)
