"""
The decoding loop: rows that come and go, one token each per step.

nanochatgpt/sampling.py chooses the next token; nanochatgpt/generate.py collects what the engine gives.
"""

import math
import random
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochatgpt.sampling import Sampling, penalize, sample

PREFILL_TOKENS = 4096  # of prompts, padding included, that are computed at once
RECORD_AT = (
    32  # recording costs what about 50 replayed steps save: wait until a shape was used this often
)


class KVCache:
    """Keys and values of earlier tokens, as an `attend` for GPT.hidden: it stores the new ones and
    attends to all of them. Each row has its own position.

    kv: (n_layer, 2, B, nh, size, hs); what lies beyond a row's position is stale and masked.
    positions: (B, T), where the new tokens stand. newest: there is one row with one new token; it
    may see the whole cache, so no mask is needed.
    """

    def __init__(self, kv, positions, newest=False):
        self.layers = kv.unbind(0)
        self.positions = positions
        self.rows = torch.arange(kv.size(2), device=kv.device)[:, None]  # (B, 1)
        self.mask = None
        if not newest:
            later = torch.arange(kv.size(-2), device=kv.device) > positions[:, None, :, None]
            # (B, 1, T, size), added to the attention scores
            self.mask = torch.zeros_like(later, dtype=kv.dtype).masked_fill_(later, -math.inf)

    def __call__(self, layer, q, k, v, dropout):
        keys, values = self.layers[layer]  # (B, nh, size, hs) each
        if len(self.positions) == 1:  # half the time of the general way
            keys.index_copy_(2, self.positions[0], k)
            values.index_copy_(2, self.positions[0], v)
        else:
            keys[self.rows, :, self.positions] = k.transpose(1, 2)
            values[self.rows, :, self.positions] = v.transpose(1, 2)
        B, _, T, hs = q.shape
        if B > 1 and T == 1 and not q.is_cuda:
            # many rows, one token each: plain matmuls take 0.94 of SDPA's time at 16 rows
            return (q * hs**-0.5 @ keys.mT + self.mask).softmax(-1) @ values
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)


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
            head_size = config.n_embd // config.n_head
            shape = (config.n_layer, 2, rows, config.n_head, self.size, head_size)
            dtype = model.transformer.wpe.weight.dtype
            self.kv = torch.zeros(shape, device=self.device, dtype=dtype)
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
            self.kv[:, :, row.slot, :, :n] = self.kv[:, :, self.rows[source].slot, :, :n]
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
        # a view, so unused cache is never read
        cache = KVCache(self.kv[:, :, rows[0].slot : rows[-1].slot + 1, :, :length], positions)
        hidden = self.model.hidden(idx, positions=positions, attend=cache)  # (B, T, C)
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
            pair = self.kv[:, :, [row.slot, ended.slot], :, :n]  # a copy
            self.kv[:, :, ended.slot, :, :n], self.kv[:, :, row.slot, :, :n] = pair.unbind(2)
            ended.slot, row.slot = row.slot, ended.slot
        return sorted(newest, key=lambda i: self.rows[i].slot)

    def _take(self, n, length):
        """Return the logits (n, V) of the first n rows' `inputs`, with the cache up to `length`."""
        size = self._chunks(length)
        inputs, kv = self.inputs[:, :n], self.kv[:, :, :n, :, :size]
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
        cache = KVCache(kv, positions, newest=self.exact and len(idx) == 1)
        hidden = self.model.hidden(idx, positions=positions, attend=cache)  # (n, 1, C)
        return self.model.lm_head(hidden[:, 0])


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
