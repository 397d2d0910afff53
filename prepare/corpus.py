"""From conversations to data/NAME/train.bin and val.bin: what the scripts in this folder share.

A script makes (split, messages) pairs; `prepare` tokenizes them, writes them and prints a report.
"""

import hashlib
import itertools
import json
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochatgpt.files import naming, replacing
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer
from prepare.render import render_batch

SAVE_INTERVAL = 10  # seconds between two states of a run that can be resumed


@dataclass
class Config:
    source: str = ""  # the published file or folder; by default it is downloaded
    out_dir: str = ""  # where train.bin and val.bin go; by default data/ and the corpus's name
    template: str = "human_bot"  # how conversations are written: one of TEMPLATES in tokenizer.py


def prepare(config, name, conversations, origin=None, checkpoint=None):
    """Write (split, messages) pairs to two shards and print a report. Memory does not grow with the
    corpus. origin: see `write_origin`. checkpoint: its `state` is where to go on, its `save` keeps
    one every SAVE_INTERVAL. Raises ValueError for an empty split and writes nothing."""
    conversations = iter(conversations)
    tokenizer = Tokenizer(config.template)  # writes conversations in this template
    state = checkpoint.state if checkpoint else {}

    # tokenize and write, 1,000 conversations at a time
    with output_folder(config, name) as folder, shard_writers(folder, tokenizer, state) as writers:
        splits = {split: Split(writer, state.get(split)) for split, writer in writers.items()}
        start = time.perf_counter()
        saved = start
        while batch := list(itertools.islice(conversations, 1000)):
            rendered = render_batch(tokenizer, [messages for _, messages in batch])
            parts = {split: [] for split in splits}
            for (split, messages), ids_and_mask in zip(batch, rendered, strict=True):
                parts[split].append((messages, ids_and_mask))
            for split, shard in splits.items():
                shard.add(parts[split])
            if sys.stderr.isatty():  # progress; each line overwrites the one before
                n = sum(writer.n_tokens for writer in writers.values())
                rate = n / (time.perf_counter() - start)  # tokens per second
                print(f"{n / 1e6:.1f}M tokens, {rate:,.0f}/s", end="\r", file=sys.stderr)
            if checkpoint and time.perf_counter() > saved + SAVE_INTERVAL:
                checkpoint.save({split: shard.state() for split, shard in splits.items()})
                saved = time.perf_counter()
        for split, writer in writers.items():
            if not writer.n_conversations:  # raised in here, so that no shard appears
                raise ValueError(f"no conversation for {split}.bin: at least two are needed")
    write_origin(folder, origin)

    # report
    for shard in splits.values():
        print(shard.report())
    ids, mask = tokenizer.render(splits["train"].first)
    print(f"A conversation as the model sees it, {len(ids)} tokens, learning «what is marked»:")
    print(mark_supervised(tokenizer, ids, mask))


class Split:
    """A shard in the making, and the numbers for its report."""

    def __init__(self, writer, state=None):
        self.writer = writer  # a ShardWriter
        self.first = None  # messages of the first conversation
        self.n_turns = 0  # messages of the user and the assistant
        self.n_supervised = 0  # tokens
        self.longest = 0  # tokens of one conversation
        if state:
            vars(self).update(state["report"])

    def state(self):
        """Return what another Split needs to go on from here."""
        report = {name: value for name, value in vars(self).items() if name != "writer"}
        return {"shard": self.writer.state(), "report": report}

    def add(self, conversations):
        """Write conversations, [(messages, (ids, mask))], and count what is in them."""
        self.writer.write([ids_and_mask for _, ids_and_mask in conversations])
        for messages, (ids, mask) in conversations:
            self.first = self.first or messages
            self.n_turns += len(messages) - (messages[0]["role"] == "system")
            self.n_supervised += int(mask.sum())
            self.longest = max(self.longest, len(ids))

    def report(self):
        n_tokens = self.writer.n_tokens
        return (
            f"{self.writer.path}: {self.writer.n_conversations:,} conversations, "
            f"{self.n_turns:,} turns, {n_tokens:,} tokens, {self.n_supervised / n_tokens:.1%} "
            f"supervised, the longest {self.longest:,} tokens"
        )


