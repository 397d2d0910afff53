"""Labelled replies from the shards of prepare/retry.py, in batches of similar length."""

import functools
import math

import numpy as np
import torch

from nanochatgpt.shards import check_template, check_vocabulary, open_shard
from rlhf.scoring import pad, scored_ids

POOL = 64  # sort this many batches by length together, then shuffle them


class ReplyDataset:
    """The replies of a split; a batch is a pure function of the seed and the batch's number."""

    def __init__(self, shards, tokenizer, config):
        """shards: [(path, share)], as find_shards returns them. Raises ValueError for shards in
        another template or without such labels."""
        self.config = config
        self.tokenizer = tokenizer
        self.shards = []
        labels = []
        spans = []
        for path, _ in shards:
            shard = open_shard(path)
            check_template(shard, tokenizer)
            starts = shard.offsets[:-1]
            stops = shard.offsets[1:]
            number = np.full(len(starts), len(self.shards))
            spans.append(np.stack([number, starts, stops], 1))
            # only kept replies are supervised, so the last token of a text has its label
            mask = shard.mask(0, len(shard.tokens))
            labels.append(mask[stops - 1])
            self.shards.append(shard)

        self.labels = np.concatenate(labels)  # (n,) bool: was the reply kept?
        self.spans = np.concatenate(spans)  # (n, 3): shard, first token, last token + 1
        if self.labels.all() or not self.labels.any():
            raise ValueError(f"{path} lacks kept or other replies: make it with prepare/retry.py")
        lengths = self.spans[:, 2] - self.spans[:, 1]
        self.lengths = np.minimum(lengths, config.block_size)  # (n,) tokens of each text
        self.n_batches = math.ceil(len(lengths) / config.batch_size)  # per epoch
        self._batches = functools.lru_cache(2)(self._batches)

    def ids(self, i):
        """Return the ids of text i that are scored. Raises ValueError for an unknown token."""
        number, start, stop = self.spans[i]
        shard = self.shards[number]
        # one token more than is scored: the last one may be the end
        start = max(start, stop - self.config.block_size - 1)
        ids = shard.tokens[start:stop].tolist()
        check_vocabulary(shard, max(ids), self.tokenizer)
        return scored_ids(ids, self.tokenizer, self.config.block_size)

    def batch(self, number, device):
        """Return (idx (b, T) int64, lengths (b,) int64, labels (b,) float32) of batch `number` (0,
        1, ...)."""
        # every epoch has its own order
        epoch, batch = divmod(number, self.n_batches)
        indices = self._batches(epoch)[batch]  # (b,)
        rows = [self.ids(i) for i in indices]
        idx, lengths = pad(rows, device)
        labels = torch.tensor(self.labels[indices], dtype=torch.float32, device=device)
        return idx, lengths, labels

    def _batches(self, epoch):
        """Return the batches of an epoch, arrays of indices."""
        rng = np.random.default_rng((self.config.seed, epoch))
        order = rng.permutation(len(self.labels))
        size = self.config.batch_size

        # sort each pool by length and cut it into batches
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += np.split(pool, range(size, len(pool), size))

        # the batches of all pools in random order
        return [batches[i] for i in rng.permutation(len(batches))]
