"""
From conversations to data/NAME/train.bin and val.bin: what the scripts in this folder share.

Each of them is a generator of (split, messages); `prepare` writes what it yields and reports it.
"""

import hashlib
import itertools
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochatgpt.files import replacing
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import Tokenizer
from prepare.render import render_batch


@dataclass
class Config:
    source: str = ""  # the published file or folder, where it need not be downloaded
    out_dir: str = ""  # where train.bin and val.bin go; by default data/ and the corpus's name
    template: str = "human_bot"  # one of TEMPLATES in tokenizer.py: how conversations are written


def prepare(config, name, conversations):
    """Tokenize `conversations`, an iterable of (split, messages), into a shard for each split, and print a report.

    Memory does not grow with the corpus. Raises ValueError where a split stays empty; then nothing is written.
    """
    tokenizer = Tokenizer(config.template)
    start = time.perf_counter()
    with ExitStack() as stack:
        if sys.stderr.isatty():
            stack.callback(
                print, file=sys.stderr
            )  # ends the line of the progress, whatever ends it
        writers = stack.enter_context(writing(Path(config.out_dir or f"data/{name}"), tokenizer))
        splits = {which: Split(writer) for which, writer in writers.items()}
        conversations = iter(conversations)
        reader = stack.enter_context(
            ThreadPoolExecutor(1)
        )  # the next batch is read while one is tokenized
        ahead = reader.submit(next_batch, conversations)
        while batch := ahead.result():
            ahead = reader.submit(next_batch, conversations)
            for which, split in splits.items():
                split.add([messages for w, messages in batch if w == which], tokenizer)
            if sys.stderr.isatty():
                n = sum(split.writer.n_tokens for split in splits.values())
                rate = n / (time.perf_counter() - start)
                print(f"\r{n / 1e6:.1f}M tokens, {rate:,.0f}/s", end="", file=sys.stderr)
        for which, split in splits.items():
            if not split.writer.n_conversations:
                raise ValueError(
                    f"no conversation is left for {which}.bin: at least two different ones are needed"
                )
    for split in splits.values():
        print(split.report())
    ids, mask = tokenizer.render(splits["train"].shown)
    print(
        f"A conversation as the model sees it, {len(ids)} tokens, learning «what is between these»:"
    )
    print(marked(tokenizer, ids, mask))


@contextmanager
def writing(folder, tokenizer):
    """Yield {"train": ShardWriter, "val": ShardWriter}, whose shards appear in `folder` together, or neither."""
    try:
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    ShardWriter(folder / f"{split}.bin", tokenizer.n_vocab, tokenizer.template)
                )
                for split in ("train", "val")
            }
            yield writers
            for writer in writers.values():
                writer.finish()  # both are whole before either takes its place
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(folder)  # a full disk does not say where it is
        raise
    finally:
        remove_if_empty(folder)


def remove_if_empty(folder):
    """Remove a folder that was made for what has not come about."""
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def next_batch(conversations):
    """Return the next 1,000 of (split, messages), or fewer that have 4M characters."""
    batch, size = [], 0
    for which, messages in conversations:
        batch.append((which, messages))
        size += sum(len(message["content"]) for message in messages)
        if len(batch) == 1000 or size > 4_000_000:
            break
    return batch


def prepare_text(config, name, texts):
    """Write (split, text) as nanoGPT's .bin, tokens one behind the other, all of them to be learned; print a report.

    Raises ValueError for an empty split; then nothing is written.
    """
    encode = Tokenizer().encode
    folder = Path(config.out_dir or f"data/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": 0, "val": 0}
    with ExitStack() as stack:
        stack.callback(remove_if_empty, folder)
        paths = {split: stack.enter_context(replacing(folder / f"{split}.bin")) for split in sizes}
        with ExitStack() as files:
            opened = {split: files.enter_context(open(path, "wb")) for split, path in paths.items()}
            for split, text in texts:
                tokens = np.array(encode(text), "<u2")
                opened[split].write(tokens.tobytes())
                sizes[split] += len(tokens)
        if not all(sizes.values()):
            raise ValueError(
                "no text is left for one of the splits: at least two different paragraphs or questions are needed"
            )
    for split, n in sizes.items():
        print(f"{folder / split}.bin: {n:,} tokens, all of them to be learned")


