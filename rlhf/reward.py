"""
A reward model at work: what it sees of a text, and the scores of many texts or of many replies to one prompt.
"""

import torch

from nanochatgpt.branches import hidden_of_branches
from nanochatgpt.generate import generate

TOKENS = 4096  # in a batch, padding included


def scored(ids, tokenizer, size):
    """Return what is scored of a text's ids: the last `size`, without its end where that is what rows are padded with,
    as transformers does it, and so Chai's model was trained."""
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.pad_id else ids
    return ids[-size:]


def pad(rows, device="cpu"):
    """Return (idx (B, T) int64, padded on the right; lengths (B,) int64) of rows of ids, as RewardModel takes them."""
    lengths = torch.tensor([len(row) for row in rows])
    idx = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for n, row in enumerate(rows):
        idx[n, : len(row)] = torch.as_tensor(row)
    return idx.to(device), lengths.to(device)


@torch.no_grad()
def scores(model, rows):
    """Return the scores of texts, (n,) float32 on the CPU; rows are `scored` ids. Those of equal length go together."""
    device, found = model.transformer.wpe.weight.device, torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    while order:
        together = max(1, TOKENS // len(rows[order[-1]]))
        batch, order = order[-together:], order[:-together]
        found[batch] = model(*pad([rows[n] for n in batch], device)).cpu()
    return found


@torch.no_grad()
def scores_behind(model, tokenizer, context, replies):
    """Return the scores, (n,) float32 on the CPU, of replies behind the ids of one context, in one pass that computes
    the context once. replies: ids, without the end; it is scored where `scored` leaves it. Of what is too long the
    context's beginning is left out, and then the replies'."""
    if (
        len(replies) > 1 and len(context) + sum(map(len, replies)) > TOKENS
    ):  # what each sees is a matrix of all
        half = len(replies) // 2
        return torch.cat(
            [
                scores_behind(model, tokenizer, context, part)
                for part in (replies[:half], replies[half:])
            ]
        )
    size, end = (
        model.config.block_size,
        [] if tokenizer.eos_id == tokenizer.pad_id else [tokenizer.eos_id],
    )
    replies = [(ids + end)[-(size - 1) :] for ids in replies]
    context = context[-(size - max(map(len, replies))) :]
    hidden = hidden_of_branches(model, context, replies)  # (T, C)
    ends = (
        torch.tensor([len(ids) for ids in replies], device=hidden.device).cumsum(0)
        + len(context)
        - 1
    )
    # behind a reply of no tokens stands what is before it: the end of the context
    ends[[n for n, ids in enumerate(replies) if not ids]] = len(context) - 1
    return model.score_of(hidden[ends]).cpu()


def best_of(engine, reward_model, tokenizer, prompt, n, **how):
    """Return [(score, ids)] of n replies to one prompt, the best first; `how` goes to `generate`, and no row of the
    engine may run. The prompt is computed once, and the replies are decoded together, and scored together."""
    replies = generate(engine.model, [prompt] * n, engine=engine, tokenizer=tokenizer, **how)
    found = scores_behind(reward_model, tokenizer, prompt, replies).tolist()
    return sorted(zip(found, replies, strict=True), key=lambda pair: -pair[0])
