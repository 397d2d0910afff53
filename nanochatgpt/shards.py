"""Shards: a tokenized corpus in one memory-mapped file.

    header   64 bytes: magic, version, vocabulary size, tokens, conversations, template's name
    tokens   uint16 each
    mask     one bit each, lowest bit first: 1 where the token is supervised (a reply or its end)
    offsets  uint64 each: where each conversation begins, in tokens, and where the last one ends

All numbers are little-endian, each part is padded to 8 bytes. A file without our header is read as
nanoGPT's .bin: plain text as uint16 tokens, all of them supervised.
"""

import contextlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"nanoChat"  # first bytes of our files
VERSION = 1  # of the file format
HEADER = struct.Struct("<8sIIQQ32s")  # the fields in the order above
FOREIGN = {  # first bytes -> what it is
    (20240520).to_bytes(4, "little"): "an llm.c file",
    (20240801).to_bytes(4, "little"): "an llm.c file",
    b"\x93NUMPY": "a NumPy file",
    b"\x1f\x8b\x08": "a gzip file",
    b"PK\x03\x04": "a zip file",
}


class ShardWriter:
    """Writes one shard in constant memory. With `with`, the file appears whole or not at all. If
    `state` was called, an error leaves the parts behind for another writer to go on with."""

    def __init__(self, path, vocab_size, template, state=None):
        self.path = Path(path)
        self.vocab_size = vocab_size  # tokens are below it
        self.template = template  # name of the chat template
        self.n_tokens = 0  # written so far
        self.n_conversations = 0  # written so far
        self._bits = np.empty(0, np.uint8)  # the mask's last bits, less than a byte
        self._resumable = False  # whether a state was saved
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # mask and offsets wait in files of their own until the tokens before them are complete
        name = self.path.name
        suffixes = (".part", ".mask.part", ".offsets.part")
        self._parts = [self.path.with_name(name + suffix) for suffix in suffixes]
        self._files = [open(part, "r+b" if state else "w+b") for part in self._parts]  # noqa: SIM115
        self._file, self._mask, self._offsets = self._files
        if state:
            self._resume(**state)
        else:
            self._file.write(bytes(HEADER.size))  # a placeholder until `finish` knows the counts

    def state(self):
        """Return what another writer needs to go on from here. What is written is on the disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._resumable = True
        counts = {"n_tokens": self.n_tokens, "n_conversations": self.n_conversations}
        return counts | {"bits": self._bits.tolist()}

    def _resume(self, n_tokens, n_conversations, bits):
        """Go back to a state: drop what was written after it."""
        self.n_tokens = n_tokens
        self.n_conversations = n_conversations
        self._bits = np.array(bits, np.uint8)
        self._resumable = True
        sizes = (HEADER.size + 2 * n_tokens, n_tokens // 8, 8 * n_conversations)  # bytes
        for file, size in zip(self._files, sizes, strict=True):
            file.truncate(size)
            file.seek(size)

    def write(self, conversations):
        """Append conversations, a list of (ids, mask), lists or arrays."""
        if not conversations:
            return
        # one array for the whole list: faster than many small writes
        tokens = np.concatenate([np.asarray(ids, "<u2") for ids, _ in conversations])
        masks = [np.asarray(mask, np.uint8) for _, mask in conversations]
        lengths = [len(ids) for ids, _ in conversations]
        starts = self.n_tokens + np.cumsum([0, *lengths[:-1]])  # offset of each conversation
        # whole bytes of the mask go to disk, the remaining bits wait for the next call
        bits = np.concatenate([self._bits, *masks])
        whole = len(bits) // 8 * 8  # bits
        self._bits = bits[whole:]
        self._file.write(tokens.tobytes())
        self._mask.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._offsets.write(starts.astype("<u8").tobytes())
        self.n_tokens += len(tokens)
        self.n_conversations += len(conversations)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        try:
            if not failed:  # after an error the old file stays
                self.finish()
                self._parts[0].replace(self.path)
        finally:
            for file in self._files:
                with contextlib.suppress(OSError):  # a full disk was reported already
                    file.close()
            if not (failed and self._resumable):
                for part in self._parts:
                    part.unlink(missing_ok=True)

    def finish(self):
        """Complete the file and flush it to disk. Leaving the context renames it to its place."""
        if self._file.closed:
            return
        # the last bits of the mask, and the end of the last conversation
        self._mask.write(np.packbits(self._bits, bitorder="little").tobytes())
        self._offsets.write(struct.pack("<Q", self.n_tokens))
        for part in (self._mask, self._offsets):  # they follow the tokens
            self._file.write(bytes(-self._file.tell() % 8))  # pad to 8 bytes
            part.seek(0)
            while block := part.read(1 << 20):  # 1 MB at a time
                self._file.write(block)
        # the header, now that the counts are known
        counts = (self.vocab_size, self.n_tokens, self.n_conversations)
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, *counts, self.template.encode()))
        self._file.flush()
        os.fsync(self._file.fileno())  # on the disk before it gets its name
        self._file.close()


@dataclass
class Shard:
    """One memory-mapped shard. bits: the mask, (n / 8,) uint8, None if all tokens are supervised;
    template: None for plain text."""

    path: Path
    tokens: np.ndarray  # (n,) uint16
    bits: np.ndarray | None
    offsets: np.ndarray  # (conversations + 1,) int64
    template: str | None  # name of its chat template
    vocab_size: int  # 0 if unknown

    def mask(self, start, stop):
        """Return which tokens of [start, stop) are supervised, (stop - start,) bool."""
        if self.bits is None:
            return np.ones(stop - start, bool)
        bits = np.unpackbits(self.bits[start // 8 : -(-stop // 8)], bitorder="little")
        return bits[start % 8 :][: stop - start].astype(bool)


def open_shard(path, max_conversations=0):
    """Return the Shard at `path`, ours or nanoGPT's; of ours the first max_conversations (0 = all).
    Raises ValueError with the remedy for anything else."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)  # enough to tell text from tokens
    if not head.startswith(MAGIC):
        return open_headerless(path, size, head)

    # the header, and the length it implies
    if size < HEADER.size:
        raise ValueError(f"{path} is cut short ({size} bytes, no header): prepare it again")
    _, version, vocab_size, n_tokens, n_conversations, template = HEADER.unpack(head[: HEADER.size])
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, not {VERSION}: prepare it again")
    n_mask = math.ceil(n_tokens / 8)  # bytes
    mask_at = HEADER.size + 8 * math.ceil(n_tokens / 4)  # padded to 8 bytes
    offsets_at = mask_at + 8 * math.ceil(n_mask / 8)
    expected = offsets_at + 8 * (n_conversations + 1)
    if size != expected:
        problem = f"cut short or damaged ({size} bytes instead of {expected})"
        raise ValueError(f"{path} is {problem}: prepare it again")
    if n_tokens == 0:
        raise ValueError(f"{path} holds no tokens: prepare it again")

    tokens = np.memmap(path, "<u2", "r", HEADER.size, n_tokens)
    bits = np.memmap(path, np.uint8, "r", mask_at, n_mask)
    offsets = np.memmap(path, "<u8", "r", offsets_at, n_conversations + 1).astype(np.int64)
    template = template.rstrip(b"\0").decode("ascii", "replace")
    # catch damage that leaves the length as it was
    in_order = offsets[0] == 0 and offsets[-1] == n_tokens and (np.diff(offsets) >= 0).all()
    if not in_order or not template.isidentifier():
        raise ValueError(f"{path} is damaged (its offsets or its template): prepare it again")
    if max_conversations:  # keep the first ones
        offsets = offsets[: max_conversations + 1]
    return Shard(path, tokens[: offsets[-1]], bits, offsets, template, vocab_size)


