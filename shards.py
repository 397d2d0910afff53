"""
Shards: tokenized corpora in one memory-mappable file each, and batches from them.

    header   64 bytes: magic, version, vocabulary size, number of tokens, number of conversations, template's name
    tokens   uint16, one each
    mask     one bit each, lowest bit first: 1 where the token is supervised (a reply or its end)
    offsets  uint64, one for each conversation and one more: where it begins, in tokens

All little-endian, each part padded to 8 bytes; a file of another length than its header implies is refused. A file
without our header is read as nanoGPT's: plain text as uint16 tokens, all of them supervised.
"""

import contextlib
import os
import struct
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

MAGIC, VERSION = b"nanoChat", 1
HEADER = struct.Struct("<8sIIQQ32s")
FOREIGN = {
    (20240520).to_bytes(4, "little"): "an llm.c file",
    (20240801).to_bytes(4, "little"): "an llm.c file",
    b"\x1f\x8b\x08": "a gzip file",
    b"PK\x03\x04": "a zip file",
}


def _padded(n):
    return -(-n // 8) * 8


class ShardWriter:
    """Writes one shard; memory does not grow with it. A context manager: the file appears whole or not at all."""

    def __init__(self, path, vocab_size, template):
        self.path, self._template, self._vocab_size = Path(path), template, vocab_size
        self.n_tokens = self.n_conversations = 0
        self._bits = np.empty(0, np.uint8)  # mask not written yet, less than a byte
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(self.path.name + ".part")
        self._file = open(self._part, "wb")  # noqa: SIM115
        self._file.write(bytes(HEADER.size))
        self._mask = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        self._offsets = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115

    def write(self, conversations):
        """Append a list of (ids, mask), a conversation each."""
        tokens = np.fromiter(chain.from_iterable(ids for ids, _ in conversations), np.uint16)
        bits = np.fromiter(chain.from_iterable(mask for _, mask in conversations), np.uint8)
        bits = np.concatenate([self._bits, bits])
        whole = len(bits) // 8 * 8
        self._bits = bits[whole:]
        starts = np.cumsum([self.n_tokens] + [len(ids) for ids, _ in conversations], dtype="<u8")
        self._file.write(tokens.astype("<u2").tobytes())
        self._mask.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._offsets.write(starts[:-1].tobytes())
        self.n_tokens += len(tokens)
        self.n_conversations += len(conversations)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        try:
            if not failed:
                self.finish()
                self._part.replace(self.path)
        finally:
            for file in (self._file, self._mask, self._offsets):
                with contextlib.suppress(OSError):  # a full disk was reported already
                    file.close()
            self._part.unlink(missing_ok=True)

    def finish(self):
        """Bring the whole shard to the disk, beside its place; at the end of the context it is renamed into it."""
        if self._file.closed:
            return
        self._mask.write(np.packbits(self._bits, bitorder="little").tobytes())
        self._offsets.write(struct.pack("<Q", self.n_tokens))
        for part in (self._mask, self._offsets):
            self._file.write(bytes(-self._file.tell() % 8))
            part.seek(0)
            while block := part.read(1 << 20):
                self._file.write(block)
        self._file.seek(0)
        name = self._template.encode()
        counts = (self.n_tokens, self.n_conversations)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._vocab_size, *counts, name))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@dataclass
