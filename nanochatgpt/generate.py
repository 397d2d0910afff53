"""
Tokens out: one engine for a chat, a batch of prompts, many samples of one prompt, and rows that come and go.

`Engine` is the one decoding loop, sampling.py chooses the next token; `generate` collects what the engine
gives for many prompts, `stream` turns it into text for one.
"""

import math
import random
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch

from model import KVCache
from nanochatgpt.sampling import Sampling, penalize, sample
from nanochatgpt.tokenizer import TextStream
from rlhf.reward import scores_behind

BATCH_ROWS = 64  # rows that `generate` decodes at once
PREFILL_TOKENS = 4096  # of prompts, padding included, that are computed at once
RECORD_AT = 32  # recording takes as long as some 50 steps gain: only after so many steps of a shape is it done


def generate(
    model,
    prompts,
    *,
    seed=None,
    stop_ids=(),
    stop_strings=(),
    logit_bias=None,
    tokenizer=None,
    engine=None,
    **sampling,
):
    """Return for each prompt, a list of ids, the list of new ids, without what stopped it.

    `sampling` are the fields of Sampling, the rest as in Engine.add; prompt i has the seed `seed` + i. Given the
    `tokenizer`, no id beyond its vocabulary is chosen, if the model has embeddings for more. With
    `stop_strings` (which need the `tokenizer`) a row ends where one of them appears in its text, and loses the ids
    that reach into it; where its room ends, those of what may be the beginning of one. engine: one of this model to go
    on with, which has computed what prompts begin with and none of whose rows may run; else one is made. Raises
    ValueError as Engine.add and Sampling do.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    options = Sampling(**sampling)
    new = [[] for _ in prompts]
    ends = [[] for _ in prompts]  # for each new id, how many characters the text then has
    texts = [TextStream(tokenizer, stop_strings) for _ in prompts] if stop_strings else []
    if engine is None:
        size = max(map(len, prompts), default=0) + max(options.max_new_tokens, 1)
        engine = Engine(
            model, min(len(prompts), BATCH_ROWS), size, n_vocab=tokenizer and tokenizer.n_vocab
        )
    elif engine.running:
        raise ValueError(f"{len(engine.running)} rows of the engine are running: end them first")
    waiting, at = (
        list(reversed(range(len(prompts)))),
        {},
    )  # at: row of the engine -> index of its prompt
    try:
        while waiting or engine.running:
            while waiting and len(engine.running) < len(engine.rows):
                i = waiting.pop()
                row_seed = None if seed is None else seed + i
                at[
                    engine.add(
                        prompts[i], options, seed=row_seed, stop_ids=stop_ids, logit_bias=logit_bias
                    )
                ] = i
            for row, token, *_ in engine.step():
                i = at[row]
                new[i].append(token)
                if texts:
                    texts[i].push(token)
                    ends[i].append(texts[i].length + texts[i].within_character)
                    stop, full = texts[i].stopped_at, not engine.rows[row].running
                    if stop is None and full:
                        stop = texts[i].length - len(texts[i].rest())
                    if stop is not None:
                        new[i] = [t for t, end in zip(new[i], ends[i], strict=True) if end <= stop]
                        engine.end(row)
    finally:
        for row in at:
            engine.end(row)
    return new


def best_of(engine, reward_model, tokenizer, prompt, n, **how):
    """Return [(score, ids)] of n replies to one prompt, the best first; `how` goes to `generate`, and no row of the
    engine may run. The prompt is computed once, and the replies are decoded together, and scored together."""
    replies = generate(engine.model, [prompt] * n, engine=engine, tokenizer=tokenizer, **how)
    found = scores_behind(reward_model, tokenizer, prompt, replies).tolist()
    return sorted(zip(found, replies, strict=True), key=lambda pair: -pair[0])


def stream(engine, tokenizer, prompt, options, *, stop_strings=(), **add):
    """Yield the text that follows one prompt, piece by piece, up to a stop; `add` are further arguments of Engine.add.

    No other row of the engine may run. What may be the beginning of a stop string is held back, and dropped if the row
    ends there for want of room: a chat never shows part of a marker.
    """
    text = TextStream(tokenizer, stop_strings)
    row = engine.add(prompt, options, **add)
    try:
        while engine.rows[
            row
        ].running:  # not while there are tokens: of a prompt in pieces there are none at first
            for token in engine.step():
                if piece := text.push(token.id):
                    yield piece
            if text.stopped_at is not None:
                return
        cut = (
            len(engine.rows[row].ids) == engine.rows[row].limit
        )  # then what is held back might have become a stop
        if not cut and (piece := text.rest()):
            yield piece
    finally:
        engine.end(row)


class Token(NamedTuple):
    row: int
    id: int
    logprob: (
        float | None
    )  # the model's own, in nats, before penalties and temperature; None where not asked for
    top: list  # [(id, logprob)] of the likeliest tokens, as many as asked for


@dataclass
class Row:
    """One row of the engine: its text so far, and how to go on."""

    ids: list = field(default_factory=list)  # the prompt and the new ids
    n_cached: int = 0  # the cache holds keys and values of so many of them
    n_found: int = 0  # so many tokens of the prompt were in some row's
    n_prompt: int = 0
    limit: int = 0  # the row ends with so many ids
    options: Sampling = None
    stop_ids: frozenset = frozenset()
    logit_bias: dict = field(default_factory=dict)
    logprobs: int | None = None
    draws: random.Random = None  # the uniform numbers by which its tokens are drawn
    running: bool = False
    turn: int = 0  # so many rows were added before it
    slot: int = 0  # where in the cache its keys and values are


class Engine:
    """Decodes rows that come (`add`) and go (`end`, a stop, no more room) at any time, a token of each at every `step`.

    A row that has ended keeps its keys and values until another takes its place, and a new prompt takes over the
    longest beginning of it that any row holds: the next turn of a chat computes only what is new, and of many equal
    prompts one is computed. A row's result depends on no other row.
    """

    def __init__(
        self,
        model,
        rows=1,
        size=None,
        n_vocab=None,
        record=True,
        compile=False,
        prefill_tokens=None,
    ):
        """Put the model into evaluation mode and make room for `rows` rows of `size` tokens, prompt included.

        n_vocab: ids from here on are never chosen; a model may have more embeddings than its tokenizer has tokens.
        prefill_tokens: of prompts so many tokens are computed in a step, those that came first before the others, so
        that rows which are further on need not wait for long ones; None: all of them.
        record: replay a step without Python, once it has been taken some times (see `_record`).
        compile: fuse the kernels of a step by torch.compile, which takes a minute for each number of rows and chunk.
        """
        config = model.config
        self.model, self.device = model.eval(), model.transformer.wpe.weight.device
        self.size = min(size or config.block_size, config.block_size)
        self.n_vocab = min(n_vocab or config.vocab_size, config.vocab_size)
        self.rows = [Row(slot=i) for i in range(rows)]
        self.prefill_tokens, self.added = prefill_tokens, 0
        # steps on a CPU attend to what there is; else lengths are rounded up to chunks: for each one a compiled or
        # recorded step has to be made
        self.exact = self.device.type == "cpu" and not compile
        self.chunk = 1 if self.exact else 256
        with torch.inference_mode():
            self.cache = model.kv_cache(rows, self.size)
            self.inputs = torch.zeros(
                2, rows, dtype=torch.long, device=self.device
            )  # newest ids, their positions
        self.take = Step(model, self.exact)
        if compile:
            self.take = torch.compile(self.take, dynamic=False)
        self.uses = Counter()  # of each shape of step
        self.pool = (
            torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        )  # the graphs' shared memory
        self.recorded = {} if record and (self.exact or self.device.type == "cuda") else None

    @property
    def running(self):
        """The rows that are running."""
        return [i for i, row in enumerate(self.rows) if row.running]

    def add(self, prompt, options, *, seed=None, stop_ids=(), logit_bias=None, logprobs=None):
        """Start a row with a prompt, a list of ids; return its number. There must be a free one.

        options: a Sampling. seed: the row's own random stream (None: a fresh one). stop_ids end the row and are not
        given. logit_bias: {id: number added to its logit}, as in OpenAI's API. logprobs: give the log-probability of
        each token and of so many of the likeliest. The row ends in any case where the room does. Raises ValueError for
        a prompt that is empty or leaves no room, or an id that the model has not.
        """
        if not 0 < len(prompt) < self.size:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens; it must be of 1 to {self.size - 1}"
            )
        for where, ids, n in (
            ("prompt", prompt, self.model.config.vocab_size),
            ("logit_bias", logit_bias or (), self.n_vocab),
        ):
            if (token := next((token for token in ids if not 0 <= token < n), None)) is not None:
                raise ValueError(f"{where} has the token {token}: ids are 0 to {n - 1}")
        if not all(map(math.isfinite, (logit_bias or {}).values())):
            raise ValueError(f"logit_bias={logit_bias}: a bias must be finite; -100 bans a token")
        free = [i for i, row in enumerate(self.rows) if not row.running]
        if not free:
            raise ValueError(f"all {len(self.rows)} rows are running")
        shared = [self._shared(i, prompt) for i in range(len(self.rows))]
        # the row that loses the least of what it holds; among those the one that gains the most
        i = min(free, key=lambda i: (self.rows[i].n_cached - shared[i], -shared[i], i))
        self.rows[i] = Row(
            ids=list(prompt),
            n_cached=shared[i],
            n_found=max(shared),
            n_prompt=len(prompt),
            limit=min(len(prompt) + options.max_new_tokens, self.size),
            options=options,
            stop_ids=frozenset(stop_ids),
            logit_bias=logit_bias or {},
            logprobs=logprobs,
            draws=random.Random(seed),
            running=options.max_new_tokens > 0,
            turn=self.added,
            slot=self.rows[i].slot,
        )
        self.added += 1
        return i

    def end(self, i):
        """End row i: it gives no more tokens, and is free."""
        self.rows[i].running = False

    @torch.inference_mode()
    def step(self):
        """Return a Token of each row that runs, but of those that end with a stop id and, with `prefill_tokens`, those
        whose prompt is not done; [] when none runs."""
        logits = self._prefill() | self._decode()  # row -> (V,)
        groups = defaultdict(list)  # rows with the same options are sampled together
        for i in sorted(logits):
            groups[tuple(getattr(self.rows[i].options, f.name) for f in fields(Sampling))].append(i)
        tokens = []
        for group in groups.values():
            rows = (
                torch.stack([logits[i] for i in group])
                if len(group) > 1
                else logits[group[0]][None]
            )  # (B, V)
            tokens += self._choose(group, rows[:, : self.n_vocab].float())
        return sorted(tokens)

    def _choose(self, group, logits):
        """Append a token to each row of a group, given their logits (B, n_vocab) float32, which are changed; return the
        Tokens to give."""
        rows, o = [self.rows[i] for i in group], self.rows[group[0]].options
        texts = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :], row.logit_bias) for row in rows]
        own = {
            n: logits[n].log_softmax(-1) for n, row in enumerate(rows) if row.logprobs is not None
        }
        penalize(logits, o, texts)
        uniform = torch.tensor([row.draws.random() for row in rows], device=self.device)
        chosen = sample(logits, uniform, o.temperature, o.top_k, o.top_p, o.min_p).tolist()
        tokens = []
        for n, (i, row, token) in enumerate(zip(group, rows, chosen, strict=True)):
            if token in row.stop_ids:
                self.end(i)
                continue
            row.ids.append(token)
            row.running = len(row.ids) < row.limit
            logprob, top = None, []
            if row.logprobs is not None:
                values, ids = own[n].topk(min(row.logprobs, self.n_vocab))
                logprob, top = (
                    own[n][token].item(),
                    list(zip(ids.tolist(), values.tolist(), strict=True)),
                )
            tokens.append(Token(i, token, logprob, top))
        return tokens

    def _shared(self, i, prompt):
        """Return how many tokens of the beginning of `prompt`, short of its last, row i has in the cache."""
        return min(_common(self.rows[i].ids, prompt), self.rows[i].n_cached, len(prompt) - 1)

    def _prefill(self):
        """Compute the prompts that are new, but for their last token where the rest was there, or as much of them as
        `prefill_tokens` permits; return {row: logits}."""
        logits, left = {}, self.prefill_tokens or math.inf
        while left > 0 and (waiting := self._in_cache(lambda row: len(row.ids) - row.n_cached > 1)):
            wave = {}  # row -> how many tokens of it are computed now
            for i in sorted(waiting, key=lambda i: self.rows[i].turn):
                row = self.rows[i]
                self._take_over(i)
                # where another's of this wave gives half of what is left, take it over in the next
                half = (row.n_cached + len(row.ids)) / 2
                later = any(_common(self.rows[j].ids, row.ids) > half for j in wave)
                if left and not later and row.n_cached < len(row.ids) - 1:
                    wave[i] = min(len(row.ids) - row.n_cached, left)
                    left -= wave[i]
            runs = []  # of neighbours, which are computed together
            for i in sorted(wave, key=lambda i: self.rows[i].slot):
                lengths = [wave[j] for j in [i, *(runs[-1] if runs else [])]]
                padded = max(lengths) * len(lengths)
                neighbours = runs and self.rows[runs[-1][-1]].slot == self.rows[i].slot - 1
                if neighbours and padded <= min(PREFILL_TOKENS, 2 * sum(lengths)):
                    runs[-1].append(i)
                else:
                    runs.append([i])
            for run in runs:
                logits |= self._compute({i: wave[i] for i in run})
        return logits

    def _take_over(self, i):
        """Copy to row i the keys and values of the longest beginning of its ids that any row has in the cache."""
        row = self.rows[i]
        source = max(range(len(self.rows)), key=lambda j: self._shared(j, row.ids))
        if (n := self._shared(source, row.ids)) > row.n_cached:
            self.cache.kv[:, :, row.slot, :, :n] = self.cache.kv[
                :, :, self.rows[source].slot, :, :n
            ]
            row.n_cached = n

    def _compute(self, run):
        """Compute the next tokens, {row: how many}, of some neighbouring rows; return {row: logits (V,) of its last
        token} of those that are done."""
        rows = [self.rows[i] for i in run]
        new = [
            row.ids[row.n_cached : row.n_cached + n]
            for row, n in zip(rows, run.values(), strict=True)
        ]
        T = max(map(len, new))
        # padded on the right: causal attention never looks there, and later tokens overwrite it in the cache
        idx = torch.tensor(
            [ids + [0] * (T - len(ids)) for ids in new], device=self.device
        )  # (B, T)
        length = self._chunks(
            max(row.n_cached + len(ids) for row, ids in zip(rows, new, strict=True)) + 1
        )
        start = torch.tensor([[row.n_cached] for row in rows], device=self.device)
        positions = (start + torch.arange(T, device=self.device)).clamp(max=length - 1)  # (B, T)
        cache = self.cache.part(slice(rows[0].slot, rows[-1].slot + 1), length)
        hidden = self.model.hidden(idx, cache, positions)  # (B, T, C)
        for row, ids in zip(rows, new, strict=True):
            row.n_cached += len(ids)
        done = [n for n, row in enumerate(rows) if row.n_cached == len(row.ids)]
        if not done:
            return {}
        at = torch.tensor([(n, len(new[n]) - 1) for n in done], device=self.device).T
        logits = self.model.lm_head(hidden[tuple(at)])  # (rows that are done, V)
        return dict(zip([list(run)[n] for n in done], logits, strict=True))

    def _decode(self):
        """Compute the newest token of each row that has one; return {row: its logits (V,)}."""
        newest = self._in_cache(lambda row: len(row.ids) - row.n_cached == 1)
        if not newest:
            return {}
        if self.exact:
            newest = self._close_up(newest)
        n = self.rows[newest[-1]].slot + 1
        # rows among them that do not run are computed too, unheard, behind what they have cached
        inputs = [(0, row.n_cached) for row in sorted(self.rows, key=lambda row: row.slot)[:n]]
        for row in (self.rows[i] for i in newest):
            inputs[row.slot] = (row.ids[row.n_cached], row.n_cached)
        self.inputs[:, :n] = torch.tensor(inputs).T
        logits = self._take(n, max(position for _, position in inputs) + 1)  # (n, V)
        for i in newest:
            self.rows[i].n_cached += 1
        return {i: logits[self.rows[i].slot] for i in newest}

    def _in_cache(self, condition):
        """Return the running rows that fulfil a condition, in the order of the cache."""
        return sorted(
            (i for i in self.running if condition(self.rows[i])), key=lambda i: self.rows[i].slot
        )

    def _close_up(self, newest):
        """Move rows of `newest` to slots of ended rows before them; return them in their new order.

        What lies between is computed along: of eight replies to one prompt, the steps take 0.88 of the time (the model
        in the box).
        """
        free = [row for row in self.rows if not row.running and row.slot < len(newest)]
        last = [self.rows[i] for i in newest if self.rows[i].slot >= len(newest)]
        for ended, row in zip(free, last, strict=False):
            n = max(ended.n_cached, row.n_cached)
            pair = self.cache.kv[:, :, [row.slot, ended.slot], :, :n]  # a copy
            self.cache.kv[:, :, ended.slot, :, :n], self.cache.kv[:, :, row.slot, :, :n] = (
                pair.unbind(2)
            )
            ended.slot, row.slot = row.slot, ended.slot
        return sorted(newest, key=lambda i: self.rows[i].slot)

    def _take(self, n, length):
        """Return the logits (n, V) of the first n rows' `inputs`, with the cache up to `length`."""
        size = self._chunks(length)
        inputs, kv = self.inputs[:, :n], self.cache.kv[:, :, :n, :, :size]
        shape = (
            (n, size) if self.device.type == "cuda" else min(n, 2)
        )  # a trace for rows is one for any number of them
        self.uses[shape] += 1
        if self.recorded is None or self.uses[shape] < RECORD_AT:
            return self.take(inputs, kv)
        if shape not in self.recorded:
            self.recorded[shape] = _record(self.take, inputs, kv, self.pool)
        return self.recorded[shape](inputs, kv)

    def _chunks(self, length):
        """Round a length of the cache up to whole chunks."""
        return min(-(-length // self.chunk) * self.chunk, self.size)


class Step(torch.nn.Module):
    """One step of decoding, as a module: so it can be traced and compiled."""

    def __init__(self, model, exact):
        super().__init__()
        self.model, self.exact = model, exact

    def forward(self, inputs, kv):
        """Return logits (n, V) of the newest ids and their positions, (2, n), and the rows' keys and values."""
        idx, positions = inputs[:, :, None]  # (n, 1) each
        cache = KVCache(kv, newest=self.exact and len(idx) == 1)
        return self.model.lm_head(self.model.hidden(idx, cache, positions)[:, 0])


def _record(step, inputs, kv, pool):
    """Return a function that does what `step` does for inputs of this shape, without Python between its kernels.

    On CUDA a graph, which always reads and writes these same tensors. On a CPU a trace, which takes a kv of any size:
    GPT-2's 12 layers in int8 take 12 ms a step where Python takes 22.
    """
    if inputs.device.type == "cpu":
        with (
            warnings.catch_warnings()
        ):  # of Python values, all of which are fixed by the shape; of deprecation
            warnings.simplefilter("ignore")
            return torch.jit.trace(step, (inputs, kv), check_trace=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        side
    ):  # once for what is set up at the first call, which cannot be recorded
        step(inputs, kv)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        logits = step(inputs, kv)

    def replay(*_):
        graph.replay()
        return logits

    return replay


def _common(a, b):
    """Return the length of the beginning that two lists share."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
