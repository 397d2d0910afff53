"""Log-likelihoods of candidate replies to one context."""

import torch
import torch.nn.functional as F

from nanochatgpt.branches import hidden_of_branches


def continuation(tokenizer, text):
    """Return the ids of a reply after its opener, the end token included."""
    ids, mask = tokenizer.render([{"role": "assistant", "content": text}])
    return ids[mask.index(1) :]  # the opener is not supervised, everything after it is


@torch.no_grad()
def loglikelihoods(model, context, continuations):
    """Return [log-likelihood in nats] of continuations ([ids]) of the ids in `context`, from one
    forward pass. The context and the longest of them must fit the model's context."""
    inputs = [ids[:-1] for ids in continuations]  # the last token of each is only a target
    hidden = hidden_of_branches(model, context, inputs)  # (T, C)

    # the position that predicts each token: for the first one, the end of the context
    pos = []  # (N,)
    targets = []  # (N,)
    start = len(context)
    for ids in continuations:
        end = start + len(ids) - 1
        pos += [len(context) - 1, *range(start, end)]
        targets += ids
        start = end

    # the log-probability of each token, summed over each continuation
    logits = model.lm_head(hidden[pos]).float()  # (N, V)
    targets = torch.tensor(targets, device=hidden.device)
    nll = F.cross_entropy(logits, targets, reduction="none")  # (N,)
    lengths = [len(ids) for ids in continuations]
    return [-part.sum().item() for part in nll.split(lengths)]
