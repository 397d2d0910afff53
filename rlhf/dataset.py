"""Labelled replies from the shards of prepare/retry.py, in batches of similar length."""

import functools
import math
from itertools import pairwise

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
        template, with unknown tokens, or without such labels."""
        self.config = config
        self.group_size = 2 if config.loss == "pairs" else 1  # replies that stay together
        self.tokenizer = tokenizer
        self.texts = []  # ids of each, uint16 on the disk
        labels = []
        for path, _ in shards:
            shard = open_shard(path)
            check_template(shard, tokenizer)
            check_vocabulary(shard, shard.tokens.max(), tokenizer)
            tokens = np.asarray(shard.tokens)
            mask = shard.mask(0, len(tokens))
            for start, stop in pairwise(shard.offsets.tolist()):
                if start < stop:
                    self.texts.append(tokens[start:stop])
                    labels.append(mask[stop - 1])  # only kept replies are supervised

        self.labels = np.array(labels, np.float32)  # (n,), 1: the reply was kept
        if self.labels.all() or not self.labels.any():
            raise ValueError(f"{path} lacks kept or other replies: make it with prepare/retry.py")
        if config.loss == "pairs" and labels != [True, False] * (len(labels) // 2):
            raise ValueError(f"{path} is not chosen and rejected replies in turn: use loss=labels")
        self.groups = np.arange(len(labels)).reshape(-1, self.group_size)  # of replies
        lengths = [len(text) for text in self.texts]
        self.lengths = np.minimum(lengths, config.block_size)  # (n,) tokens that are scored
        self.n_batches = math.ceil(len(lengths) / config.batch_size)  # per epoch
        self._batches = functools.lru_cache(2)(self._batches)

    def batch(self, number, device):
        """Return (idx (b, T) int64, lengths (b,) int64, labels (b,) float32) of batch `number`."""
        epoch, batch = divmod(number, self.n_batches)  # every epoch has its own order
        indices = self.groups[self._batches(epoch)[batch]].flatten()  # (b,)
        texts = [self.texts[i].tolist() for i in indices]
        rows = [scored_ids(ids, self.tokenizer, self.config.block_size) for ids in texts]
        idx, lengths = pad(rows, device)
        labels = torch.from_numpy(self.labels[indices]).to(device)
        return idx, lengths, labels

    def _batches(self, epoch):
        """Return the batches of an epoch, arrays of group numbers."""
        rng = np.random.default_rng((self.config.seed, epoch))
        longest = torch.from_numpy(self.lengths[self.groups].max(1))  # tokens, of each group
        order = torch.from_numpy(rng.permutation(len(longest)))
        size = self.config.batch_size // self.group_size  # groups per batch

        # sort each pool by length and cut it into batches
        batches = []
        for pool in order.split(POOL * size):
            pool = pool[longest[pool].argsort(stable=True)]
            batches += pool.split(size)
        return [batches[i].numpy() for i in rng.permutation(len(batches))]  # in random order
