"""Conversations that teach a model to remember what was said: python prepare/recall.py

The human tells facts, talks of other things and asks for what was told; the bot has a persona and is asked about it;
one wants to know what they were just talking about. recall.txt has the sentences, a generator with a seed makes the
conversations. train and val share no name, no fact and no sentence. `probe` is how evaluate.py asks.
"""

import configparser
import random
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import gpt2_encoding
from prepare.corpus import Config as CorpusConfig
from prepare.corpus import prepare


@dataclass
class Config(CorpusConfig):
    conversations: int = 60_000  # how many to make, a twentieth of them for val
    seed: int = 1337  # the same seed makes the same conversations


def both(text, separator=" / "):
    """Return {split: the items} of a list in recall.txt; what stands behind // is val's."""
    train, _, val = " ".join(text.split()).partition(" // ")
    return {"train": train.split(separator), "val": val.split(separator)}


TEXT = configparser.ConfigParser(delimiters=":", interpolation=None)
TEXT.read(Path(__file__).with_suffix(".txt"), encoding="utf-8")
SENTENCES = {name: both(text) for name, text in TEXT["sentences"].items()}
# about every second time there is none
SENTENCES["lead"] = {split: ["", "", "", *leads] for split, leads in SENTENCES["lead"].items()}
SMALL_TALK = {"train": [], "val": []}  # (topic, the human, the bot)
for topic, text in TEXT["small talk"].items():
    SMALL_TALK["val" if " // " in text else "train"].append((topic, *re.split(" //? ", text)))
SYLLABLES = TEXT["values"].pop("syllables").split()
LITTLE = set(TEXT["values"].pop("little").split())
VALUES = {kind: both(text, " ") for kind, text in TEXT["values"].items()}
KINDS = []  # of facts: {"values": their kind, "tell": {split: sentences}, "ask": ...}
for section in (TEXT[name] for name in TEXT.sections() if name.startswith("fact")):
    for each in section.pop("each", f"={section.pop('values', '')}").split():
        it, _, values = each.partition("=")
        KINDS.append(
            {name: both(text.replace("{it}", it)) for name, text in section.items()}
            | {"values": values}
        )

ENDS = {  # of names that are made up
    "name": ["n", "l", "r", "s", "a", "o", "y", "ie", "", "", ""],
    "place": ["ville", "ton", "burg", "stad", "land", "ford", " City", "field"],
}
LISTED = {
    word
    for words in VALUES.values()
    for split in words.values()
    for word in " ".join(split).lower().split()
}


def held_out(word):
    """Return whether a word that is in no list is for val."""
    return zlib.crc32(word.lower().encode()) % 10 == 0


TOKENS = sorted(gpt2_encoding().token_byte_values())
# the words that GPT-2 has a token for, and what it has tokens for inside of words
WORDS = [token[1:].decode() for token in TOKENS if re.fullmatch(b" [A-Za-z][a-z]{2,}", token)]
WORDS = [word for word in WORDS if word.lower() not in LISTED and not held_out(word)]
ENDINGS = [token.decode() for token in TOKENS if re.fullmatch(b"[a-z]{2,}", token)]
VERBS = [word for word in WORDS if word.islower() and word.endswith("ed")]
SWAP = {
    "i": "you",
    "my": "your",
    "am": "are",
    "me": "you",
    "you": "i",
    "your": "my",
    "are": "am",
    "mine": "yours",
    "yours": "mine",
    "myself": "yourself",
    "yourself": "myself",
}


def swap(sentence):
    """Return a sentence with the two speakers exchanged: what is my name -> what is your name."""
    swapped = " ".join(SWAP.get(word, word) for word in sentence.split())
    return re.sub(r"\b(tell|told|give|gave) i\b", r"\1 me", swapped)  # as an object


