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
        """shards: [(path, share)], as find_shards returns them. With config.loss=pairs, a chosen
        reply and the rejected one after it stay together. Raises ValueError for shards in another
        template or without such labels."""
        self.config = config
        self.tokenizer = tokenizer
        self.shards = [open_shard(path) for path, _ in shards]
        self.group_size = 2 if config.loss == "pairs" else 1  # replies that stay together

        labels = []
        spans = []
        for number, shard in enumerate(self.shards):
            check_template(shard, tokenizer)
            starts = shard.offsets[:-1]
            stops = shard.offsets[1:]

            # only kept replies are supervised, so the last token of a text has its label
            mask = shard.mask(0, len(shard.tokens))
            kept = mask[stops - 1]
            chosen = kept[::2]
            rejected = kept[1::2]
            paired = len(chosen) == len(rejected) and chosen.all() and not rejected.any()
            if self.group_size == 2 and not paired:
                raise ValueError(
                    f"{shard.path} does not alternate chosen and rejected replies: use loss=labels"
                )

            # where each text is
            labels.append(kept)
            numbers = np.full(len(kept), number)
            spans.append(np.stack([numbers, starts, stops], 1))

        self.labels = np.concatenate(labels)  # (n,) bool: was the reply kept?
        self.spans = np.concatenate(spans)  # (n, 3): shard, first token, last token + 1
        if self.labels.all() or not self.labels.any():
            path = self.shards[0].path
            raise ValueError(f"{path} lacks kept or other replies: make it with prepare/retry.py")
        lengths = self.spans[:, 2] - self.spans[:, 1]
        self.lengths = np.minimum(lengths, config.block_size)  # (n,) tokens of each text
        self.n_batches = math.ceil(len(self.labels) / config.batch_size)  # per epoch
        self._batches = functools.lru_cache(2)(self._batches)

    def __len__(self):
        return len(self.labels)

    def ids(self, i):
        """Return the ids of text i that are scored. Raises ValueError for an unknown token."""
        number, start, stop = self.spans[i]
        shard = self.shards[number]
        block_size = self.config.block_size

        # one token more than is scored: the last one may be the end
        start = max(start, stop - block_size - 1)
        ids = shard.tokens[start:stop].astype(np.int64)
        check_vocabulary(shard, ids.max(), self.tokenizer)
        return scored_ids(ids, self.tokenizer, block_size)

    def indices(self, number):
        """Return the indices (b,) of the replies in batch `number` (0, 1, ...)."""
        # every epoch has its own order
        epoch, batch = divmod(number, self.n_batches)
        groups = self._batches(epoch)[batch]
        first = groups * self.group_size  # the first reply of each group
        return (first[:, None] + np.arange(self.group_size)).flatten()

    def batch(self, number, device):
        """Return (idx (b, T) int64, lengths (b,) int64, labels (b,) float32) of batch `number`."""
        indices = self.indices(number)
        rows = [self.ids(i) for i in indices]
        idx, lengths = pad(rows, device)
        labels = torch.tensor(self.labels[indices], dtype=torch.float32, device=device)
        return idx, lengths, labels

    def _batches(self, epoch):
        """Return the batches of an epoch, arrays of group numbers."""
        rng = np.random.default_rng((self.config.seed, epoch))
        size = self.config.batch_size // self.group_size  # groups per batch
        order = rng.permutation(len(self) // self.group_size)
        longest = self.lengths.reshape(-1, self.group_size).max(1)  # tokens, of each group

        # sort each pool by length and cut it into batches
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            by_length = np.argsort(longest[pool], kind="stable")
            cuts = range(size, len(pool), size)
            batches += np.split(pool[by_length], cuts)

        # the batches of all pools in random order
        return [batches[i] for i in rng.permutation(len(batches))]
