"""Sampling: the options, the penalties, and the draw of the next token."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from nanochatgpt.configurator import at_least

CANDIDATES = 1024  # draw_token sorts only these first: a tenth of the time of sorting all 50,257


@dataclass
class Sampling:
    """How to choose the next token; the names are those of transformers and OpenAI."""

    max_new_tokens: int = 128  # new tokens, at most
    temperature: float = 1.0  # below 1 more predictable, above 1 more random; 0: the most likely
    top_k: int = 0  # sample from the k most likely tokens (0 = all)
    top_p: float = 1.0  # sample from the most likely tokens that together have this probability
    min_p: float = 0.0  # drop tokens below this share of the most likely one's probability
    repetition_penalty: float = 1.0  # above 1 discourages tokens already in the prompt or reply
    presence_penalty: float = 0.0  # subtracted from the logit of each token in the new text
    frequency_penalty: float = 0.0  # subtracted once for each time the token is in the new text
    no_repeat_ngram_size: int = 0  # never repeat an n-gram of this length (0 = off)

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        at_least(0, self, "max_new_tokens", "temperature", "top_k", "no_repeat_ngram_size")
        for name, valid, expected in (
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: {expected}")


@dataclass
class ChatSampling(Sampling):
    """Defaults for chats, chosen by evaluate.py's metrics of the model in the box. The frequency
    penalty looks only at the reply; it cuts repeated 4-grams from 20% to 0.6%. A repetition penalty
    of 1.1 leaves 5.1%, and also penalises what the bot has to remember."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.8
    frequency_penalty: float = 0.7
    given: frozenset = field(default=frozenset(), repr=False, kw_only=True)  # knobs the user set


# other templates' defaults; these are from the card of Locutusque/gpt2-conversational-or-qa
TEMPLATE_SAMPLING = {
    "user_assistant": {"temperature": 1.0, "top_k": 35, "top_p": 0.8, "frequency_penalty": 0.0}
}


def for_template(config, template):
    """Return a ChatSampling with the defaults of a chat template; knobs that the user set stay."""
    defaults = {}
    for name, value in TEMPLATE_SAMPLING.get(template, {}).items():
        if name not in config.given:
            defaults[name] = value
    return replace(config, **defaults)


def penalize(logits, options, prompt, new, logit_bias):
    """Apply the logit bias {id: number} and the penalties to logits (V,), in place. prompt, new:
    the ids so far. Order: bias, repetition_penalty (CTRL, arXiv 1909.05858), presence and frequency
    penalty (OpenAI's), no_repeat_ngram_size."""

    def tensor(values, dtype):
        return torch.tensor(list(values), dtype=dtype, device=logits.device)

    if logit_bias:
        logits[tensor(logit_bias, torch.long)] += tensor(logit_bias.values(), logits.dtype)
    if options.repetition_penalty != 1:
        seen = tensor({*prompt, *new}, torch.long)
        seen = seen[seen < len(logits)]  # a prompt may have ids that are never drawn
        values = logits[seen]
        penalty = options.repetition_penalty
        logits[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if new and (options.presence_penalty or options.frequency_penalty):
        penalties = {}  # id -> number
        for token, count in Counter(new).items():
            penalties[token] = options.presence_penalty + options.frequency_penalty * count
        logits[tensor(penalties, torch.long)] -= tensor(penalties.values(), logits.dtype)
    if options.no_repeat_ngram_size:
        ends = tensor(_ngram_ends([*prompt, *new], options.no_repeat_ngram_size), torch.long)
        logits[ends[ends < len(logits)]] = -math.inf


def _ngram_ends(ids, size):
    """Return the tokens that would repeat an n-gram of this size."""
    newest = ids[len(ids) - size + 1 :]  # the size - 1 newest ids
    ends = []
    for i in range(len(ids) - size + 1):
        if ids[i : i + size - 1] == newest:
            ends.append(ids[i + size - 1])
    return ends


def draw_token(logits, uniform, options, candidates=CANDIDATES):
    """Return one id per row, (B,) int64, drawn from logits (B, V) float32.

    temperature, top_k, top_p and min_p apply in this order, transformers'. Then uniform (B,), in
    [0, 1), inverts the cumulative distribution of the most likely `candidates`; rows where the draw
    may lie beyond them are drawn again from all tokens.
    """
    temperature = options.temperature
    if temperature < 1e-5 or options.top_p == 0:  # dividing by less could overflow
        return logits.argmax(-1)

    # probabilities of the most likely tokens, in falling order
    V = logits.size(-1)
    k = min(options.top_k or candidates, V)
    complete = k == V or options.top_k > 0  # no other token can be drawn
    top_logits, ids = logits.topk(k)  # (B, k)
    top_logits = top_logits / temperature
    if complete:
        p = top_logits.softmax(-1)
    else:
        p = (top_logits - (logits / temperature).logsumexp(-1, keepdim=True)).exp()

    # top_p and min_p; the first token always stays
    filtered = options.top_p < 1 or options.min_p > 0
    if filtered:
        keep = (p.cumsum(-1) - p < options.top_p) & (p >= options.min_p * p[:, :1])
        p = torch.where(keep, p, 0.0)
    cumulative = p.cumsum(-1)  # (B, k)

    # the mass to draw from; if the last candidate is kept, tokens after it may be as well
    tail_kept = p[:, -1:] > 0  # (B, 1)
    mass = cumulative[:, -1:]
    if not complete:
        mass = torch.where(tail_kept, 1.0, mass)

    # the first token whose cumulative probability exceeds uniform * mass
    target = uniform[:, None] * mass  # (B, 1)
    last = ((p > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # rounding may lead beyond it
    index = torch.searchsorted(cumulative, target, right=True).minimum(last)  # (B, 1)
    chosen = ids.gather(1, index)[:, 0]
    if complete:
        return chosen

    # draw again beyond the candidates; with a filter, the mass that it keeps there is unknown
    redraw = (tail_kept & (filtered | (target >= cumulative[:, -1:])))[:, 0]
    if redraw.any():
        chosen[redraw] = draw_token(logits[redraw], uniform[redraw], options, candidates=V)
    return chosen
