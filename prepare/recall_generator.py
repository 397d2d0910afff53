"""
Conversations in which the human tells facts and asks for them later; recall.txt has the sentences.

A Speaker draws sentences and values for one split; train and val share none. `conversation` is what
prepare/recall.py trains on, `probe` is what evaluate.py asks.
"""

import configparser
import functools
import random
import re
import zlib
from pathlib import Path

from nanochatgpt.tokenizer import gpt2_encoding

NAME_ENDINGS = {  # of made-up names
    "name": ["n", "l", "r", "s", "a", "o", "y", "ie", "", "", ""],
    "place": ["ville", "ton", "burg", "stad", "land", "ford", " City", "field"],
}


class Tables:
    """The vocabulary of the conversations, from recall.txt and GPT-2's tokens."""

    def __init__(self):
        # ":" is the only delimiter, since values contain "="
        text = configparser.ConfigParser(delimiters=":", interpolation=None)
        text.read(Path(__file__).with_name("recall.txt"), encoding="utf-8")

        # the sentences
        self.sentences = {}  # purpose -> {split: [sentence]}
        for purpose, sentences in text["sentences"].items():
            self.sentences[purpose] = by_split(sentences)
        for leads in self.sentences["lead"].values():
            leads[:0] = ["", "", ""]  # often there is none
        self.small_talk = {"train": [], "val": []}  # split -> [(topic, human, bot)]
        for topic, exchange in text["small talk"].items():
            split = "val" if " // " in exchange else "train"
            self.small_talk[split].append((topic, *re.split(" //? ", exchange)))

        # the words
        self.swap = dict(pair.split("=") for pair in text["words"]["swap"].split())
        self.syllables = text["words"]["syllables"].split()  # of made-up names
        self.little_words = set(text["words"]["little"].split())  # people leave them out
        self.values = {}  # kind of value -> {split: [value]}
        self.listed = set()  # words of all values, in lower case
        for kind, values in text["values"].items():
            self.values[kind] = by_split(values, " ")
            self.listed.update(values.lower().split())

        # a section is one kind of fact, or one for each "thing=kind of value" in `each`
        self.kinds = []  # {"values": kind of value, "tell": {split: [sentence]}, "ask": ...}
        for name in text.sections():
            if name.startswith("fact"):
                section = dict(text[name])
                values = section.pop("values", "")
                for pair in section.pop("each", f"={values}").split():
                    thing, _, values = pair.partition("=")
                    kind = {key: by_split(s.replace("{it}", thing)) for key, s in section.items()}
                    self.kinds.append(kind | {"values": values})

        # the tokens that are words or parts of words
        self.words = []  # with a space before them
        self.endings = []  # tokens from inside of words
        for token in sorted(gpt2_encoding().token_byte_values()):
            if re.fullmatch(b" [A-Za-z][a-z]{2,}", token):
                word = token[1:].decode()
                if word.lower() not in self.listed and not held_out(word):
                    self.words.append(word)
            elif re.fullmatch(b"[a-z]{2,}", token):
                self.endings.append(token.decode())
        # past tense
        self.verbs = [word for word in self.words if word.islower() and word.endswith("ed")]


@functools.cache
def tables():
    return Tables()  # built once: it goes through all of GPT-2's tokens


def by_split(text, separator=" / "):
    """Return {split: [item]} of a list in recall.txt; the items after // are for val."""
    # line breaks in recall.txt are just spaces
    train, _, val = " ".join(text.split()).partition(" // ")
    return {"train": train.split(separator), "val": val.split(separator)}


def held_out(word):
    """Return whether a word that is in no list is for val."""
    # a tenth of all words, the same in every run
    return zlib.crc32(word.lower().encode()) % 10 == 0


def swap(sentence):
    """Return a sentence as the other speaker says it: what is my name -> what is your name."""
    swapped = " ".join(tables().swap.get(word, word) for word in sentence.split())
    return re.sub(r"\b(tell|told|give|gave) i\b", r"\1 me", swapped)  # as an object


