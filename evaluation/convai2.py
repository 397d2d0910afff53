"""
ConvAI2's own convai2_metrics on PersonaChat: which of 20 candidates a model would say, and its perplexity.

Dinan et al. 2019, arXiv 1902.00098. PUBLISHED: TransferTransfo (arXiv 1901.08149), a GPT of 117M parameters with a head
of its own for ranking, on the hidden test set; its authors' code, transfer-learning-conv-ai, on the validation set.
Their perplexities are a word of ConvAI2's dictionary, without the end; ours a token of GPT-2's, with it.
"""

import torch

from evaluation.metrics import perplexity
from nanochatgpt.branches import hidden_of_branches
from nanochatgpt.tokenizer import fit_context

PUBLISHED = {
    "TransferTransfo": {"persona_perplexity": 16.28, "hits_1": 0.807, "f1": 0.195},
    "conv-ai": {"persona_perplexity": 20.5, "hits_1": 0.79, "f1": 0.165},
}


@torch.no_grad()
def loglikelihoods(model, context, continuations):
    """Return [log-likelihood in nats] of continuations (a list of ids each) behind the ids of a context.

    Raises ValueError where they do not fit into the model's context.
    """
    longest = len(context) + max(map(len, continuations)) - 1
    if longest > model.config.block_size:
        raise ValueError(f"{longest} tokens, but the model has {model.config.block_size} positions")
    # the last token of each is only a target
    hidden = hidden_of_branches(model, context, [ids[:-1] for ids in continuations])  # (T, C)
    at, first = [], len(context)
    for ids in continuations:  # where each of its tokens is predicted
        at += [len(context) - 1, *range(first, first + len(ids) - 1)]
        first += len(ids) - 1
    targets = torch.tensor([token for ids in continuations for token in ids], device=hidden.device)
    logprobs = model.lm_head(hidden[at]).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return [part.sum().item() for part in logprobs.split([len(ids) for ids in continuations])]


def continuation(tokenizer, text):
    """Return the ids of a reply behind its opener, its end among them."""
    ids, mask = tokenizer.render([{"role": "assistant", "content": text}])
    return [token for token, supervised in zip(ids, mask, strict=True) if supervised]


def convai2_metrics(model, tokenizer, lines, context, shown):
    """Return {hits_1, persona_perplexity, plain_perplexity} over lines as prepare/personachat.py's `examples` has them.

    hits_1: the share of lines whose reply has the highest log-likelihood a token of the candidates, which is how ParlAI
    ranks with a model that generates; None where no line has candidates. Perplexity is that of the replies' tokens of
    GPT-2's vocabulary, the end token too, with the persona before the conversation and without it. context: tokens that
    a line may have at most, older turns are left out. shown(n) is called behind each line.
    """
    hits = ranked = n = 0
    nll = {"persona_perplexity": 0.0, "plain_perplexity": 0.0}
    for number, (persona, said, reply, candidates) in enumerate(lines, 1):
        replies = [continuation(tokenizer, text) for text in [*candidates[:-1], reply]]
        room = context - max(map(len, replies)) + 1
        system = [{"role": "system", "content": persona}] if persona else []
        scores = loglikelihoods(model, fit_context(tokenizer, system + said, room)[0], replies)
        nll["persona_perplexity"] -= scores[-1]
        nll["plain_perplexity"] -= loglikelihoods(
            model, fit_context(tokenizer, said, room)[0], replies[-1:]
        )[0]
        if candidates:
            means = [score / len(ids) for score, ids in zip(scores, replies, strict=True)]
            hits, ranked = hits + (means[-1] == max(means)), ranked + 1
        n += len(replies[-1])
        shown(number)
    return {"hits_1": hits / ranked if ranked else None} | {
        name: perplexity(total / n) for name, total in nll.items()
    }
