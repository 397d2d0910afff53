"""
Log-likelihoods of candidate replies to one context.
"""

import torch

from nanochatgpt.branches import hidden_of_branches


def continuation(tokenizer, text):
    """Return the ids of a reply after its opener, the end token included."""
    ids, mask = tokenizer.render([{"role": "assistant", "content": text}])
    return [token for token, supervised in zip(ids, mask, strict=True) if supervised]


@torch.no_grad()
def loglikelihoods(model, context, continuations):
    """Return [log-likelihood in nats] of continuations (a list of lists of ids) of the ids in
    `context`, from one forward pass.

    Raises ValueError if the context and a continuation exceed the model's context.
    """
    # the last token of each is only a target
    hidden = hidden_of_branches(model, context, [ids[:-1] for ids in continuations])  # (T, C)

    # where each token is predicted: the first one at the end of the context, which all share
    pos = []
    targets = []
    start = len(context)
    for ids in continuations:
        end = start + len(ids) - 1
        pos += [len(context) - 1, *range(start, end)]
        targets += ids
        start = end
    targets = torch.tensor(targets, device=hidden.device)  # (N,)
    logprobs = model.lm_head(hidden[pos]).float().log_softmax(-1)  # (N, V)
    logprobs = logprobs.gather(1, targets[:, None])[:, 0]
    return [part.sum().item() for part in logprobs.split([len(ids) for ids in continuations])]