class Speaker:
    """Draws sentences and values of one split with one random generator."""

    def __init__(self, split, seed):
        self.split, self.random = split, random.Random(f"{split} {seed}")

    def say(self, sentences, slips=False, **slots):
        """Return one of this split's `sentences`, or the one that it is, its alternatives chosen, its slots filled.

        slips: in training, every second one is as somebody writes it in haste.
        """
        if isinstance(sentences, dict):
            sentences = self.random.choice(sentences[self.split])
        chosen = re.sub(
            r"\[(.*?)\]", lambda match: self.random.choice(match[1].split("|")), sentences
        )
        chosen = re.sub("{verb}", lambda _: self.random.choice(VERBS), chosen).split()
        if slips and self.split == "train" and self.random.random() < 0.5:
            chosen = self.slip(chosen)
        chosen = " ".join(chosen)
        return " ".join(chosen.format(**slots).split()) if slots else chosen

    def slip(self, words):
        """Return the words without some of the little ones, and with some that do not belong there, beside no slot.

        Who has seen only whole sentences looks for these; who has not, for what they have in common.
        """
        written = []
        for word in [word for word in words if word not in LITTLE or self.random.random() < 0.85]:
            if "{" not in word + "".join(written[-1:]) and self.random.random() < 0.08:
                written.append(self.random.choice(WORDS))
            written.append(word)
        return written

    def any_word(self):
        """Return a word, every fourth time one that does not exist: some tokens are only ever inside of words."""
        if self.random.random() < 0.75:
            return self.random.choice(WORDS)
        while True:
            word = self.random.choice(WORDS) + self.random.choice(ENDINGS)
            if word.lower() not in LISTED and not held_out(word):
                return word

    def value(self, kind):
        """Return a value of a kind which the other split does not have."""
        choice = self.random.choice
        if kind == "number":
            while held_out(number := str(self.random.randrange(100, 1000))) != (
                self.split == "val"
            ):
                pass
            return number
        if kind == "title":
            return f"The {self.value('adjective').title()} {self.value('noun').title()}"
        if kind == "thing":
            return f"{self.value('adjective')} {self.value('noun')}"
        if (
            self.split == "train" and self.random.random() < 0.4
        ):  # any word: to remember it is not to know what fits
            return self.any_word()
        if kind in ENDS and self.random.random() < 0.7:
            while True:
                name = "".join(
                    choice(SYLLABLES) for _ in range(choice((1, 2, 2, 3)))
                ).title() + choice(ENDS[kind])
                word = name.split()[0]  # not of a place what is of a name
                if (
                    len(name) > 2
                    and held_out(word) == (self.split == "val")
                    and word.lower() not in LISTED
                ):
                    return name
        return choice(VALUES[kind][self.split])