class Speaker:
    """Draws sentences and values for one split."""

    def __init__(self, split, seed):
        self.split = split
        self.random = random.Random(f"{split} {seed}")  # each split has its own sequence
        self.tables = tables()

    def say(self, sentences, slots=None, slips=False):
        """Return a sentence: one of {split: [sentence]}, or the given one, with its alternatives
        chosen and its slots filled. slips: in training, write every second one in haste."""
        choice = self.random.choice
        if isinstance(sentences, dict):
            sentences = choice(sentences[self.split])

        # choose alternatives, [a|b], and verbs, before the slots are filled
        sentence = re.sub(r"\[(.*?)\]", lambda match: choice(match[1].split("|")), sentences)
        words = re.sub("{verb}", lambda _: choice(self.tables.verbs), sentence).split()
        if slips and self.split == "train" and self.random.random() < 0.5:
            words = self.slip(words)
        sentence = " ".join(words)  # slots such as {x} are still open
        return " ".join(sentence.format(**slots).split()) if slots else sentence

    def slip(self, words):
        """Return words with some of the little ones missing and some odd ones added, but not next
        to a slot. It makes the model look for what sentences have in common."""
        # leave out little words
        kept = []
        for word in words:
            if word not in self.tables.little_words or self.random.random() < 0.85:
                kept.append(word)

        # add odd ones
        written = []
        for word in kept:
            if "{" not in word + "".join(written[-1:]) and self.random.random() < 0.08:
                written.append(self.random.choice(self.tables.words))
            written.append(word)
        return written

    def any_word(self):
        """Return a word. A quarter do not exist, since some tokens only occur inside of words."""
        if self.random.random() < 0.75:
            return self.random.choice(self.tables.words)
        while True:
            word = self.random.choice(self.tables.words) + self.random.choice(self.tables.endings)
            if word.lower() not in self.tables.listed and not held_out(word):
                return word

    def made_up_name(self, kind):
        choice = self.random.choice
        while True:
            n_syllables = choice((1, 2, 2, 3))
            syllables = [choice(self.tables.syllables) for _ in range(n_syllables)]
            name = "".join(syllables).title() + choice(NAME_ENDINGS[kind])
            word = name.split()[0]  # so that no place of one split is a name of the other
            in_split = held_out(word) == (self.split == "val")
            if len(name) > 2 and in_split and word.lower() not in self.tables.listed:
                return name

    def value(self, kind):
        """Return a value of a kind, one that the other split never has."""
        if kind == "number":
            while True:
                number = str(self.random.randrange(100, 1000))
                if held_out(number) == (self.split == "val"):
                    return number
        if kind == "title":
            return f"The {self.value('adjective').title()} {self.value('noun').title()}"
        if kind == "thing":
            return f"{self.value('adjective')} {self.value('noun')}"
        if self.split == "train" and self.random.random() < 0.4:
            return self.any_word()  # so that the model cannot guess by what fits
        if kind in NAME_ENDINGS and self.random.random() < 0.7:
            return self.made_up_name(kind)
        return self.random.choice(self.tables.values[kind][self.split])


