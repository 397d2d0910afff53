"""PersonaChat, or ConvAI2's larger edition of it: python prepare/personachat.py [--source=PATH]

Without --source, it is downloaded from the first of three places that has it: ParlAI's archive (223
MB), Hugging Face's personachat_self_original.json (209 MB), bavard/personachat_truecased on the hub
(205 MB). --source is any of these or ConvAI2's archive, unpacked or not, or one of their files; if
there is no published split, conversations are divided 95 to 5. The bot is the speaker whose persona
is given. Half of the conversations keep it, so the model learns to chat with and without a persona.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from prepare import editions
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import divide, existing, prepare
from prepare.natural import natural
from prepare.parlai import messages
from prepare.ways import File, Way, fetch

ARCHIVE_SHA256 = "507cf8641d333240654798870ea584d854ab5261071c5e3521c20d8fa41d5622"
TRUECASED_SHA256 = (
    "cea0e87a230ecbf69ef7937a6012e12060a7f4a2bd9a1adc44d3141cb57938f3",  # train
    "2277648a4b773d81cf3406eb872deff9489a930c7140b5a1a1bed79a48317562",  # valid
)
WAYS = [
    Way(
        "ParlAI's archive",
        [File("personachat.tgz", 223_221_886, ARCHIVE_SHA256)],
        url="http://parl.ai/downloads/personachat",
    ),
    Way(
        "Hugging Face's JSON of ConvAI2",
        [File("personachat_self_original.json", begins=rb'\s*\{\s*"(train|valid)"')],
        url="https://s3.amazonaws.com/datasets.huggingface.co/personachat",
    ),
    Way(
        "bavard/personachat_truecased",
        [
            File("personachat_truecased_full_train.json", sha256=TRUECASED_SHA256[0]),
            File("personachat_truecased_full_valid.json", sha256=TRUECASED_SHA256[1]),
        ],
        repo="bavard/personachat_truecased",
    ),
]
ORIGIN = {  # for the model card
    "name": "PersonaChat",
    "hub": "bavard/personachat_truecased",
    "url": "https://parl.ai/projects/personachat/",
    "licence": "CC BY 4.0",
    "language": "en",
}


@dataclass
class Config(CorpusConfig):
    source: str = ""  # the published file or folder; by default it is downloaded
    natural: bool = True  # write "I'm good." for "i 'm good ."; false: as published


def read(dialogs, natural_writing):
    """Yield (key, conversation) of dialogs, half of them with the bot's persona. ConvAI2 has
    each dialog from both sides. The side in which the bot begins lacks the last utterance, which
    has no reply. The key is what both have in common, so they share a split."""
    coin = random.Random(1337)  # the same personas in every run
    for persona, exchanges in dialogs:
        if not any(reply for _, reply, _ in exchanges):  # nothing to learn from
            continue
        conversation = messages(exchanges)
        texts = [message["content"] for message in conversation]
        key = "\n".join(texts[: (len(texts) - 1) | 1])  # an odd number of texts
        if natural_writing:
            persona = [natural(sentence) for sentence in persona]
            for message in conversation:
                message["content"] = natural(message["content"])
        if persona and coin.random() < 0.5:
            conversation.insert(0, {"role": "system", "content": " ".join(persona)})
        yield key, conversation


def conversations(sources, natural_writing):
    """Yield (split, conversation) of all that a list of paths has."""
    for split, _, dialogs in editions.read(sources):
        if split:  # as published
            for _, conversation in read(dialogs, natural_writing):
                yield split, conversation
        else:  # there is no published split
            yield from divide(read(dialogs, natural_writing))


def main(config):
    sources = [existing(config.source)] if config.source else fetch(WAYS)
    prepare(config, "personachat", conversations(sources, config.natural), ORIGIN)


if __name__ == "__main__":
    run(main, Config)
