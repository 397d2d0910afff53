"""Conversations in which the human tells facts and asks for them later, in sentences of recall.txt.

A Speaker has the sentences and values of one split; train and val share none. `conversation` is
what prepare/recall.py trains on, `probe` is what evaluate.py asks.
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


@functools.cache
def gpt2_tokens(pattern):
    """Return GPT-2's tokens of a form, in order and without spaces."""
    tokens = sorted(gpt2_encoding().token_byte_values())
    return [token.decode().strip() for token in tokens if re.fullmatch(pattern, token)]


def held_out(word):
    """Return whether a word that is in no list is for val: a tenth of all, the same in each run."""
    return zlib.crc32(word.lower().encode()) % 10 == 0


class Speaker:
    """Speaks for both sides, in the sentences and values of one split. `begin` begins a
    conversation, the methods after it add exchanges to `messages`."""

    def __init__(self, split, seed):
        self.split = split
        self.random = random.Random(f"{split} {seed}")  # each split has its own sequence
        self.choice = self.random.choice
        self.chance = self.random.random  # from 0 to 1
        # ":" is the only delimiter, since values contain "="
        text = configparser.ConfigParser(delimiters=":", interpolation=None)
        text.read(Path(__file__).with_name("recall.txt"), encoding="utf-8")

        # the sentences
        self.sentences = {}  # purpose -> [sentence]
        for purpose, sentences in text["sentences"].items():
            self.sentences[purpose] = self.items(sentences)
        self.sentences["lead"][:0] = ["", "", ""]  # often there is none
        self.exchanges = []  # small talk, [(topic, human, bot)]
        for topic, exchange in text["small talk"].items():
            if (" // " in exchange) == (split == "val"):
                self.exchanges.append((topic, *re.split(" //? ", exchange)))

        # the values, and the words of both splits' values, in lower case
        self.values = {}  # kind of value -> [value]
        self.listed = set()
        for kind, values in text["values"].items():
            self.values[kind] = self.items(values, " ")
            self.listed.update(values.lower().split())

        # a section has a kind of fact for each "thing=kind of value"
        self.kinds = []  # {"values": kind of value, "tell": [sentence], "ask": ...}
        for name in text.sections():
            if name.startswith("fact"):
                section = dict(text[name])
                for pair in section.pop("each").split():
                    thing, values = pair.split("=")
                    kind = {"values": values}
                    for purpose, sentences in section.items():
                        kind[purpose] = self.items(sentences.replace("{it}", thing))
                    self.kinds.append(kind)

        # other words
        self.swaps = dict(pair.split("=") for pair in text["words"]["swap"].split())
        self.syllables = text["words"]["syllables"].split()  # of made-up names
        self.little_words = set(text["words"]["little"].split())  # people leave them out
        self.words = []  # GPT-2's tokens that begin with a space
        for word in gpt2_tokens(b" [A-Za-z][a-z]{2,}"):
            if word.lower() not in self.listed and not held_out(word):
                self.words.append(word)
        self.verbs = [word for word in self.words if re.fullmatch("[a-z]+ed", word)]  # past tense
        self.endings = gpt2_tokens(b"[a-z]{2,}")  # from inside of words

    def items(self, text, separator=" / "):
        """Return the split's items of a list in recall.txt; those after // are for val."""
        # line breaks in recall.txt are just spaces
        train, _, val = " ".join(text.split()).partition(" // ")
        return (val if self.split == "val" else train).split(separator)

    def say(self, sentences, slots=None, slips=False):
        """Return one of the sentences, or the given one, with alternatives chosen and slots filled.
        slips: in training, write every second one in haste."""
        # choose alternatives, [a|b], and verbs, before the slots are filled
        sentence = sentences if isinstance(sentences, str) else self.choice(sentences)
        sentence = re.sub(r"\[(.*?)\]", lambda match: self.choice(match[1].split("|")), sentence)
        words = re.sub("{verb}", lambda _: self.choice(self.verbs), sentence).split()
        if slips and self.split == "train" and self.chance() < 0.5:
            words = self.slip(words)
        sentence = " ".join(words)  # slots such as {x} are still open
        return " ".join(sentence.format(**slots).split()) if slots else sentence

    def swap(self, sentence):
        """Return a sentence as the other speaker says it: what is my name -> what is your name."""
        swapped = " ".join(self.swaps.get(word, word) for word in sentence.split())
        return re.sub(r"\b(tell|told|give|gave) i\b", r"\1 me", swapped)  # as an object

    def slip(self, words):
        """Return words with some of the little ones missing and some odd ones added, but not next
        to a slot. It makes the model look for what sentences have in common."""
        kept = [word for word in words if word not in self.little_words or self.chance() < 0.85]
        written = []
        previous = ""
        for word in kept:
            near_slot = "{" in previous + word
            if not near_slot and self.chance() < 0.08:
                written.append(self.choice(self.words))
            written.append(word)
            previous = word
        return written

    def remark(self):
        """Return something that the human says in small talk."""
        return self.say(self.choice(self.exchanges)[1])

    def value(self, kind):
        """Return a value of a kind, one that the other split never has."""
        if kind == "number":
            return self.invent(lambda: str(self.random.randrange(100, 1000)))
        if kind in ("thing", "title"):
            value = f"{self.value('adjective')} {self.value('noun')}"
            return value if kind == "thing" else f"The {value.title()}"
        # any word, so that the model cannot guess by what fits; a quarter do not exist, since
        # some tokens only occur inside of words
        if self.split == "train" and self.chance() < 0.4:
            if self.chance() < 0.75:
                return self.choice(self.words)
            return self.invent(lambda: self.choice(self.words) + self.choice(self.endings))
        if kind in NAME_ENDINGS and self.chance() < 0.7:
            return self.invent(lambda: self.made_up_name(NAME_ENDINGS[kind]))
        return self.choice(self.values[kind])

    def made_up_name(self, endings):
        n_syllables = self.choice((1, 2, 2, 3))
        syllables = [self.choice(self.syllables) for _ in range(n_syllables)]
        return "".join(syllables).title() + self.choice(endings)

    def invent(self, draw):
        """Return the first draw() that begins with a word of this split alone, in no list."""
        while True:
            value = draw()
            word = value.split()[0].lower()
            in_split = held_out(word) == (self.split == "val")
            if len(value) > 2 and in_split and word not in self.listed:
                return value

    # ---- a conversation

    def begin(self, n_persona=0):
        """Begin a conversation. n_persona: number of facts in the bot's persona (0 = none)."""
        self.lower = self.chance() < 0.5  # write in lower case, as people do who chat
        self.facts = []  # {"owner": "human" or "bot", "kind", "x": value, "ax": with its article}
        self.topic = None  # the last one
        self.messages = []  # as Tokenizer.render takes them
        persona = ""
        for _ in range(n_persona):
            fact = self.new_fact("bot")
            persona += f"{self.say(fact['kind']['tell'], fact)}. "
        if persona:
            self.messages.append({"role": "system", "content": self.written(persona.strip())})

    def written(self, text):
        if self.lower:
            return text.lower()
        # the sentences of recall.txt are in lower case: restore "I" and sentence starts
        text = re.sub(r"\bi\b", "I", text)
        return re.sub(r"(^|[.?!] )[a-z]", lambda match: match[0].upper(), text)

    def add(self, human, bot):
        """Add a message and its reply."""
        self.messages.append({"role": "user", "content": self.written(human)})
        self.messages.append({"role": "assistant", "content": self.written(bot)})

    def new_fact(self, owner):
        """Return a fact of a new kind and with a value of new words; add it to `facts`."""
        used_kinds = [fact["kind"] for fact in self.facts if fact["owner"] == owner]
        used_words = set()  # asking for one fact must not bring up another
        for fact in self.facts:
            used_words.update(fact["x"].lower().split())
        used_words.discard("the")
        kinds = self.kinds[:-1] if owner == "bot" else self.kinds  # the last is a code word
        while True:
            kind = self.choice(kinds)
            value = self.value(kind["values"])
            if kind not in used_kinds and used_words.isdisjoint(value.lower().split()):
                break
        article = "an" if value[0] in "aeiou" else "a"
        fact = {"owner": owner, "kind": kind, "x": value, "ax": f"{article} {value}"}
        self.facts.append(fact)
        return fact

    def tell(self, echo=True):
        """The human tells a fact; the bot comments and, if echo, may name its value. Return it."""
        fact = self.new_fact("human")
        kind = fact["kind"]
        while True:
            comment = self.say(kind["comment"], fact)  # about this kind of fact
            comment = self.say(self.sentences["comment"], {"c": comment})
            if echo or fact["x"] not in comment:
                break
        statement = self.say(kind["tell"], fact, slips=True)
        slots = {"t": statement, "s": self.remark()}
        self.add(self.say(self.sentences["tell"], slots, slips=True), comment)
        self.topic = self.swap(self.say(kind["noun"]))
        return fact

    def ask(self, fact):
        """The human asks for a fact, the bot answers with its value."""
        kind = fact["kind"]
        # the sentences are about the human's facts; swap them for the bot's
        is_bot = fact["owner"] == "bot"
        turned = self.swap if is_bot else str
        noun = self.say(kind["noun"])  # what the fact is about, such as "my name"
        question = turned(self.say(kind["ask"], slips=True))
        slots = {"q": question, "n": turned(noun), "s": self.remark()}
        statement = self.say(turned(self.say(kind["answer"])), fact)
        reply = self.say(self.sentences["answer"], {"a": statement})
        asked = self.sentences["ask the bot" if is_bot else "ask"]
        self.add(self.say(asked, slots, slips=True), reply)
        self.topic = noun if is_bot else self.swap(noun)  # as the bot says it

    def small_talk(self):
        topic, human, bot = self.choice(self.exchanges)
        lead = self.say(self.sentences["lead"])  # an interjection, often empty
        self.add(f"{lead} {self.say(human)}".strip(), self.say(bot))
        self.topic = topic  # ask_topic refers to it

    def ask_topic(self):
        """The human asks what the last topic was."""
        human = self.say(self.sentences["topic"])
        self.add(human, self.say(self.sentences["about"], {"n": self.topic}))

    def repeat(self):
        """The human has the bot repeat one to three words."""
        kinds = ["name", "place", "noun", "number"]
        words = [self.value(self.choice(kinds)) for _ in range(3)]
        words = " ".join(words[: self.random.randrange(1, 4)])  # keep one to three
        self.add(self.say(self.sentences["repeat"], {"x": words}), f"{words}.")
        self.topic = None