class Conversation:
    """A conversation that grows by one exchange at a time, in `messages`."""

    def __init__(self, speaker, n_persona=0):
        """n_persona: number of facts in the bot's persona (0 = it has none)."""
        self.speaker = speaker
        self.say = speaker.say
        self.random = speaker.random
        self.tables = speaker.tables
        self.lower = self.random.random() < 0.5  # write in lower case, as people do who chat
        self.facts = {}  # ("human" or "bot", number of the kind) -> slots of its sentences
        self.topic = None  # the last one
        self.messages = []  # as Tokenizer.render takes them

        # the persona
        persona = ""
        for _ in range(n_persona):
            kind, slots = self.new_fact("bot")
            persona += f"{self.say(kind['tell'], slots)}. "
        if persona:
            self.messages.append({"role": "system", "content": self.written(persona.strip())})

    def written(self, text):
        if self.lower:
            return text.lower()
        # the sentences of recall.txt are in lower case: restore "I" and sentence starts
        text = re.sub(r"\bi\b", "I", text)
        return re.sub(r"(^|[.?!] )[a-z]", lambda match: match[0].upper(), text)

    def add(self, human, bot=None):
        """Add a message and its reply, if there is one."""
        self.messages.append({"role": "user", "content": self.written(human)})
        if bot is not None:
            self.messages.append({"role": "assistant", "content": self.written(bot)})

    def new_fact(self, owner):
        """Return (kind, slots) of a fact, of a new kind and with a value of new words."""
        # words of the values so far: asking for one fact must not bring up another
        used_words = set()
        for slots in self.facts.values():
            used_words.update(slots["x"].lower().split())
        used_words.discard("the")
        kinds = self.tables.kinds[:-1] if owner == "bot" else self.tables.kinds  # no code word
        while True:
            number = self.random.randrange(len(kinds))
            value = self.speaker.value(kinds[number]["values"])
            used = used_words & set(value.lower().split())
            # no kind twice, and no value with a word of another value
            if (owner, number) not in self.facts and not used:
                break
        article = "an" if value[0] in "aeiou" else "a"  # of "ax", the value with its article
        self.facts[owner, number] = {"x": value, "ax": f"{article} {value}"}
        return kinds[number], self.facts[owner, number]

    def tell(self, echo=True):
        """The human tells a fact, the bot comments. Return the fact's key in `facts`.

        echo: the comment may name the value.
        """
        sentences = self.tables.sentences
        kind, slots = self.new_fact("human")  # a fact that has not come up yet

        # the comment, then the statement: the order of the draws decides what a seed makes
        comment = None
        while comment is None or (not echo and slots["x"] in comment):
            comment = self.say(sentences["comment"], {"c": self.say(kind["comment"], slots)})
        statement = self.say(kind["tell"], slots, slips=True)
        human = self.say(sentences["tell"], {"t": statement, "s": self.remark()}, slips=True)
        self.add(human, comment)
        self.topic = swap(self.say(kind["noun"]))
        return next(reversed(self.facts))

    def ask(self, fact, answer=True):
        """The human asks for a fact, a key of `facts`."""
        owner, number = fact
        kind = self.tables.kinds[number]
        turned = swap if owner == "bot" else str  # sentences are about the human's facts
        noun = self.say(kind["noun"])  # what the fact is about, such as "my name"
        question = turned(self.say(kind["ask"], slips=True))
        slots = {"q": question, "n": turned(noun), "s": self.remark()}
        # the bot answers with the value that it was told
        statement = self.say(turned(self.say(kind["answer"])), self.facts[fact])
        reply = self.say(self.tables.sentences["answer"], {"a": statement})
        asked = self.tables.sentences["ask the bot" if owner == "bot" else "ask"]
        self.add(self.say(asked, slots, slips=True), reply if answer else None)
        self.topic = noun if owner == "bot" else swap(noun)  # as the bot says it

    def remark(self):
        """Return something that the human says in small talk."""
        return self.say(self.random.choice(self.tables.small_talk[self.speaker.split])[1])

    def small_talk(self):
        topic, human, bot = self.random.choice(self.tables.small_talk[self.speaker.split])
        lead = self.say(self.tables.sentences["lead"])  # an interjection, often empty
        self.add(f"{lead} {self.say(human)}".strip(), self.say(bot))
        self.topic = topic  # ask_topic refers to it

    def ask_topic(self):
        """The human asks what the last topic was."""
        human = self.say(self.tables.sentences["topic"])
        self.add(human, self.say(self.tables.sentences["about"], {"n": self.topic}))

    def repeat(self):
        """The human has the bot repeat one to three words."""
        kinds = ["name", "place", "noun", "number"]
        words = [self.speaker.value(self.random.choice(kinds)) for _ in range(3)]
        words = " ".join(words[: self.random.randrange(1, 4)])  # keep one to three
        self.add(self.say(self.tables.sentences["repeat"], {"x": words}), f"{words}.")
        self.topic = None


def conversation(speaker):
    """Return the messages of a conversation in which facts are told and asked for."""
    random = speaker.random
    # two conversations in five have no persona
    talk = Conversation(speaker, n_persona=random.choice((0, 0, 1, 2, 3)))
    for _ in range(random.randrange(2, 12)):
        # draw the next exchange
        chance = random.random()
        if chance < 0.3 and len(talk.facts) < 7:
            talk.tell()  # 30%, up to seven facts
        elif chance < 0.75 and talk.facts:
            facts = list(talk.facts)
            n = len(facts)
            talk.ask(facts[min(random.randrange(n), random.randrange(n))])  # rather an old one
        elif chance < 0.82 and talk.topic:
            talk.ask_topic()
        elif chance < 0.87:
            talk.repeat()  # copying practice
        else:
            talk.small_talk()

    # a fact is asked for in the end
    if not talk.facts:
        talk.tell()
    talk.ask(random.choice(list(talk.facts)))
    return talk.messages


def probe(speaker, k):
    """Return (messages, value): the human tells a value and asks for it k exchanges later.

    k = 0: the bot's persona has the value. In between, other facts and small talk take turns.
    """
    talk = Conversation(speaker, n_persona=0 if k else 3)
    # the value may occur only once, in the statement
    fact = talk.tell(echo=False) if k else next(iter(talk.facts))
    for number in range(1, k):
        if number % 2:  # small talk and other facts in turn
            talk.small_talk()
        else:
            talk.tell()
    talk.ask(fact, answer=False)
    return talk.messages, talk.written(talk.facts[fact]["x"])
