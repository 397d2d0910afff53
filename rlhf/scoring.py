"""Scores of a reward model: of texts, of replies to one prompt; and the best of N replies."""

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochatgpt.branches import hidden_of_branches
from nanochatgpt.generate import generate

BATCH_SIZE = 32  # texts in a forward pass


def scored_ids(ids, tokenizer, block_size):
    """Return the part of a text that is scored: the last block_size ids, without the end token if
    rows are padded with it, as in transformers and for Chai's model."""
    # a text of nothing but its end keeps it
    if len(ids) > 1 and ids[-1] == tokenizer.pad_id:
        ids = ids[:-1]
    return ids[-block_size:]


def pad(rows, device="cpu"):
    """Return (idx (B, T) int64, padded on the right; lengths (B,) int64) of rows of ids."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    idx = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return idx.to(device), lengths.to(device)


@torch.no_grad()
def score_texts(model, tokenizer, texts):
    """Return the scores (n,) float32, on the CPU, of texts, lists of ids."""
    rows = [scored_ids(ids, tokenizer, model.config.block_size) for ids in texts]
    scores = []
    for start in range(0, len(rows), BATCH_SIZE):
        idx, lengths = pad(rows[start : start + BATCH_SIZE], model.score.weight.device)
        scores.append(model(idx, lengths).cpu())
    return torch.cat(scores)


@torch.no_grad()
def score_replies(model, tokenizer, prompt, replies):
    """Return the scores (n,) float32, on the CPU, of n replies to one prompt, which is read once.
    replies: ids without the end token. A text that is too long loses the beginning of the prompt,
    then of the reply."""
    # the prompt's last token begins each branch, so an empty reply has a score too
    block_size = model.config.block_size
    end = [] if tokenizer.eos_id == tokenizer.pad_id else [tokenizer.eos_id]
    branches = []
    for ids in replies:
        branch = prompt[-1:] + ids + end
        branches.append(branch[1 - block_size :])
    longest = max(map(len, branches))
    context = prompt[:-1][longest - block_size :]
    hidden = hidden_of_branches(model, context, branches)  # (T, C)
    lengths = torch.tensor([len(ids) for ids in branches])  # (n,)
    last = len(context) + lengths.cumsum(0) - 1  # (n,), the last token of each branch
    return model.score_of(hidden[last]).cpu()


def best_of(engine, reward_model, tokenizer, prompt, n, sampling, seed=None):
    """Return [(score, ids)] of n replies to a prompt, the best first. The engine must be idle."""
    # the prompt is read once; the replies are decoded together and scored together
    options = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    options |= {"seed": seed, "tokenizer": tokenizer, "engine": engine}
    replies = generate(engine.model, [prompt] * n, sampling, **options)
    scores = score_replies(reward_model, tokenizer, prompt, replies).tolist()
    scored = zip(scores, replies, strict=True)
    return sorted(scored, key=lambda pair: -pair[0])  # ties keep the order of their seeds
