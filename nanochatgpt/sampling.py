"""
The next token: what the options are, what they do to the logits, and the draw.
"""

import math
from collections import Counter
from dataclasses import dataclass, fields, replace

import torch

CANDIDATES = 1024  # tokens that `sample` sorts at first: a tenth of the time for all 50,257


@dataclass
class Sampling:
    """How the next token is chosen. Names and meaning are transformers', of the two penalties after them OpenAI's."""

    max_new_tokens: int = 128  # new tokens, at most
    temperature: float = (
        1.0  # below 1 is more predictable, above 1 more random; 0 takes the likeliest token
    )
    top_k: int = 0  # draw from the so many likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that have this much probability together
    min_p: float = (
        0.0  # draw from the tokens that have this share of the likeliest one's probability
    )
    repetition_penalty: float = (
        1.0  # above 1 makes tokens less likely that were there before, in the prompt too
    )
    presence_penalty: float = (
        0.0  # subtracted from the logit of each token that is among the new ones
    )
    frequency_penalty: float = 0.0  # subtracted for each time that a token is among the new ones
    no_repeat_ngram_size: int = 0  # so many tokens never come twice in the same order; 0: they may

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        for name, allowed, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 or more"),
        ):
            if not allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: it must be {expected}"
                )


@dataclass
class ChatSampling(Sampling):
    """What a chat starts from, chosen by evaluate.py's figures of the model in the box (BENCHMARKS.md).

    A frequency penalty on what the reply itself has said: 0.6% of 4-grams are repeated, without it 20%. A repetition
    penalty of 1.1 in its place leaves 5.1%, and weighs down what the human has said as well, and with it what is to be
    remembered.
    """

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.8
    frequency_penalty: float = 0.7


def options_of(config):
    """Return the fields of a Sampling, {name: value}, of a config that has them."""
    return {field.name: getattr(config, field.name) for field in fields(Sampling)}


# with what the models of another template were shown: gpt2-conversational-or-qa's card
OF_TEMPLATE = {
    "user_assistant": {"temperature": 1.0, "top_k": 35, "top_p": 0.80, "frequency_penalty": 0.0}
}


def for_template(config, template):
    """Return the config of a chat, with the sampling of that template where the person who talks has given none."""
    given = getattr(config, "given", ())
    changed = {
        name: value for name, value in OF_TEMPLATE.get(template, {}).items() if name not in given
    }
    return replace(config, **changed)


def penalize(logits, options, rows):
    """Put the bias and the penalties of `options` on the logits (B, V), in place, of rows, each (ids of the prompt, new
    ids, logit bias {id: number}).

    In transformers' order: bias, repetition_penalty (CTRL, arXiv 1909.05858), then OpenAI's presence and frequency
    penalty, then no_repeat_ngram_size. Ids of the prompt that the logits do not reach are passed over.
    """
    o, V = options, logits.size(-1)

    def at(found):
        """Return the index of (row, id, ...) in the logits; all rows at once are as fast as one."""
        where = torch.tensor([place[:2] for place in found], dtype=torch.long, device=logits.device)
        return tuple(where.view(-1, 2).T)

    def add(found):
        if found:
            logits[at(found)] += torch.tensor([value for *_, value in found], device=logits.device)

    add([(n, token, value) for n, (_, _, bias) in enumerate(rows) for token, value in bias.items()])
    if o.repetition_penalty != 1:
        seen = at(
            [(n, t) for n, (prompt, new, _) in enumerate(rows) for t in {*prompt, *new} if t < V]
        )
        values = logits[seen]
        logits[seen] = torch.where(
            values < 0, values * o.repetition_penalty, values / o.repetition_penalty
        )
    if o.presence_penalty or o.frequency_penalty:
        counts = [
            (n, token, count)
            for n, (_, new, _) in enumerate(rows)
            for token, count in Counter(new).items()
        ]
        add(
            [
                (n, token, -o.presence_penalty - o.frequency_penalty * count)
                for n, token, count in counts
            ]
        )
    if size := o.no_repeat_ngram_size:
        banned = []
        for n, (prompt, new, _) in enumerate(rows):
            ids = [*prompt, *new]
            begun = ids[len(ids) - size + 1 :]  # the size - 1 newest
            ends = (
                ids[i + size - 1]
                for i in range(len(ids) - size + 1)
                if ids[i : i + size - 1] == begun
            )
            banned += [(n, token) for token in ends if token < V]
        logits[at(banned)] = -math.inf


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, candidates=CANDIDATES):
    """Return one id a row, (B,) int64, drawn from logits (B, V) float32 by uniform (B,) in [0, 1).

    Temperature, then top_k, top_p, min_p, in transformers' order; the draw inverts the cumulative distribution. Of
    the whole vocabulary only the likeliest `candidates` are sorted, where these decide: the result is the same.
    """
    if temperature < 1e-5:  # dividing by less could overflow
        return logits.argmax(-1)
    V = logits.size(-1)
    k = min(top_k or candidates, V)
    falling, ids = logits.topk(k)  # (B, k)
    falling = falling / temperature
    all_there = bool(top_k) or k == V  # else tokens behind the candidates may be kept too
    p = (
        falling.softmax(-1)
        if all_there
        else (falling - (logits / temperature).logsumexp(-1, keepdim=True)).exp()
    )
    filtered = top_p < 1 or min_p > 0
    if filtered:
        kept = (p.cumsum(-1) - p < top_p) & (p >= min_p * p[:, :1])  # the first always is
        p = torch.where(kept, p, 0.0)
    cumulative = p.cumsum(-1)
    mass = cumulative[:, -1:]
    if not all_there:
        tail = p[:, -1:] > 0  # the last candidate is kept
        mass = torch.where(tail, 1.0, mass)
    target = uniform[:, None] * mass
    last = ((p > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # where rounding up may lead beyond
    drawn = torch.searchsorted(cumulative, target, right=True).minimum(last)  # (B, 1)
    chosen = ids.gather(1, drawn)[:, 0]
    if not all_there:
        # where tokens are filtered, the mass of those kept behind the candidates is not known
        beyond = (tail & (filtered | (target >= cumulative[:, -1:])))[:, 0]
        if beyond.any():
            chosen[beyond] = sample(
                logits[beyond], uniform[beyond], temperature, 0, top_p, min_p, candidates=V
            )
    return chosen
