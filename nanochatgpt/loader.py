"""Batches of packed conversations, as a pure function of the seed and the batch's index.

A row of block_size tokens holds several whole conversations; the model keeps them apart. Where a
conversation is too long for a row it is cut between exchanges, and each piece keeps the persona.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from nanochatgpt.shards import Shard, check_template, check_vocabulary, open_shard


@dataclass
class PackedShard:
    """A shard and the rows that its conversations are packed into."""

    shard: Shard
    pieces: np.ndarray  # (n, 4) int64: of each the tokens [a, b), its persona, and [c, d), the rest
    rows: list  # [[index of a piece]]
    rows_per_epoch: int  # len(rows) * share
    n_lost: int  # tokens in no piece, the ends of exchanges longer than a row


class Loader:
    """Batches of (x, y, documents) from shards.

    An epoch takes each row of a shard once, or as often as the shard's share says, in a new order.
    With a share of 0.5, half of the rows come in one epoch and the other half in the next.

    n_tokens: in the shards; n_lost: those in no row; n_rows: rows per epoch; fill: the part of
    their positions that hold tokens; span: token-weighted mean length of a piece.
    """

    def __init__(self, shards, batch_size, block_size, seed, tokenizer, max_conversations=0):
        """shards: [(path, share)], of each the first max_conversations (0 = all). Raises ValueError
        for a shard in another template or without supervised tokens."""
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.tokenizer = tokenizer
        self.parts = []
        for path, share in shards:
            shard = open_shard(path, max_conversations)
            check_template(shard, tokenizer)
            check_vocabulary(shard, shard.vocab_size - 1, tokenizer)
            self.parts.append(self._pack(shard, share))

        # the figures for the log, and the most documents that a batch can hold
        self.n_tokens = sum(len(part.shard.tokens) for part in self.parts)
        self.n_lost = sum(part.n_lost for part in self.parts)
        self.n_rows = sum(part.rows_per_epoch for part in self.parts)
        n_inputs = 0  # per epoch
        squares = 0  # sum of the squared lengths of the pieces, per epoch
        longest_row = 0  # pieces in the row that has the most
        for part in self.parts:
            lengths = n_inputs_of(part.pieces)
            epochs = part.rows_per_epoch / len(part.rows)  # passes over this part in one epoch
            n_inputs += epochs * lengths.sum().item()
            squares += epochs * (lengths**2).sum().item()
            longest_row = max(longest_row, *map(len, part.rows))
        self.fill = n_inputs / (self.n_rows * block_size)
        self.span = squares / n_inputs
        self.max_documents = batch_size * (longest_row + 1)  # each row's padding is one, too
        self._order = functools.lru_cache(2)(self._order)  # this epoch and the next

    def batch(self, index):
        """Return batch `index` (0, 1, ...): x, y, documents.

        x: (batch_size, block_size) int64. y: the same shape; the next token where it is supervised
        and in the same piece, else -100. documents: (max_documents + 1,) int32, cu_seqlens as in
        GPT.hidden: where each piece begins in the flattened batch; the rest is B * T.
        Raises ValueError for a token beyond the vocabulary.
        """
        B = self.batch_size
        T = self.block_size
        x = np.zeros(B * T, np.int64)
        y = np.full(B * T, -100, np.int64)  # -100: no loss
        documents = np.full(self.max_documents + 1, B * T, np.int32)
        n = 0  # documents so far
        for b in range(B):
            # rows are numbered through all epochs; look up which row this is
            epoch, row = divmod(index * B + b, self.n_rows)
            part_index, row = self._order(epoch)[row]
            part = self.parts[part_index]
            start = b * T
            for piece in part.rows[row]:
                ids, mask = read_piece(part.shard, part.pieces[piece])
                check_vocabulary(part.shard, ids.max(), self.tokenizer)
                documents[n] = start
                n += 1
                stop = start + len(ids) - 1  # the last token is only a target
                x[start:stop] = ids[:-1]
                y[start:stop] = np.where(mask[1:], ids[1:], -100)
                start = stop
            documents[n] = start  # the padding
            n += 1
        x, y = (torch.from_numpy(tokens).view(B, T) for tokens in (x, y))
        return x, y, torch.from_numpy(documents)

    def summary(self):
        """Return in one line how many tokens and rows there are, and how full the rows."""
        text = f"{self.n_tokens:,} tokens in {self.n_rows:,} rows of {self.block_size}"
        text += f", {self.fill:.1%} full"
        if self.n_lost:
            text += f"; {self.n_lost:,} tokens dropped: exchanges longer than block_size"
        return text

    def corpora(self):
        """Return [(folder, rows, share of a step)] of the folders that the shards are in."""
        corpora = []
        for folder in dict.fromkeys(part.shard.path.parent for part in self.parts):
            parts = [part for part in self.parts if part.shard.path.parent == folder]
            rows = sum(len(part.rows) for part in parts)
            share = sum(part.rows_per_epoch for part in parts) / self.n_rows
            corpora.append((folder, rows, share))
        return corpora

    def mixture(self, max_iters, rows_per_step):
        """Return a line on max_iters steps and one on each corpus, its rows, its share of a step
        and its epochs; with a warning if it has under 1% of a step or over 50 epochs."""
        n_rows = max_iters * rows_per_step
        lines = [f"{max_iters:,} steps are {n_rows / self.n_rows:,.3g} epochs"]
        for folder, rows, share in self.corpora():
            epochs = n_rows * share / rows
            name = folder.name
            lines.append(f"  {name}: {rows:,} rows, {share:.2%} of a step, {epochs:,.3g} epochs")
            if share < 0.01:
                lines.append(f"  warning: {name} is under 1% of a step: raise its share, {name}:N")
            if epochs > 50:
                problem = f"  warning: {name} is seen more than 50 times and may be memorised"
                lines.append(f"{problem}: lower its share, {name}:N, or take fewer steps")
        return "\n".join(lines)

    def _order(self, epoch):
        """Return the rows of an epoch, shuffled: [(index of the part, index of its row)]."""
        rows = []
        for i, part in enumerate(self.parts):
            # the epoch's share of an endless sequence of shuffled passes over the part
            first = epoch * part.rows_per_epoch
            indices = np.arange(first, first + part.rows_per_epoch)
            passes, index = np.divmod(indices, len(part.rows))
            # pass n has its own order, whichever epochs it falls into
            for n in np.unique(passes).tolist():
                order = np.random.default_rng((self.seed, i, n)).permutation(len(part.rows))
                rows += [(i, row) for row in order[index[passes == n]].tolist()]
        # mix the parts
        return np.random.default_rng((self.seed, epoch)).permutation(rows).tolist()

    def _pack(self, shard, share):
        """Return a PackedShard. The seed decides which pieces of equal length share a row."""
        pieces = np.random.default_rng(self.seed).permutation(self._cut(shard))
        rows = best_fit(n_inputs_of(pieces), self.block_size)

        # a persona counts once, however many pieces repeat it
        personas = np.unique(pieces[:, :2], axis=0)
        kept = (pieces[:, 3] - pieces[:, 2]).sum()
        kept += (personas[:, 1] - personas[:, 0]).sum()
        n_lost = max(0, len(shard.tokens) - kept.item())
        return PackedShard(shard, pieces, rows, max(1, round(share * len(rows))), n_lost)

    def _cut(self, shard):
        """Return the pieces of a shard, as in PackedShard; each fits a row with its target."""
        room = self.block_size + 1  # the last token of a piece is only a target
        if shard.template is None:  # plain text, one long document
            n = len(shard.tokens)
            starts = range(0, n - 1, self.block_size)
            pieces = [(start, start, start, min(start + room, n)) for start in starts]
        else:
            pieces = []
            for begin, end in pairwise(shard.offsets.tolist()):
                if end - begin <= room:  # it fits: one piece
                    if end - begin >= 2:  # one token has no target
                        pieces.append((begin, begin, begin, end))
                    continue
                # a longer one is cut; pieces without a reply teach nothing
                ids = shard.tokens[begin:end].tolist()
                for n, start, stop in self.tokenizer.cut(ids, room):
                    if shard.mask(begin + start, begin + stop).any():
                        pieces.append((begin, begin + n, begin + start, begin + stop))
        # fail here, not in a run whose loss is always 0
        if not any(shard.mask(start + 1, stop).any() for _, _, start, stop in pieces):
            problem = f"no supervised token in any piece of up to {self.block_size} tokens"
            raise ValueError(f"{shard.path} has {problem}: raise block_size, or prepare it again")
        return np.array(pieces, np.int64)


def best_fit(lengths, block_size):
    """Return rows, lists of indices into `lengths` (n,), that fill block_size well (1,024 to 97%
    with PersonaChat): each piece, the longest first, goes into the fullest row that has room."""
    rows = []
    rows_with_room = [[] for _ in range(block_size + 1)]  # [r]: the rows with room for r more
    for i in np.argsort(-lengths, kind="stable").tolist():  # the longest first
        length = lengths[i].item()
        # find the row with the least room that still fits
        room = length
        while room < block_size and not rows_with_room[room]:
            room += 1
        if rows_with_room[room]:
            row = rows_with_room[room].pop()
        else:
            row = []
            rows.append(row)
        row.append(i)
        rows_with_room[room - length].append(row)  # the row now has less room
    return rows


def n_inputs_of(pieces):
    """Return the inputs of each piece, (n,): its tokens but the last, which is only a target."""
    persona = pieces[:, 1] - pieces[:, 0]
    rest = pieces[:, 3] - pieces[:, 2]
    return persona + rest - 1


def read_piece(shard, piece):
    """Return the ids (n,) int64 of a piece and which of them are supervised (n,) bool."""
    a, b, c, d = piece.tolist()  # persona [a, b), the rest [c, d)
    parts = [shard.tokens[a:b], shard.tokens[c:d]]
    ids = np.concatenate(parts).astype(np.int64)
    mask = np.concatenate([shard.mask(a, b), shard.mask(c, d)])
    return ids, mask


def read_ahead(make, numbers):
    """Yield make(n) for each n, computing the next one in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:  # one thread: batches come in order
        pending = None
        for n in numbers:
            ready = pending
            pending = thread.submit(make, n)  # starts before the caller asks for it
            if ready:
                yield ready.result()
        if pending:
            yield pending.result()
