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
import math
import os
import random
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        """Append a list of (ids, mask), a conversation each, lists or arrays."""
        tokens = np.concatenate(
            [np.empty(0, np.uint16), *(np.asarray(ids, np.uint16) for ids, _ in conversations)]
        )
        bits = np.concatenate(
            [self._bits, *(np.asarray(mask, np.uint8) for _, mask in conversations)]
        )
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


def open_shard(path, max_conversations=0):
    """Return the shard at `path`, ours or nanoGPT's; of ours the first `max_conversations`, if not 0. Raises ValueError
    with the remedy for anything else."""
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
        raise ValueError(
            f"{path} has format version {version}, this program reads version {VERSION}: {again}"
        )
    mask_at = HEADER.size + _padded(2 * n_tokens)
    offsets_at = mask_at + _padded(-(-n_tokens // 8))
    expected = offsets_at + 8 * (n_conversations + 1)
    if size != expected:
        raise ValueError(
            f"{path} is cut short or damaged ({size} bytes, its header says {expected}): {again}"
        )
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
    if max_conversations:
        offsets = offsets[: max_conversations + 1]
    return Shard(path, tokens[: offsets[-1]], bits, offsets, template, vocab_size)


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


def find_shards(data_dir, dataset, split, shares=False):
    """Return [(path, share)] of data_dir/NAME/{split}*.bin for each NAME or NAME:SHARE in `dataset`, comma-separated.

    share: how much of it comes in an epoch, 1.0 is once; `shares` says that there may be one. Raises FileNotFoundError
    where there is none, ValueError for a share that is no positive number, or that nothing would come of.
    """
    found = []
    for part in dataset.split(","):
        name, colon, share = (text.strip() for text in part.partition(":"))
        if colon and not shares:
            raise ValueError(f"dataset={dataset}: only train.py takes shares; write {name}")
        try:
            share = float(share or 1)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise ValueError(
                f"dataset={dataset}: the share of {name} must be a positive number, as in {name}:0.5"
            )
        folder = Path(data_dir) / name
        paths = sorted(folder.glob(f"{split}*.bin"))
        if not paths:
            raise FileNotFoundError(
                f"no {folder}/{split}*.bin: make it with a script in prepare/, or set --dataset"
            )
        found += [(path, share) for path in paths]
    return found


def check_template(shard, tokenizer):
    if shard.template not in (None, tokenizer.template):
        which = f"template {shard.template}, the model in template {tokenizer.template}"
        remedy = f"prepare it again with --template={tokenizer.template}, or train with --template={shard.template}"
        raise ValueError(f"{shard.path} is in {which}: {remedy}")


def check_vocabulary(shard, token, tokenizer):
    """Raise ValueError where the largest token of a part of a shard is beyond the tokenizer's vocabulary."""
    if token >= (n := tokenizer.n_vocab):
        raise ValueError(
            f"{shard.path} has token {token}, but the tokenizer's vocabulary is {n} tokens"
        )


def sample_prompts(shards, tokenizer, n, room, seed):
    """Return ([ids of a prompt, at most `room`], [what a person replied there]), at most `n` of them: each a turn of
    another conversation, both drawn by the seed. Raises ValueError for a shard in another template, or with tokens
    that are beyond its vocabulary."""
    draw = random.Random(seed)
    shards = [shard for shard in shards if shard.template]  # text without turns has no replies
    for shard in shards:
        check_template(shard, tokenizer)
    first = np.cumsum(
        [0, *(len(shard.offsets) - 1 for shard in shards)]
    )  # the number of each shard's first one
    prompts, replies = [], []
    for number in np.random.default_rng(seed).permutation(first[-1]):
        if len(prompts) == n:
            break
        which = np.searchsorted(first, number, side="right") - 1
        shard, i = shards[which], number - first[which]
        start, stop = shard.offsets[i : i + 2].tolist()
        stop = min(stop, start + 4 * room)  # a conversation may be a book
        ids, mask = shard.tokens[start:stop].tolist(), shard.mask(start, stop).tolist()
        begins = [at for at in range(1, min(len(ids), room + 1)) if mask[at] and not mask[at - 1]]
        spans = [
            (at, ids.index(tokenizer.eos_id, at)) for at in begins if tokenizer.eos_id in ids[at:]
        ]
        if spans:
            at, end = draw.choice(spans)
            check_vocabulary(shard, max(ids[:end]), tokenizer)
            prompts.append(ids[:at])
            replies.append(tokenizer.decode(ids[at:end]).strip())
    return prompts, replies
