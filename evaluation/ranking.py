"""Log-likelihoods of candidate replies to one context."""

import torch

from nanochatgpt.branches import hidden_of_branches


def continuation(tokenizer, text):
    """Return the ids of a reply after its opener, the end token included."""
    message = {"role": "assistant", "content": text}
    ids, mask = tokenizer.render([message])
    start = mask.index(1)  # the opener is not supervised, everything after it is
    return ids[start:]


@torch.no_grad()
def loglikelihoods(model, context, continuations):
    """Return [log-likelihood in nats] of continuations (a list of lists of ids) of the ids in
    `context`, from one forward pass. The context and the longest of them must fit the model's
    context."""
    # the last token of each is only a target
    inputs = [ids[:-1] for ids in continuations]
    hidden = hidden_of_branches(model, context, inputs)  # (T, C)

    # the position that predicts each token: for the first one, the end of the context
    pos = []  # (N,)
    targets = []  # (N,)
    start = len(context)
    for ids in continuations:
        end = start + len(ids) - 1
        pos.append(len(context) - 1)
        pos += range(start, end)
        targets += ids
        start = end

    # the log-probability of each token, then the sum over each continuation
    targets = torch.tensor(targets, device=hidden.device)
    logits = model.lm_head(hidden[pos]).float()  # (N, V)
    logprobs = logits.log_softmax(-1)
    logprobs = logprobs.gather(1, targets[:, None])[:, 0]  # (N,)
    sums = []
    for part in logprobs.split([len(ids) for ids in continuations]):
        sums.append(part.sum().item())
    return sums