def open_headerless(path, size, head):
    """Return a nanoGPT .bin, a raw array of uint16, as one long conversation. Raises ValueError for
    what is plainly something else."""
    prepare = "make shards with the scripts in prepare/"
    remedy = f"not tokens: {prepare}"
    for magic, name in FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {name}, {remedy}")
    if size < 4 or size % 2:  # not a whole number of uint16, or too few to train on
        raise ValueError(f"{path} has no header and {size} bytes, {remedy}")
    if path.with_name("meta.pkl").exists():  # nanoGPT's character-level data sets
        raise ValueError(f"{path} has the vocabulary of the meta.pkl next to it: {prepare}")
    # the upper half of a 32-bit token is near 0; no text is half made of tokens such as ! and #
    upper = np.frombuffer(head[: len(head) // 4 * 4], "<u2")[1::2]
    if len(upper) > 2 and upper.min() == 0 and upper.max() < 16:
        raise ValueError(f"{path} has tokens of 32 bits, GPT-2's have 16: {prepare}")
    if min(head) > 8:  # half of a token file's bytes are small; text has none below tab
        raise ValueError(f"{path} looks like text, {remedy}")
    tokens = np.memmap(path, "<u2", "r")
    return Shard(path, tokens, None, np.array([0, len(tokens)]), None, 0)


def find_shards(data_dir, dataset, split, shares=False):
    """Return [(path, share)] of data_dir/NAME/{split}*.bin for each NAME, or NAME:SHARE, in the
    comma-separated `dataset`. The share says how much of it comes in an epoch, by default 1. Raises
    FileNotFoundError if there is no shard, ValueError for a share that is not a positive number."""
    shards = []
    for part in dataset.split(","):
        name, colon, share = (text.strip() for text in part.partition(":"))
        if colon and not shares:
            raise ValueError(f"dataset={dataset}: only train.py takes shares; write {name}")
        try:
            share = float(share or 1)
        except ValueError:
            share = math.nan  # fails the check below
        if not 0 < share < math.inf:
            raise ValueError(f"dataset={dataset}: a share is a positive number, as in {name}:0.5")
        folder = Path(data_dir) / name
        paths = sorted(folder.glob(f"{split}*.bin"))
        if not paths:
            remedy = "make it with a script in prepare/, or set --dataset"
            raise FileNotFoundError(f"no {folder}/{split}*.bin: {remedy}")
        shards += [(path, share) for path in paths]
    return shards


def check_template(shard, tokenizer):
    """Raise ValueError for a shard of conversations in another template than the tokenizer's."""
    if shard.template not in (None, tokenizer.template):  # None: plain text fits any
        template = tokenizer.template
        problem = f"{shard.path} is in template {shard.template}, the model in {template}"
        remedy = f"prepare it with --template={template}, or train with --template={shard.template}"
        raise ValueError(f"{problem}: {remedy}")


def check_vocabulary(shard, token, tokenizer):
    """Raise ValueError if `token`, the largest of a part of the shard, is beyond the vocabulary."""
    if token >= tokenizer.n_vocab:
        size = f"the tokenizer has only {tokenizer.n_vocab}"
        raise ValueError(f"{shard.path} has token {token}, but {size}")