class Shard:
    """One shard, memory-mapped: tokens (n,) uint16, mask bits (n / 8,) uint8 or None, offsets (conversations + 1,)."""

    path: Path
    tokens: np.ndarray
    bits: np.ndarray | None
    offsets: np.ndarray
    template: str | None
    vocab_size: int

    def mask(self, start, stop):
        """Return which tokens of [start, stop) are supervised, (stop - start,) bool."""
        if self.bits is None:
            return np.ones(stop - start, bool)
        bits = np.unpackbits(self.bits[start // 8 : -(-stop // 8)], bitorder="little")
        return bits[start % 8 :][: stop - start].astype(bool)


def open_shard(path):
    """Return the shard at `path`, ours or nanoGPT's. Raises ValueError with the remedy for anything else."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)
    if size == 0:
        raise ValueError(f"{path} is empty: prepare it again")
    if not head.startswith(MAGIC):
        return _open_headerless(path, size, head)
    again = "prepare it again"
    if size < HEADER.size:
        raise ValueError(f"{path} is cut short ({size} bytes, less than its header): {again}")
    _, version, vocab_size, n_tokens, n_conversations, template = HEADER.unpack(head[: HEADER.size])
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, this program reads version {VERSION}: {again}")
    mask_at = HEADER.size + _padded(2 * n_tokens)
    offsets_at = mask_at + _padded(-(-n_tokens // 8))
    expected = offsets_at + 8 * (n_conversations + 1)
    if size != expected:
        raise ValueError(f"{path} is cut short or damaged ({size} bytes, its header says {expected}): {again}")
    if n_tokens == 0:
        raise ValueError(f"{path} holds no tokens: {again}")
    tokens = np.memmap(path, "<u2", "r", HEADER.size, n_tokens)
    bits = np.memmap(path, np.uint8, "r", mask_at, -(-n_tokens // 8))
    offsets = np.memmap(path, "<u8", "r", offsets_at, n_conversations + 1).astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != n_tokens or (np.diff(offsets) < 0).any():
        raise ValueError(f"{path} is damaged (its conversations do not follow each other): {again}")
    template = template.rstrip(b"\0").decode("ascii", "replace")
    if not template.isidentifier():
        raise ValueError(f"{path} is damaged (its template's name is {template!r}): {again}")
    return Shard(path, tokens, bits, offsets, template, vocab_size)


def _open_headerless(path, size, head):
    """Return a nanoGPT .bin, a raw array of uint16, as one long conversation; refuse what is plainly something else."""
    remedy = "not tokens: make shards with the scripts in prepare/"
    for magic, name in FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {name}, {remedy}")
    if size % 2:
        raise ValueError(f"{path} has no header and an odd length ({size} bytes), {remedy}")
    if min(head) > 8:  # half of a token file's bytes are small; text has none below tab
        raise ValueError(f"{path} looks like text, {remedy}")
    tokens = np.memmap(path, "<u2", "r")
    return Shard(path, tokens, None, np.array([0, len(tokens)]), None, 0)


def find_shards(data_dir, dataset, split):
    """Return the paths of data_dir/NAME/{split}*.bin for each NAME in `dataset`, which is a comma-separated list."""
    paths = []
    for name in dataset.split(","):
        folder = Path(data_dir) / name.strip()
        found = sorted(folder.glob(f"{split}*.bin"))
        if not found:
            raise FileNotFoundError(f"no {folder}/{split}*.bin: make it with a script in prepare/, or set --dataset")
        paths += found
    return paths


class Loader:
    """Batches of (x, y) from shards, a pure function of the seed and the batch's number.

    Conversations are cut into pieces of at most `block_size` tokens; the pieces, shuffled once, fill rows one after
    the other, whole. Each epoch visits every row once, in an order of its own. `y` is the next token where that one
    is supervised and in the same conversation, else -100. Conversations in one row see those before them, as in
    nanoGPT. n_tokens: tokens in the shards; n_rows: rows of an epoch; fill: share of their positions that are tokens.
    """

    def __init__(self, paths, batch_size, block_size, seed, vocab_size):
        """Raises ValueError where shards differ in template, hold tokens beyond `vocab_size`, or nothing to learn."""
        self.shards = [open_shard(path) for path in paths]
        self.batch_size, self.block_size, self.seed, self.vocab_size = batch_size, block_size, seed, vocab_size
        templates = {shard.template: shard.path for shard in self.shards if shard.template}
        if len(templates) > 1:
            raise ValueError(" but ".join(f"{path} is in template {name}" for name, path in templates.items()))
        self.template = next(iter(templates), None)
        for shard in self.shards:
            self._check(shard, shard.vocab_size - 1)
        if not any(shard.bits is None or shard.bits.any() for shard in self.shards):
            raise ValueError(f"{paths[0]} has no supervised token: there is nothing to learn from it")

        pieces = []  # (shard, start, stop, end of the conversation)
        for number, shard in enumerate(self.shards):
            starts, stops = shard.offsets[:-1], shard.offsets[1:]
            count = np.maximum(0, -(-(stops - starts - 1) // block_size))  # the last token is only a target
            first = np.repeat(np.cumsum(count) - count, count)
            start = np.repeat(starts, count) + (np.arange(count.sum()) - first) * block_size
            end = np.repeat(stops, count)
            pieces.append(np.stack([np.full_like(start, number), start, np.minimum(start + block_size, end), end], 1))
        self.pieces = np.random.default_rng(seed).permutation(np.concatenate(pieces))  # (pieces, 4)
        if len(self.pieces) == 0:
            raise ValueError(f"{paths[0]} has no conversation of two tokens or more: there is nothing to learn from it")
        self.rows, filled = [], block_size  # first piece of each row
        for i, length in enumerate((self.pieces[:, 2] - self.pieces[:, 1]).tolist()):
            if filled + length > block_size:
                self.rows.append(i)
                filled = 0
            filled += length
        self.n_rows, self.n_tokens = len(self.rows), sum(len(shard.tokens) for shard in self.shards)
        self.fill = (self.pieces[:, 2] - self.pieces[:, 1]).sum().item() / (self.n_rows * block_size)
        self.rows.append(len(self.pieces))
        self._epoch, self._order = -1, None

    def batch(self, number):
        """Return batch `number` (0, 1, ...): x, y, both (batch_size, block_size) int64."""
        x = np.zeros((self.batch_size, self.block_size), np.int64)
        y = np.full_like(x, -100)
        for b in range(self.batch_size):
            row = self._row(number * self.batch_size + b)
            at = 0
            for shard, start, stop, end in self.pieces[self.rows[row] : self.rows[row + 1]].tolist():
                shard = self.shards[shard]
                n = stop - start
                x[b, at : at + n] = shard.tokens[start:stop]
                targets = shard.tokens[start + 1 : min(stop + 1, end)].astype(np.int64)  # n, or n - 1 at the end
                mask = shard.mask(start + 1, start + 1 + len(targets))
                y[b, at : at + len(targets)] = np.where(mask, targets, -100)
                self._check(shard, max(targets.max(), x[b, at]))
                at += n
        return torch.from_numpy(x), torch.from_numpy(y)

    def _row(self, i):
        epoch, i = divmod(i, self.n_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n_rows)
        return self._order[i]

    def _check(self, shard, token):
        if token >= self.vocab_size:
            raise ValueError(f"{shard.path} has token {token}, but the model's vocabulary is {self.vocab_size} tokens")