class JsonStream:
    """The values of a JSON text that is too large to hold, one after the other.

    file: a text file; `position`: how many of its characters are read. Damage is a ValueError that says where.
    """

    CHUNK, LONGEST = 1 << 20, 1 << 26  # characters that are read at once; that a value may have

    def __init__(self, file):
        self.file, self.decoder = file, json.JSONDecoder()
        self.text, self.at, self.before = "", 0, 0

    @property
    def position(self):
        return self.before + self.at

    def peek(self):
        """Return the next character but white space, "" at the end."""
        while not (match := re.compile(r"\S").search(self.text, self.at)):
            self.at = len(self.text)
            if not self._more():
                return ""
        self.at = match.start()
        return match[0]

    def expect(self, *characters):
        """Pass and return the next character but white space, which must be one of these."""
        if (found := self.peek()) not in characters or not found:
            what = f"{found!r} instead of" if found else "it ends before"
            raise ValueError(f"{what} {' or '.join(characters)} at character {self.position:,}")
        self.at += 1
        return found

    def value(self):
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # what is wrong at the very end of what was read, or a text without an end, may only be cut
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                where = self.before + error.pos
                if not cut or len(self.text) - self.at > self.LONGEST or not self._more():
                    raise ValueError(
                        f"{error.msg.removesuffix(' at')} at character {where:,}"
                    ) from None
            else:
                length = end - self.at
                if end < len(self.text) or not self._more():  # a number could go on
                    self.at += length
                    return value

    def items(self, skip=None, lists=()):
        """Yield the values of the list that begins here.

        skip: is called with the error of an object that cannot be read, and what follows it is read; else it is raised.
        lists: names of lists that may follow this one, beyond whose beginning nothing is skipped.
        """
        # where the next object begins, or the next list: within a text its quotes would be escaped
        behind = re.compile(
            r'\}\s*(?=,\s*\{\s*"|\]\s*,\s*")|(?=\]\s*,\s*"(?:' + "|".join(lists) + r')"\s*:)'
        )
        self.expect("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            try:
                yield self.value()
            except (ValueError, RecursionError) as error:
                while skip and not (match := behind.search(self.text, self.at)):
                    self.at = max(self.at, len(self.text) - 1000)  # white space may be cut
                    if not self._more():
                        skip = None
                if not skip:
                    raise
                skip(error)
                self.at = match.end()
            if self.expect(",", "]") == "]":
                return

    def _more(self):
        """Read on; return whether there was anything."""
        chunk = self.file.read(self.CHUNK)
        self.text, self.at, self.before = self.text[self.at :] + chunk, 0, self.before + self.at
        return bool(chunk)


class Split:
    """A shard that is being written, and what the report says of it."""

    def __init__(self, writer):
        self.writer = writer
        self.turns = self.supervised = self.longest = 0
        self.shown = None

    def add(self, conversations, tokenizer):
        """Tokenize and write a batch of conversations."""
        rendered = render_batch(tokenizer, conversations)
        self.writer.write(rendered)
        self.shown = self.shown or next(iter(conversations), None)
        self.turns += sum(
            message["role"] != "system" for messages in conversations for message in messages
        )
        self.supervised += sum(int(mask.sum()) for _, mask in rendered)
        self.longest = max([self.longest, *(len(ids) for ids, _ in rendered)])

    def report(self):
        w = self.writer
        return (
            f"{w.path}: {w.n_conversations:,} conversations, {self.turns:,} turns, {w.n_tokens:,} tokens, "
            f"{self.supervised / w.n_tokens:.1%} supervised, the longest {self.longest:,} tokens"
        )


def marked(tokenizer, ids, mask):
    """Return the text of `ids` with « and » around what is supervised, at most some 1,500 characters of it."""
    text = ""
    for supervised, group in itertools.groupby(
        zip(ids, mask, strict=True), key=lambda pair: pair[1]
    ):
        piece = tokenizer.decode([token for token, _ in group])
        text += f"«{piece}»" if supervised else piece
    return text if len(text) < 1500 else text[:1500] + " ..."


def divide(conversations):
    """Yield (split, messages) from (key, messages): 95 to 5 by a hash of the key, so that equal keys stay together.

    The first key goes to val and the second to train, so that neither is empty however small the corpus.
    """
    first = second = None
    for key, messages in conversations:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        first = first or digest
        second = second or (digest if digest != first else None)
        held_out = digest == first or (digest != second and int.from_bytes(digest) % 20 == 0)
        yield "val" if held_out else "train", messages


def existing(source):
    """Return the path of a --source. Raises FileNotFoundError if there is nothing."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--source={source} does not exist")
    return path
