"""
Labelled replies from the shards of prepare/retry.py, in batches of similar length.
"""

import functools
import math

import numpy as np
import torch

from nanochatgpt.shards import check_template, check_vocabulary, open_shard
from rlhf.scoring import pad, scored_ids

POOL = 64  # sort this many batches by length together, then shuffle them


class ReplyDataset:
    """The replies of a split; a batch is a pure function of the seed and the batch's number.

    labels: (n,) bool, which replies were kept. lengths: (n,), tokens of each text, at most
    block_size. n_batches: batches per epoch.
    """

    def __init__(self, shards, tokenizer, config):
        """shards: [(path, share)], as find_shards returns them. With config.loss=pairs, a chosen
        reply and the rejected one after it stay together. Raises ValueError for shards in another
        template or without such labels."""
        pairs = config.loss == "pairs"
        self.config = config
        self.tokenizer = tokenizer
        self.shards = [open_shard(path) for path, _ in shards]
        labels = []
        spans = []
        for number, shard in enumerate(self.shards):
            check_template(shard, tokenizer)
            starts = shard.offsets[:-1]
            stops = shard.offsets[1:]
            kept = shard.mask(0, len(shard.tokens))[stops - 1]  # only kept replies are supervised
            if pairs and (len(kept) % 2 or not kept[::2].all() or kept[1::2].any()):
                raise ValueError(
                    f"{shard.path} does not alternate chosen and rejected replies: use loss=labels"
                )
            labels.append(kept)
            numbers = np.full(len(kept), number)
            spans.append(np.stack([numbers, starts, stops], 1))

        self.labels = np.concatenate(labels)  # (n,)
        self.spans = np.concatenate(spans)  # (n, 3): shard, first token, last token + 1
        lengths = self.spans[:, 2] - self.spans[:, 1]
        self.lengths = np.minimum(lengths, config.block_size)
        if self.labels.all() or not self.labels.any():
            path = self.shards[0].path
            raise ValueError(f"{path} lacks kept or other replies: make it with prepare/retry.py")
        self.unit = 2 if pairs else 1  # replies that stay together: a unit
        self.n_batches = math.ceil(len(self.labels) / config.batch_size)
        self._batches = functools.lru_cache(2)(self._batches)

    def __len__(self):
        return len(self.labels)

    def ids(self, i):
        """Return the ids of text i that are scored. Raises ValueError for an unknown token."""
        number, start, stop = self.spans[i]
        shard = self.shards[number]
        block_size = self.config.block_size
        ids = shard.tokens[max(start, stop - block_size - 1) : stop].astype(np.int64)
        check_vocabulary(shard, ids.max(), self.tokenizer)
        return scored_ids(ids, self.tokenizer, block_size)

    def indices(self, number):
        """Return the indices of the replies in batch `number` (0, 1, ...)."""
        epoch, batch = divmod(number, self.n_batches)
        first = self._batches(epoch)[batch] * self.unit  # of each unit
        return (first[:, None] + np.arange(self.unit)).flatten()

    def batch(self, number, device):
        """Return (idx (B, T) int64, lengths (B,) int64, labels (B,) float32) of batch `number`."""
        indices = self.indices(number)
        idx, lengths = pad([self.ids(i) for i in indices], device)
        labels = torch.tensor(self.labels[indices], dtype=torch.float32, device=device)
        return idx, lengths, labels

    def _batches(self, epoch):
        """Return the batches of an epoch, arrays of unit numbers."""
        rng = np.random.default_rng((self.config.seed, epoch))
        size = self.config.batch_size // self.unit  # units per batch
        order = rng.permutation(len(self) // self.unit)
        longest = self.lengths.reshape(-1, self.unit).max(1)  # of each unit
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(longest[pool], kind="stable")]
            batches += np.split(pool, range(size, len(pool), size))
        return [batches[i] for i in rng.permutation(len(batches))]
