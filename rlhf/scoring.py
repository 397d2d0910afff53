"""Scores of a reward model: of texts, of replies to one prompt; and the best of N replies."""

import torch

from nanochatgpt.branches import hidden_of_branches
from nanochatgpt.generate import generate

BATCH_TOKENS = 4096  # tokens in a forward pass, padding included


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
    idx = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for b, row in enumerate(rows):
        idx[b, : len(row)] = torch.as_tensor(row)
    return idx.to(device), lengths.to(device)


@torch.no_grad()
def score_texts(model, texts):
    """Return the scores (n,) float32, on the CPU, of texts, each what scored_ids returns."""
    device = model.transformer.wpe.weight.device
    scores = torch.empty(len(texts))  # (n,)

    # batch texts of similar length, the longest first
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    while order:
        longest = len(texts[order[-1]])
        size = max(1, BATCH_TOKENS // longest)
        batch = order[-size:]
        order = order[:-size]
        rows = [texts[i] for i in batch]
        idx, lengths = pad(rows, device)
        scores[batch] = model(idx, lengths).cpu()
    return scores


@torch.no_grad()
def score_replies(model, tokenizer, prompt, replies):
    """Return the scores (n,) float32, on the CPU, of n replies to one prompt, which is read once.

    replies: ids without the end token. If a text is too long, the beginning of the prompt is left
    out, then the beginning of the reply.
    """
    # the attention mask is quadratic in the tokens of a pass: split what is too long
    n_tokens = len(prompt) + sum(map(len, replies))
    if n_tokens > BATCH_TOKENS and len(replies) > 1:
        half = len(replies) // 2
        first = score_replies(model, tokenizer, prompt, replies[:half])
        second = score_replies(model, tokenizer, prompt, replies[half:])
        return torch.cat([first, second])

    # cut as scored_ids cuts whole texts
    end = [] if tokenizer.eos_id == tokenizer.pad_id else [tokenizer.eos_id]
    block_size = model.config.block_size
    replies = [(ids + end)[1 - block_size :] for ids in replies]
    longest = max(map(len, replies))
    prompt = prompt[longest - block_size :]
    hidden = hidden_of_branches(model, prompt, replies)  # (T, C)

    # score the last token of each text; an empty reply has the prompt's
    last = []  # (n,) positions in T
    stop = len(prompt)
    for ids in replies:
        stop += len(ids)
        last.append(stop - 1 if ids else len(prompt) - 1)
    scores = model.score_of(hidden[last])
    return scores.cpu()


def best_of(
    engine, reward_model, tokenizer, prompt, n, sampling, *, seed=None, stop_ids=(), stop_strings=()
):
    """Return [(score, ids)] of n replies to a prompt, the best first. The engine must be idle."""
    # the prompt is read once; the replies are decoded together and scored together
    options = {"seed": seed, "stop_ids": stop_ids, "stop_strings": stop_strings}
    options |= {"tokenizer": tokenizer, "engine": engine}
    replies = generate(engine.model, [prompt] * n, sampling, **options)
    scores = score_replies(reward_model, tokenizer, prompt, replies).tolist()

    # highest score first; ties keep the order of their seeds
    return sorted(zip(scores, replies, strict=True), key=lambda pair: -pair[0])
