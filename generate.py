"""
Tokens out: prompts of different lengths in one batch, a key-value cache, sampling, and text as it comes.

`Engine` is the one decoding loop; `generate` collects what it yields, `stream` turns it into text.
"""

import codecs
import math

import torch

from model import KVCache


def generate(model, prompts, *, stop_strings=(), tokenizer=None, **options):
    """Return for each prompt, a list of ids, the list of new ids, without what stopped it.

    `options` are those of Engine. With `stop_strings` (which need the `tokenizer`) a row ends where one of them
    appears in its text, and loses the ids that reach into it. Raises ValueError as Engine does.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    if not prompts:
        return []
    new = [[] for _ in prompts]
    ends = [[] for _ in prompts]  # for each new id, how many characters the text then has
    texts = [TextStream(tokenizer, stop_strings) for _ in prompts] if stop_strings else []
    engine = Engine(model, prompts, **options)
    while tokens := engine.step():
        for row, token in tokens:
            new[row].append(token)
            if texts:
                texts[row].push(token)
                ends[row].append(texts[row].length + texts[row].within_character)
                if (stop := texts[row].stopped_at) is not None:
                    new[row] = [t for t, end in zip(new[row], ends[row], strict=True) if end <= stop]
                    engine.end(row)
    return new


def stream(model, tokenizer, prompt, *, stop_strings=(), **options):
    """Yield the text that follows one prompt, piece by piece, up to a stop; `options` are those of Engine.

    What may be the beginning of a stop string is held back, and dropped if the row ends there for want of room.
    """
    text = TextStream(tokenizer, stop_strings)
    engine = Engine(model, [prompt], **options)
    while tokens := engine.step():
        if piece := text.push(tokens[0][1]):
            yield piece
        if text.stopped_at is not None:
            return
    cut = engine.lengths[0] == engine.limits[0]  # then what is held back might have become a stop
    if not cut and (piece := text.rest()):
        yield piece


class Engine:
    """Decodes a batch of prompts, one token a row at each `step`; puts the model into evaluation mode.

    prompts: lists of ids, each with room for more in the model's context, where a row ends at the latest.
    temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens; repetition_penalty (CTRL, arXiv 1909.05858) is over
    the prompt and the new ids. All as in transformers. stop_ids end a row and are not yielded.
    seed: row i draws from the random stream seed + i (None: fresh streams), so that its result depends on no other row.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model,
        prompts,
        max_new_tokens=128,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        stop_ids=(),
        seed=None,
    ):
        """Raises ValueError for an empty prompt, one that fills the context, or an option out of range."""
        context, device = model.config.block_size, model.lm_head.weight.device
        for prompt in prompts:
            if not 0 < len(prompt) < context:
                raise ValueError(f"a prompt of {len(prompt)} tokens; it must be of 1 to {context - 1}")
        for name, value, allowed in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 0),
            ("temperature", temperature, 0 <= temperature < math.inf),
            ("top_k", top_k, top_k >= 0),
            ("top_p", top_p, 0 < top_p <= 1),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf),
        ):
            if not allowed:
                raise ValueError(f"{name}={value} is out of range")
        self.model, self.stop_ids = model.eval(), frozenset(stop_ids)
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.penalty = repetition_penalty
        self.lengths = [len(prompt) for prompt in prompts]
        self.limits = [min(length + max_new_tokens, context) for length in self.lengths]
        self.running = {row for row in range(len(prompts)) if self.lengths[row] < self.limits[row]}
        self.random = [torch.Generator() for _ in prompts]
        for row, generator in enumerate(self.random):
            generator.seed() if seed is None else generator.manual_seed(seed + row)

        # prompts are padded on the right: causal attention never looks there, and new tokens overwrite it in the cache
        longest = max(self.lengths)
        idx = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)  # (B, T)
        positions = torch.arange(longest, device=device).expand(len(prompts), -1)
        self.cache = KVCache(model.config, len(prompts), max(self.limits), device, model.lm_head.weight.dtype)
        hidden = model.hidden(idx, self.cache, positions)  # (B, T, C)
        rows = torch.arange(len(prompts), device=device)
        self.last = torch.tensor(self.lengths, device=device) - 1  # (B,) position of each row's newest token
        self.final = torch.tensor(self.limits, device=device) - 1  # (B,) and of its last possible one
        self.logits = model.lm_head(hidden[rows, self.last])  # (B, V)
        self.seen = torch.zeros_like(self.logits, dtype=torch.bool)  # (B, V) ids that the penalty is for
        for row, prompt in enumerate(prompts):
            self.seen[row, prompt] = True

    @torch.inference_mode()
    def step(self):
        """Return [(row, id)], a new token of each row that runs; [] when none does."""
        if not self.running:
            return []
        if self.logits is None:
            hidden = self.model.hidden(self.newest[:, None], self.cache, self.last[:, None])  # (B, 1, C)
            self.logits = self.model.lm_head(hidden[:, 0])  # (B, V)
        logits = self.logits.float()
        if self.penalty != 1:
            penalized = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, penalized, logits)
        uniform = torch.stack([torch.rand((), generator=generator) for generator in self.random]).to(logits.device)
        self.newest = sample(logits, uniform, **self.sampling)  # (B,)
        self.seen.scatter_(1, self.newest[:, None], True)
        self.logits = None
        # rows that have ended go on at their last position, unheard, until all have
        self.last = torch.minimum(self.last + 1, self.final)
        tokens = []
        for row, token in enumerate(self.newest.tolist()):
            if row in self.running:
                if token in self.stop_ids:
                    self.end(row)
                    continue
                tokens.append((row, token))
                self.lengths[row] += 1
                if self.lengths[row] == self.limits[row]:
                    self.end(row)
        return tokens

    def end(self, row):
        """Yield no more tokens of this row."""
        self.running.discard(row)


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Return one id a row, (B,) int64, drawn from logits (B, V) float32 by uniform (B,) in [0, 1).

    Temperature, then top_k, then top_p, in transformers' order; the draw inverts the cumulative distribution.
    """
    if temperature < 1e-5:  # dividing by less could overflow
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = (logits / temperature).topk(k)  # (B, k), falling
    p = logits.softmax(-1)
    if top_p < 1:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # a token stays while those before it have less than top_p
    cumulative = p.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    last = (p > 0).sum(-1, keepdim=True) - 1  # where rounding up may lead beyond
    return ids.gather(1, drawn.minimum(last))[:, 0]


class TextStream:
    """Turns ids into text as they come; holds back half characters, and what may be the beginning of a stop string.

    length: characters of text so far; stopped_at: where in it a stop string begins, None while there is none.
    """

    def __init__(self, tokenizer, stop_strings=()):
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.length, self.stopped_at = 0, None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def within_character(self):
        """Whether the ids so far end within a character."""
        return bool(self._decoder.getstate()[0])

    def push(self, token):
        """Take one more id; return the text that is certain now and was not returned before."""
        text = self._decoder.decode(self.tokenizer.token_bytes(token))
        self.length += len(text)
        self._held += text
        found = [at for stop in self.stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped_at = self.length - len(self._held) + min(found)
            certain, self._held = min(found), self._held[: min(found)]
        else:
            certain = len(self._held) - max((_overlap(self._held, stop) for stop in self.stop_strings), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def rest(self):
        """Return what was held back and turned out to be no stop; half a character at the end is dropped."""
        text, self._held = self._held, ""
        return text


def _overlap(text, stop):
    """Return the length of the longest beginning of `stop`, short of the whole, that `text` ends in."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def fit_context(tokenizer, messages, room):
    """Return the ids of a prompt for the next reply, at most `room`: what is too old is dropped, in whole exchanges.

    The persona (a system message) stays. Of a last message that is too long by itself the end is kept.
    Raises ValueError where the persona alone leaves no room.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    ids = tokenizer.render(system + turns[-1:], add_generation_prompt=True)[0]
    if len(ids) > room:
        content = tokenizer.encode(turns[-1]["content"])[-room:] if turns else []
        while content:
            last = {**turns[-1], "content": tokenizer.decode(content).lstrip("\ufffd")}
            ids = tokenizer.render([*system, last], add_generation_prompt=True)[0]
            if len(ids) <= room:
                return ids
            content = content[len(ids) - room :]
        raise ValueError(f"the persona is too long: it leaves no room in a prompt of {room} tokens")
    for start in range(len(turns) - 2, -1, -1):
        if len(longer := tokenizer.render(system + turns[start:], add_generation_prompt=True)[0]) > room:
            break
        if turns[start]["role"] == "user":
            ids = longer
    return ids
