"""
From conversations to data/NAME/train.bin and val.bin: what the scripts in this folder share.

Each of them is a generator of (split, messages); `prepare` writes what it yields and reports it.
"""

import hashlib
import itertools
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts here are run as python prepare/NAME.py

from shards import ShardWriter
from tokenizer import Tokenizer


@dataclass
class Config:
    source: str = ""  # the published file or folder, where it need not be downloaded
    out_dir: str = ""  # where train.bin and val.bin go; by default data/ and the corpus's name
    template: str = "human_bot"  # how conversations are written: human_bot or user_assistant


def prepare(config, name, conversations):
    """Tokenize `conversations`, an iterable of (split, messages), into a shard for each split, and print a report.

    Memory does not grow with the corpus. Raises ValueError where a split stays empty; then nothing is written.
    """
    tokenizer = Tokenizer(config.template)
    folder = Path(config.out_dir or f"data/{name}")
    start = time.perf_counter()
    try:
        with ExitStack() as stack:
            if sys.stderr.isatty():
                stack.callback(print, file=sys.stderr)  # ends the line of the progress, whatever ends it
            splits = {}
            for which in ("train", "val"):
                writer = ShardWriter(folder / f"{which}.bin", tokenizer.n_vocab, tokenizer.template)
                splits[which] = Split(stack.enter_context(writer))
            conversations = iter(conversations)
            while batch := list(itertools.islice(conversations, 1000)):
                for which, split in splits.items():
                    split.add([messages for w, messages in batch if w == which], tokenizer)
                if sys.stderr.isatty():
                    n = sum(split.writer.n_tokens for split in splits.values())
                    rate = n / (time.perf_counter() - start)
                    print(f"\r{n / 1e6:.1f}M tokens, {rate:,.0f}/s", end="", file=sys.stderr)
            for which, split in splits.items():
                if not split.writer.n_conversations:
                    raise ValueError(f"no conversation is left for {which}.bin: at least two different ones are needed")
            for split in splits.values():
                split.writer.finish()  # both are whole before either takes its place
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(folder)  # a full disk does not say where it is
        raise
    for split in splits.values():
        print(split.report())
    ids, mask = tokenizer.render(splits["train"].shown)
    print(f"A conversation as the model sees it, {len(ids)} tokens, learning «what is between these»:")
    print(marked(tokenizer, ids, mask))


class Split:
    """A shard that is being written, and what the report says of it."""

    def __init__(self, writer):
        self.writer = writer
        self.turns = self.supervised = self.longest = 0
        self.shown = None

    def add(self, conversations, tokenizer):
        """Tokenize and write a batch of conversations."""
        rendered = tokenizer.render_batch(conversations)
        self.writer.write(rendered)
        self.shown = self.shown or next(iter(conversations), None)
        self.turns += sum(message["role"] != "system" for messages in conversations for message in messages)
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
    for supervised, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
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