def conversation(speaker):
    """Return the messages of a conversation in which facts are told and asked for."""
    randrange = speaker.random.randrange
    speaker.begin(n_persona=speaker.choice((0, 0, 1, 2, 3)))  # two in five have no persona
    for _ in range(randrange(2, 12)):
        chance = speaker.chance()  # draws the next exchange
        if chance < 0.3 and len(speaker.facts) < 7:
            speaker.tell()  # 30%, up to seven facts
        elif chance < 0.75 and speaker.facts:
            n = len(speaker.facts)
            index = min(randrange(n), randrange(n))  # rather an old one
            speaker.ask(speaker.facts[index])
        elif chance < 0.82 and speaker.topic:
            speaker.ask_topic()
        elif chance < 0.87:
            speaker.repeat()  # copying practice
        else:
            speaker.small_talk()
    if not speaker.facts:
        speaker.tell()
    speaker.ask(speaker.choice(speaker.facts))  # a fact is asked for in the end
    return speaker.messages


def probe(speaker, k):
    """Return (messages, value): the human tells a value and asks for it k exchanges later;
    k = 0: the bot's persona has the value. In between, other facts and small talk take turns."""
    speaker.begin(n_persona=0 if k else 3)
    fact = speaker.tell(echo=False) if k else speaker.facts[0]  # the value occurs only once
    for number in range(1, k):
        if number % 2:
            speaker.small_talk()
        else:
            speaker.tell()
    speaker.ask(fact)
    speaker.messages.pop()  # the answer
    return speaker.messages, speaker.written(fact["x"])
