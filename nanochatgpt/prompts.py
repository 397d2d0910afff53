"""
Prompts from real conversations: what people said, up to a reply.
"""

import random

import numpy as np

from nanochatgpt.shards import check_template, check_vocabulary


def sample_prompts(shards, tokenizer, n, room, seed):
    """Return (prompts, replies) of at most n turns, each of another conversation: the ids up to the
    turn, at most `room`, and the text that a person replied. The seed draws conversation and turn.

    Raises ValueError for a shard in another template or with tokens beyond the vocabulary.
    """
    draw = random.Random(seed)
    shards = [shard for shard in shards if shard.template]  # plain text has no replies
    for shard in shards:
        check_template(shard, tokenizer)
    first = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])  # of each shard
    prompts = []
    replies = []
    # visit the conversations of all shards in random order
    for conversation in np.random.default_rng(seed).permutation(first[-1]):
        if len(prompts) == n:
            break
        # find its shard and its place there
        shard_index = np.searchsorted(first, conversation, side="right") - 1
        shard = shards[shard_index]
        i = conversation - first[shard_index]
        start, stop = shard.offsets[i : i + 2].tolist()
        stop = min(stop, start + 4 * room)  # a conversation may be a book
        ids = shard.tokens[start:stop].tolist()
        mask = shard.mask(start, stop)

        # the replies that begin within the room and end within the part that was read
        spans = []
        for pos in range(1, min(len(ids), room + 1)):
            if mask[pos] and not mask[pos - 1] and tokenizer.eos_id in ids[pos:]:
                spans.append((pos, ids.index(tokenizer.eos_id, pos)))
        if spans:  # otherwise no reply fits: try the next conversation
            pos, end = draw.choice(spans)
            check_vocabulary(shard, max(ids[:end]), tokenizer)
            prompts.append(ids[:pos])  # ends with the opener of the reply
            replies.append(tokenizer.decode(ids[pos:end]).strip())
    return prompts, replies