class Conversation:
    """A conversation that grows exchange by exchange; `messages` are as Tokenizer.render takes them."""

    def __init__(self, speaker, persona=0):
        """persona: the bot has one, of so many facts."""
        self.speaker, self.random = speaker, speaker.random
        self.lower = self.random.random() < 0.5  # as PersonaChat writes, and people who chat
        self.facts = {}  # (whose it is, its kind's number) -> the slots of its sentences
        self.about = None  # what was talked of last
        told = [
            speaker.say(kind["tell"], **slots)
            for kind, slots in (self.fact("bot") for _ in range(persona))
        ]
        text = self.written("".join(f"{sentence}. " for sentence in told).strip())
        self.messages = [{"role": "system", "content": text}] if persona else []

    def written(self, text):
        if self.lower:
            return text.lower()
        return re.sub(
            r"(^|[.?!] )[a-z]", lambda match: match[0].upper(), re.sub(r"\bi\b", "I", text)
        )

    def add(self, human, bot=None):
        """Add a message and, if there is one, its reply."""
        self.messages.append({"role": "user", "content": self.written(human)})
        if bot is not None:
            self.messages.append({"role": "assistant", "content": self.written(bot)})

    def fact(self, who):
        """Return (kind, slots): a new fact, of a kind that is not there yet and with a value of new words."""
        taken = {word for slots in self.facts.values() for word in slots["x"].lower().split()} - {
            "the"
        }
        while True:
            number = self.random.randrange(
                len(KINDS) - (who == "bot")
            )  # no word is for the bot to keep
            value = self.speaker.value(KINDS[number]["values"])
            if (who, number) not in self.facts and not taken & set(value.lower().split()):
                break
        self.facts[who, number] = {"x": value, "ax": f"a{'n' * (value[0] in 'aeiou')} {value}"}
        return KINDS[number], self.facts[who, number]

    def tell(self, echo=True):
        """The human tells a fact and the bot comments on it. Return (whose it is, its kind's number).

        echo: the comment may name the value.
        """
        kind, slots = self.fact("human")
        comment = self.speaker.say(
            SENTENCES["comment"], c=self.speaker.say(kind["comment"], **slots)
        )
        while not echo and slots["x"] in comment:
            comment = self.speaker.say(
                SENTENCES["comment"], c=self.speaker.say(kind["comment"], **slots)
            )
        self.add(
            self.speaker.say(
                SENTENCES["tell"],
                True,
                t=self.speaker.say(kind["tell"], True, **slots),
                s=self.remark(),
            ),
            comment,
        )
        self.about = swap(self.speaker.say(kind["noun"]))
        return next(reversed(self.facts))

    def ask(self, which, answer=True):
        """The human asks for a fact."""
        say, slots = self.speaker.say, self.facts[which]
        kind, turned = KINDS[which[1]], swap if which[0] == "bot" else str
        noun = say(kind["noun"])
        question = {"q": turned(say(kind["ask"], True)), "n": turned(noun), "s": self.remark()}
        reply = say(SENTENCES["answer"], a=say(turned(say(kind["answer"])), **slots))
        self.add(
            say(SENTENCES["ask the bot" if which[0] == "bot" else "ask"], True, **question),
            reply if answer else None,
        )
        self.about = noun if which[0] == "bot" else swap(noun)  # as the bot says it

    def remark(self):
        """Return something that the human says in small talk."""
        return self.speaker.say(self.random.choice(SMALL_TALK[self.speaker.split])[1])

    def small_talk(self):
        about, human, bot = self.random.choice(SMALL_TALK[self.speaker.split])
        self.add(
            f"{self.speaker.say(SENTENCES['lead'])} {self.speaker.say(human)}".strip(),
            self.speaker.say(bot),
        )
        self.about = about

    def topic(self):
        """The human asks what the conversation was about."""
        self.add(
            self.speaker.say(SENTENCES["topic"]), self.speaker.say(SENTENCES["about"], n=self.about)
        )

    def repeat(self):
        """The human has the bot repeat some words."""
        words = [
            self.speaker.value(self.random.choice(["name", "place", "noun", "number"]))
            for _ in range(3)
        ]
        words = " ".join(words[: self.random.randrange(1, 4)])
        self.add(self.speaker.say(SENTENCES["repeat"], x=words), f"{words}.")
        self.about = None


def conversation(speaker):
    """Return the messages of a conversation in which something is told, and asked for."""
    random = speaker.random
    talk = Conversation(speaker, persona=random.choice((0, 0, 1, 2, 3)))
    for _ in range(random.randrange(2, 12)):
        chance = random.random()
        if chance < 0.3 and len(talk.facts) < 7:
            talk.tell()
        elif chance < 0.75 and talk.facts:
            facts = list(talk.facts)
            talk.ask(
                facts[min(random.randrange(len(facts)), random.randrange(len(facts)))]
            )  # rather an old one
        elif chance < 0.82 and talk.about:
            talk.topic()
        elif chance < 0.87:
            talk.repeat()
        else:
            talk.small_talk()
    if not talk.facts:
        talk.tell()
    talk.ask(random.choice(list(talk.facts)))
    return talk.messages


def probe(speaker, k):
    """Return (messages, value): a fact is told, the human asks for it `k` exchanges later, the bot has not answered.

    k = 0: it is a fact of the bot's persona. Every other exchange between tells something else, the rest is small talk.
    """
    talk = Conversation(speaker, persona=0 if k else 3)
    which = talk.tell(echo=False) if k else next(iter(talk.facts))
    for between in range(1, k):
        if between % 2:
            talk.small_talk()
        else:
            talk.tell()
    talk.ask(which, answer=False)
    return talk.messages, talk.written(talk.facts[which]["x"])


def main(config):
    if config.source:
        raise ValueError(
            f"source={config.source}: these conversations are made up, they have no source"
        )
    splits = {split: Speaker(split, config.seed) for split in ("train", "val")}
    made = ("val" if i % 20 == 0 else "train" for i in range(config.conversations))
    prepare(config, "recall", ((split, conversation(splits[split])) for split in made))


if __name__ == "__main__":
    run(main, Config)
