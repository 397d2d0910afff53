"""
Batches of packed conversations, as a pure function of the seed and the batch's number.
"""

import functools
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from nanochatgpt.shards import Shard, check_template, check_vocabulary, open_shard


def read_ahead(make, numbers):
    """Yield make(n) for each n; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for n in numbers:
            ready, pending = pending, thread.submit(make, n)
            if ready:
                yield ready.result()
        if pending:
            yield pending.result()


@dataclass
class Packed:
    """A shard whose conversations are packed into rows."""

    shard: Shard
    pieces: (
        np.ndarray
    )  # (pieces, 4) int64: the persona's first and last + 1, the rest's first and last + 1
    rows: np.ndarray  # (rows + 1,): the first piece of each row
    taken: int  # rows in an epoch
    n_lost: int  # tokens in no piece: the ends of exchanges that are too long

    def __len__(self):
        return len(self.rows) - 1

    @property
    def lengths(self):
        """The inputs of each piece, (pieces,): the last token is only a target."""
        return self.pieces @ [-1, 1, -1, 1] - 1


class Loader:
    """Batches of (x, y, documents) from shards, a pure function of the seed and the batch's number.

    Rows are packed with whole conversations, longer ones cut into pieces that are conversations too (Tokenizer.cut).
    An epoch has every row of a shard once, or as often as its share says, in an order of its own: of a shard with share
    0.5 one half comes in an epoch and the other in the next. n_tokens: tokens in the shards; n_lost: those that are in
    no row; n_rows: rows of an epoch; fill: share of their positions that hold tokens; span: the mean, over tokens, of
    the length of the piece that each is in.
    """

    SLACK = 8  # positions that two pieces which fill a row may leave over

    def __init__(self, shards, batch_size, block_size, seed, tokenizer, max_conversations=0):
        """shards: [(path, share)]; of each the first `max_conversations`, if not 0. Raises ValueError where one is in
        another template than the tokenizer's or has nothing to learn, `batch` where one holds tokens beyond its
        vocabulary."""
        self.batch_size, self.block_size, self.seed, self.tokenizer = (
            batch_size,
            block_size,
            seed,
            tokenizer,
        )
        self.parts = [
            self._pack(open_shard(path, max_conversations), share) for path, share in shards
        ]
        self.n_tokens = sum(len(part.shard.tokens) for part in self.parts)
        self.n_lost = sum(part.n_lost for part in self.parts)
        self.n_rows = sum(part.taken for part in self.parts)
        filled, squares = (
            sum((part.lengths**power).sum().item() / len(part) * part.taken for part in self.parts)
            for power in (1, 2)
        )
        self.fill, self.span = filled / (self.n_rows * block_size), squares / filled
        # in a batch, at most: one more than the pieces of each row, for the padding behind them
        self.max_documents = batch_size * (
            1 + max(np.diff(part.rows).max().item() for part in self.parts)
        )
        self._order = functools.lru_cache(2)(self._order)

    def batch(self, number):
        """Return batch `number` (0, 1, ...): x, y, documents.

        x: (batch_size, block_size) int64. y: alike; the next token where that one is supervised and in the same
        conversation, else -100. documents: (max_documents + 1,) int32, where in the rows laid end to end each
        conversation begins, as GPT.hidden takes it; batch_size * block_size behind the last.
        """
        B, T = self.batch_size, self.block_size
        x, y = np.zeros(B * T, np.int64), np.full(B * T, -100, np.int64)
        documents = []
        for b in range(B):
            epoch, row = divmod(number * B + b, self.n_rows)
            part, row = self._order(epoch)[row]
            part, at = self.parts[part], b * T
            for first, last, start, stop in part.pieces[
                part.rows[row] : part.rows[row + 1]
            ].tolist():
                ids = np.concatenate(
                    [part.shard.tokens[first:last], part.shard.tokens[start:stop]]
                ).astype(np.int64)
                mask = np.concatenate([part.shard.mask(first, last), part.shard.mask(start, stop)])
                documents.append(at)
                end = at + len(ids) - 1
                x[at:end] = ids[:-1]
                y[at:end] = np.where(mask[1:], ids[1:], -100)
                check_vocabulary(part.shard, ids.max(), self.tokenizer)
                at = end
            documents.append(at)  # of the padding
        documents += [B * T] * (self.max_documents + 1 - len(documents))
        return *(torch.from_numpy(t).view(B, T) for t in (x, y)), torch.tensor(
            documents, dtype=torch.int32
        )

    def counts(self, n_vocab):
        """Return how often each token comes in an epoch, (n_vocab,) float64."""
        counts = np.zeros(n_vocab)
        for part in self.parts:
            tokens = part.shard.tokens
            for at in range(0, len(tokens), 1 << 24):  # bincount takes 8 bytes for each
                some = tokens[at : at + (1 << 24)]
                check_vocabulary(part.shard, some.max(), self.tokenizer)
                counts += np.bincount(some, minlength=n_vocab) * (part.taken / len(part))
        return counts

    def _order(self, epoch):
        """Return the rows of an epoch in their order: [(number of the part, of the row in it)]."""
        rows = []
        for number, part in enumerate(self.parts):
            passes, at = np.divmod(
                np.arange(epoch * part.taken, (epoch + 1) * part.taken), len(part)
            )
            for n in range(passes[0], passes[-1] + 1):
                order = np.random.default_rng((self.seed, number, n)).permutation(len(part))
                rows += [(number, row) for row in order[at[passes == n]].tolist()]
        return np.random.default_rng((self.seed, epoch)).permutation(rows).tolist()

    def _pack(self, shard, share):
        """Return the shard's conversations packed into rows: the longest that fits, and so on, until two fill the rest.

        PersonaChat's rows of 1,024 get 98.1% full, and 96.7% by putting the longest first into the fullest row.
        """
        check_template(shard, self.tokenizer)
        check_vocabulary(shard, shard.vocab_size - 1, self.tokenizer)
        pieces = np.random.default_rng(self.seed).permutation(self._pieces(shard))
        personas = np.unique(pieces[:, :2], axis=0)  # each once, whatever the pieces
        kept = (pieces[:, 3] - pieces[:, 2]).sum() + (personas[:, 1] - personas[:, 0]).sum()
        packed = Packed(shard, pieces, None, 0, max(0, len(shard.tokens) - kept.item()))
        of_length = defaultdict(list)
        for i, length in enumerate(packed.lengths.tolist()):
            of_length[length].append(i)
        there = np.zeros(self.block_size + 1, bool)  # whether a piece of that length is left
        there[list(of_length)] = True
        order, sizes = [], []  # the pieces row by row, and how many each row has
        while there.any():
            room, before = self.block_size, len(order)
            while (fitting := np.flatnonzero(there[: room + 1])).size:
                chosen = [fitting[-1]]
                for total in range(room, max(room - self.SLACK, chosen[0], 1), -1):
                    pairs = np.flatnonzero(
                        there[:total] & there[total:0:-1]
                    )  # lengths a with a total - a
                    pairs = [
                        a for a in pairs[:2].tolist() if 2 * a != total or len(of_length[a]) > 1
                    ]
                    if pairs:
                        chosen = [pairs[0], total - pairs[0]]
                        break
                for length in map(int, chosen):
                    order.append(of_length[length].pop())
                    there[length] = bool(of_length[length])
                    room -= length
            sizes.append(len(order) - before)
        packed.pieces, packed.rows = pieces[order], np.cumsum([0, *sizes])
        packed.taken = max(1, round(share * len(packed)))
        return packed

    def _pieces(self, shard):
        """Return what the rows of a shard are packed with, as Packed.pieces, in the shard's order."""
        room = self.block_size + 1
        starts, stops = shard.offsets[:-1], shard.offsets[1:]
        if shard.template is None:  # text, which is one long document
            if len(shard.tokens) < 2:
                raise ValueError(
                    f"{shard.path} has nothing to learn, it is a single token: prepare it again"
                )
            cuts = np.arange(0, stops[-1] - 1, self.block_size)
            return np.stack([cuts, cuts, cuts, np.minimum(cuts + room, stops[-1])], 1)
        fits = (stops - starts >= 2) & (stops - starts <= room)
        pieces = [np.stack([starts, starts, starts, stops], 1)[fits]]
        long = stops - starts > room
        for begin, end in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
            cut = self.tokenizer.cut(shard.tokens[begin:end].tolist(), room)
            cut = [(begin, begin + n, begin + start, begin + stop) for n, start, stop in cut]
            pieces.append(
                np.array(
                    [piece for piece in cut if shard.mask(*piece[2:]).any()], np.int64
                ).reshape(-1, 4)
            )
        pieces = np.concatenate(pieces)
        if not any(shard.mask(start + 1, stop).any() for _, _, start, stop in pieces.tolist()):
            raise ValueError(
                f"{shard.path} has nothing to learn in {self.block_size} tokens: raise block_size"
            )
        return pieces