def mark_supervised(tokenizer, ids, mask):
    """Return the text of `ids`, up to 1,500 characters, with « and » around what is supervised."""
    text = ""  # with the marks
    pairs = zip(ids, mask, strict=True)  # taken in runs, supervised or not
    for supervised, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run])
        text += f"«{piece}»" if supervised else piece
    return text if len(text) < 1500 else text[:1500] + " ..."


@contextmanager
def output_folder(config, name):
    """Yield the folder to write to. It exists afterwards only if something was written."""
    folder = Path(config.out_dir or f"data/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with naming(folder):  # a full disk does not say where it is
            yield folder
    finally:
        with suppress(OSError):  # not empty
            folder.rmdir()


@contextmanager
def shard_writers(folder, tokenizer, state=None):
    """Yield {"train": ShardWriter, "val": ShardWriter}. Both shards appear at the end, or none."""
    shape = (tokenizer.n_vocab, tokenizer.template)  # stored in a shard's header
    train_state = state and state["train"]["shard"]
    val_state = state and state["val"]["shard"]
    with (
        ShardWriter(folder / "train.bin", *shape, train_state) as train,
        ShardWriter(folder / "val.bin", *shape, val_state) as val,
    ):
        yield {"train": train, "val": val}
        train.finish()  # both are complete before either is renamed
        val.finish()


def prepare_text(config, name, texts, origin=None):
    """Write (split, text) pairs as nanoGPT's .bin files, tokens end to end, all supervised. None
    ends a document. origin: see `write_origin`. Raises ValueError, and writes nothing, for an empty
    split."""
    tokenizer = Tokenizer()
    n_tokens = {"train": 0, "val": 0}  # per split
    with (
        output_folder(config, name) as folder,
        replacing(folder / "train.bin") as train_path,
        replacing(folder / "val.bin") as val_path,
    ):
        # `replacing` gives the files their names only if all goes well
        with open(train_path, "wb") as train, open(val_path, "wb") as val:
            files = {"train": train, "val": val}
            for split, text in texts:
                ids = [END_OF_TEXT] if text is None else tokenizer.encode(text)
                tokens = np.array(ids, "<u2")  # (n,) uint16, little-endian
                files[split].write(tokens.tobytes())
                n_tokens[split] += len(tokens)
        if not all(n_tokens.values()):
            raise ValueError("no text for one of the splits: at least two are needed")
    write_origin(folder, origin)
    for split, n in n_tokens.items():
        print(f"{folder / split}.bin: {n:,} tokens, all supervised")


def write_origin(folder, origin):
    """Write source.json, from which train.py's model card takes the data set's origin: a dict of
    texts, "name" and, as far as they are known, "url", "licence", "language" (as in "en") and
    "hub", its id on the Hugging Face hub. None, for private data, leaves no file."""
    path = folder / "source.json"
    if origin is None:
        path.unlink(missing_ok=True)  # of another corpus that was here
        return
    with replacing(path) as part:
        part.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def divide(conversations, digests=None):
    """Yield (split, messages) from (key, messages). A hash of the key puts 5% of the keys in val.
    The first key goes to val and the second to train, so that neither is empty. digests: {digest of
    each of these two: split}, empty at first, for a later call to go on."""
    digests = {} if digests is None else digests
    for key, messages in conversations:
        # 8 bytes, the same on every machine
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        if len(digests) < 2:  # an equal key changes nothing
            digests.setdefault(digest, "train" if digests else "val")
        default = "val" if int(digest, 16) % 20 == 0 else "train"  # one in twenty
        yield digests.get(digest, default), messages


def existing(source):
    """Return the path of a --source. Raises FileNotFoundError if it does not exist."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--source={source} does not exist")
    return path
