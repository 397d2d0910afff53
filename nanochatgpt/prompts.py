"""Prompts from real conversations: what people said, up to a reply."""

import random
from itertools import pairwise

import numpy as np

from nanochatgpt.shards import check_template, check_vocabulary


def sample_prompts(shards, tokenizer, n, room, seed):
    """Return (prompts, replies) of at most n turns, each of another conversation: the ids up to the
    turn, at most `room`, and the text that a person replied. The seed draws conversation and turn.
    Raises ValueError for a shard in another template or with tokens beyond the vocabulary."""
    draw = random.Random(seed)
    conversations = []
    for shard in shards:
        check_template(shard, tokenizer)
        if shard.template:  # plain text has no replies
            for start, stop in pairwise(shard.offsets.tolist()):
                conversations.append((shard, start, stop))

    # visit the conversations of all shards in random order
    prompts = []
    replies = []
    for index in np.random.default_rng(seed).permutation(len(conversations)):
        if len(prompts) == n:
            break
        shard, start, stop = conversations[index]
        ids = shard.tokens[start:stop].tolist()
        mask = shard.mask(start, stop)

        spans = []  # the replies that begin within the room
        for pos in range(1, min(len(ids), room + 1)):
            if mask[pos] and not mask[pos - 1] and tokenizer.eos_id in ids[pos:]:
                spans.append((pos, ids.index(tokenizer.eos_id, pos)))
        if spans:  # otherwise no reply fits: try the next conversation
            pos, end = draw.choice(spans)
            check_vocabulary(shard, max(ids[:end]), tokenizer)
            prompts.append(ids[:pos])  # ends with the opener of the reply
            replies.append(tokenizer.decode(ids[pos:end]).strip())
    return prompts, replies
