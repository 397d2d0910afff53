"""Many continuations of one context in a single forward pass, for ranking and scoring replies.

The context and all continuations stand in one row. Each continuation sees the context and itself,
not the others, so the context is computed once and there is no padding.
"""

import torch
import torch.nn.functional as F


def hidden_of_branches(model, context, continuations):
    """Return the final hidden states (T, C) of the context and, after it, of each continuation;
    T is the number of ids altogether. context: a list of ids; continuations: a list of lists of
    ids. Raises ValueError if the context and one of them exceed the model's context."""
    n = len(context)
    longest = n + max(map(len, continuations), default=0)
    block_size = model.config.block_size
    if longest > block_size:
        raise ValueError(f"a row of {longest} tokens exceeds the context of {block_size}")

    # branch 0 is the context; positions go on from its end in each continuation
    ids = list(context)
    positions = list(range(n))  # position of each id
    branch = [0] * n  # branch of each id
    for i, continuation in enumerate(continuations, 1):
        ids += continuation
        positions += range(n, n + len(continuation))
        branch += [i] * len(continuation)

    device = model.transformer.wpe.weight.device
    idx, positions, branch = torch.tensor([ids, positions, branch], device=device)  # (T,) each
    # each token sees the context and its own branch, up to itself
    mask = (branch == 0) | (branch == branch[:, None])  # (T, T)
    mask = mask.tril()

    def attend(layer, q, k, v, dropout):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return model.hidden(idx[None], positions=positions[None], attend=attend)[0]
