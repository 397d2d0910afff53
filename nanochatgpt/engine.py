"""Decoding with a key-value cache: rows come and go, and each gets one new token per step.

GPT.generate in model.py defines the result; the engine computes the same without repeating work.
nanochatgpt/sampling.py draws the next token, nanochatgpt/generate.py collects what comes out.
"""

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochatgpt.device import is_cuda
from nanochatgpt.sampling import Sampling, draw_token, penalize

PREFILL_TOKENS = 4096  # prompt tokens computed together, padding included


class KVCache:
    """Keys and values of earlier tokens, as an `attend` for GPT.hidden: it stores the new ones and
    attends to all of them.

    kv: (n_layer, 2, B, nh, size, hs); what lies beyond a row's position is stale and masked.
    positions: (B, T), those of the new tokens. newest: one token, which sees the whole cache.
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
        if B > 1 and T == 1 and not is_cuda(q.device):
            # many rows, one token each: plain matmuls take 0.94 of SDPA's time at 16 rows
            return (q * hs**-0.5 @ keys.mT + self.mask).softmax(-1) @ values
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)


class Token(NamedTuple):
    row: int  # index of the row
    id: int
    logprob: float | None  # the model's own, in nats, before penalties; None unless asked for
    top: list  # [(id, logprob)] of the most likely tokens, as many as asked for


@dataclass(eq=False)  # equal only to itself, so it can be the key of a dict
class Row:
    """One text in the engine, and how to continue it. Only the first n_cached ids have keys and
    values in the cache; a running row lacks at least its last one."""

    index: int  # in Engine.rows and in the cache
    ids: list = field(default_factory=list)  # prompt and new tokens
    options: Sampling = None
    logit_bias: dict = None
    logprobs: int | None = None
    stop_ids: tuple = ()
    rng: random.Random = None  # draws one uniform number per token
    n_prompt: int = 0
    n_cached: int = 0
    n_reused: int = 0  # prompt tokens that some row had in the cache at the start
    limit: int = 0  # the row ends at this many ids
    running: bool = False

    @property
    def n_missing(self):
        return len(self.ids) - self.n_cached

    def n_shared(self, prompt):
        """Return how many tokens at the beginning of `prompt` this row has in the cache. The last
        one never counts, because it has to be computed for its logits."""
        return min(common_prefix(self.ids, prompt), self.n_cached, len(prompt) - 1)


class Engine:
    """Continuous batching: rows join (`add`) and finish (`end`, a stop id, no room) at any step.

    A row that has ended keeps its keys and values until its place is needed. A new prompt copies
    the longest beginning that any row has in the cache: the next turn of a chat computes only its
    new tokens, and equal prompts are computed once. A row's result depends on no other row.
    """

    # --- rows and steps ---------------------------------------------------------------------------

    def __init__(
        self, model, rows=1, size=None, n_vocab=None, record=True, compile=False, prefill_tokens=0
    ):
        """rows: how many run at once. size: tokens per row, prompt included (None: the context).
        n_vocab: ids from here on are never drawn. record: replay steps without Python. compile:
        fuse kernels by torch.compile, a minute per shape. prefill_tokens: prompt tokens to compute
        per step (0: all), so that a long prompt does not hold up other rows."""
        config = model.config
        wpe = model.transformer.wpe.weight
        self.model = model.eval()
        self.device = wpe.device
        self.size = min(size or config.block_size, config.block_size)
        self.n_vocab = min(n_vocab or config.vocab_size, config.vocab_size)  # ids that are drawn
        self.prefill_tokens = prefill_tokens or math.inf
        self.rows = [Row(index) for index in range(rows)]
        self.waiting = []  # rows whose prompts are not computed, oldest first

        # a CPU attends to the cached tokens alone; elsewhere each length is compiled or recorded
        # separately, so lengths are rounded up to chunks
        self.exact_length = self.device.type == "cpu" and not compile
        self.chunk = 1 if self.exact_length else 256
        self.run_step = Step(model, self.exact_length)
        if record or compile:
            from nanochatgpt.recording import StepRunner  # optional: the same results, faster

            self.run_step = StepRunner(self.run_step, self.device, record, compile)
        with torch.inference_mode():
            head_size = config.n_embd // config.n_head
            shape = (config.n_layer, 2, rows, config.n_head, self.size, head_size)
            self.kv = torch.zeros(shape, device=self.device, dtype=wpe.dtype)  # as in KVCache
            # newest ids and their positions
            self.inputs = torch.zeros(2, rows, dtype=torch.long, device=self.device)

    @property
    def running(self):
        """The indices of the running rows."""
        return [row.index for row in self.rows if row.running]

    def add(self, prompt, options, *, seed=None, stop_ids=(), logit_bias=None, logprobs=None):
        """Start a row with a prompt, a list of ids; return its index.

        options: a Sampling. seed: of the row's own random stream (None: a fresh one). stop_ids end
        the row and are not returned. logit_bias: {id: number added to its logit}. logprobs: return
        the log-probability of each token, and of this many most likely ones. Raises ValueError for
        a prompt that is empty or leaves no room, an unknown id, or if no row is free.
        """
        logit_bias = logit_bias or {}
        if not 0 < len(prompt) < self.size:
            raise ValueError(f"a prompt of {len(prompt)} tokens: it must have 1 to {self.size - 1}")
        check_ids("prompt", prompt, self.model.config.vocab_size)
        check_ids("logit_bias", logit_bias, self.n_vocab)
        free = [row for row in self.rows if not row.running]
        if not free:
            raise ValueError(f"all {len(self.rows)} rows are running")

        # evict the free row that loses the fewest cached tokens; ties go to the longest match
        shared = [row.n_shared(prompt) for row in self.rows]
        old = min(free, key=lambda row: (row.n_cached - shared[row.index], -shared[row.index]))
        row = Row(old.index, list(prompt), options, logit_bias, logprobs, stop_ids)
        row.rng = random.Random(seed)
        row.n_prompt = len(prompt)
        row.n_cached = shared[row.index]
        row.n_reused = max(shared)
        row.limit = min(len(prompt) + options.max_new_tokens, self.size)
        row.running = options.max_new_tokens > 0
        self.rows[row.index] = row
        self.waiting.append(row)
        return row.index

    def end(self, index):
        """End a row: it gives no more tokens, and its place is free."""
        self.rows[index].running = False

    @torch.inference_mode()
    def step(self):
        """Advance every running row by one token; return the Tokens. Rows that draw a stop id give
        none, nor do those whose prompt takes more steps (prefill_tokens)."""
        logits = self._prefill() | self._decode()  # {row: (V,)}

        # draw for all rows with the same options at once
        groups = defaultdict(list)
        for row in logits:
            key = tuple(getattr(row.options, option.name) for option in fields(Sampling))
            groups[key].append(row)
        tokens = []
        for rows in groups.values():
            stacked = torch.stack([logits[row] for row in rows])  # (B, V)
            tokens += self._draw(rows, stacked[:, : self.n_vocab].float())
        return sorted(tokens)

    def _draw(self, rows, logits):
        """Append a token to each of these rows, which share their options; return the Tokens.
        logits: (B, n_vocab) float32, overwritten."""
        options = rows[0].options
        logprobs = {}
        for row, row_logits in zip(rows, logits, strict=True):
            if row.logprobs is not None:
                logprobs[row] = row_logits.log_softmax(-1)  # before penalties
            prompt = row.ids[: row.n_prompt]
            penalize(row_logits, options, prompt, row.ids[row.n_prompt :], row.logit_bias)
        uniform = torch.tensor([row.rng.random() for row in rows], device=self.device)  # (B,)
        ids = draw_token(logits, uniform, options).tolist()

        # one id per row: a stop, or a Token
        tokens = []
        for row, token in zip(rows, ids, strict=True):
            if token in row.stop_ids:
                row.running = False
                continue
            row.ids.append(token)
            row.running = len(row.ids) < row.limit
            logprob = None
            top = []
            if row in logprobs:
                logprob = logprobs[row][token].item()
                values, top_ids = logprobs[row].topk(min(row.logprobs, self.n_vocab))
                top = list(zip(top_ids.tolist(), values.tolist(), strict=True))
            tokens.append(Token(row.index, token, logprob, top))
        return tokens

    def _decode(self):
        """Compute the rows that lack only their last token; return {row: logits (V,)}."""
        rows = [row for row in self.rows if row.running and row.n_missing == 1]
        if not rows:
            return {}
        # idle rows among them ride along; they write past their cached tokens, which is never read.
        # A CUDA graph always reads the same memory, so there the first row is always row 0
        first = rows[0].index if self.exact_length else 0
        stop = rows[-1].index + 1
        inputs = [(0, row.n_cached) for row in self.rows[first:stop]]
        for row in rows:
            inputs[row.index - first] = (row.ids[-1], row.n_cached)
        n = len(inputs)
        self.inputs[:, :n] = torch.tensor(inputs).T
        length = max(position for _, position in inputs) + 1
        cache = self._cache(slice(first, stop), length)
        logits = self.run_step(self.inputs[:, :n], cache)  # (n, V)
        for row in rows:
            row.n_cached += 1
        return {row: logits[row.index - first] for row in rows}

    def _cache(self, rows, length):
        """Return a slice of rows of the cache, up to a length rounded up to whole chunks. It is a
        view, so the rest of the cache is never read."""
        length = math.ceil(length / self.chunk) * self.chunk
        return self.kv[:, :, rows, :, : min(length, self.size)]

    # --- prompts: reuse what is in the cache, compute the rest ------------------------------------

    def _prefill(self):
        """Compute waiting prompts, the oldest first; return {row: logits (V,)} of the finished
        ones. Prompts that lack only their last token are left to `_decode`."""
        last = {}  # row -> hidden state (C,) of the last token of its prompt
        budget = self.prefill_tokens
        while batch := self._next_batch(budget):
            hidden = self._compute(batch)  # (B, T, C)
            for i, (row, n) in enumerate(batch):
                budget -= n
                row.n_cached += n
                if row.n_missing == 0:
                    last[row] = hidden[i, n - 1]
        if not last:
            return {}
        logits = self.model.lm_head(torch.stack(list(last.values())))  # (rows, V)
        return dict(zip(last, logits, strict=True))

    def _next_batch(self, budget):
        """Return [(row, number of tokens)] to compute together: the oldest waiting row, and those
        after it that are its neighbours in the cache and of a similar length."""
        self.waiting = [row for row in self.waiting if row.running and row.n_missing > 1]
        batch = []
        longest = 0
        for row in self.waiting:
            self._copy_shared_prefix(row)
            n = min(row.n_missing, budget)
            longest = max(longest, n)
            if batch:
                # a row that could copy half of its prompt from this batch waits for the next one
                half = row.n_cached + row.n_missing // 2
                copies = any(common_prefix(row.ids, other.ids) > half for other, _ in batch)
                neighbour = row.index == batch[-1][0].index + 1
                n_tokens = n + sum(count for _, count in batch)
                padded = longest * (len(batch) + 1)
                if copies or not neighbour or padded > min(2 * n_tokens, PREFILL_TOKENS):
                    break
            if row.n_missing == 1:  # `_decode` computes its last token
                continue
            if n == 0:
                break
            batch.append((row, n))
            budget -= n
        return batch

    def _copy_shared_prefix(self, row):
        """Copy the longest beginning of the row's ids that any row has in the cache."""
        source = max(self.rows, key=lambda other: other.n_shared(row.ids))
        n = source.n_shared(row.ids)
        if n > row.n_cached:
            self.kv[:, :, row.index, :, :n] = self.kv[:, :, source.index, :, :n]
            row.n_cached = n

    def _compute(self, batch):
        """Compute the next tokens of a batch, [(row, n)]; return final hidden states (B, T, C)."""
        B = len(batch)
        T = max(n for _, n in batch)
        # shorter rows end in padding, which lands past their cached tokens and is never read
        idx = torch.zeros(B, T, dtype=torch.long)
        starts = torch.zeros(B, 1, dtype=torch.long)
        for i, (row, n) in enumerate(batch):
            idx[i, :n] = torch.tensor(row.ids[row.n_cached : row.n_cached + n])
            starts[i] = row.n_cached
        positions = (starts + torch.arange(T)).clamp(max=self.size - 1)  # (B, T)
        first = batch[0][0].index
        kv = self._cache(slice(first, first + B), positions.max().item() + 1)
        positions = positions.to(self.device)
        idx = idx.to(self.device)
        return self.model.hidden(idx, positions=positions, attend=KVCache(kv, positions))


class Step(torch.nn.Module):
    """One decoding step, as a module that can be traced and compiled."""

    def __init__(self, model, exact_length):
        super().__init__()
        self.model = model
        self.exact_length = exact_length

    def forward(self, inputs, kv):
        """Return logits (n, V), given the newest ids and their positions (2, n) and the cache."""
        idx, positions = inputs[:, :, None]  # (n, 1) each
        cache = KVCache(kv, positions, newest=self.exact_length and len(idx) == 1)
        hidden = self.model.hidden(idx, positions=positions, attend=cache)  # (n, 1, C)
        return self.model.lm_head(hidden[:, 0])


def check_ids(name, ids, n):
    for token in ids:
        if not 0 <= token < n:
            raise ValueError(f"{name} has the token {token}: ids are 0 to {n - 1}")


def common_prefix(a, b):
    """Return the length of the beginning that two lists share."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
