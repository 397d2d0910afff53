"""
GPT-2 in one file, with the names, layouts and arithmetic of Hugging Face's GPT2LMHeadModel: state dicts pass both ways.

Shapes: B rows, T tokens of a row, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
References: openai/gpt-2 (src/model.py), transformers (models/gpt2/modeling_gpt2.py), karpathy/nanoGPT (model.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

PRESETS = {
    "distilgpt2": {"n_layer": 6, "n_head": 12, "n_embd": 768},  # 82M parameters
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


@dataclass
class GPTConfig:
    block_size: int = 1024  # the context: how many positions have an embedding
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


class Conv1D(nn.Module):
    """A linear layer with its weight stored [in, out], as OpenAI wrote it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class KVCache:
    """Keys and values of the tokens seen so far, preallocated; rows stand at positions of their own.

    kv: (n_layer, 2, B, nh, size, hs). What lies beyond a row's position is stale and masked.
    newest: all that will be asked for is the last position of a single row, which sees everything: no mask.
    """

    def __init__(self, kv, newest=False):
        self.kv, self.newest = kv, newest
        self.layers = kv.unbind(0)
        self.rows = torch.arange(kv.size(2), device=kv.device)[:, None]  # (B, 1)

    def part(self, rows, size):
        """Return some rows (a slice) up to `size`, a view: what is not looked at is not read."""
        return KVCache(self.kv[:, :, rows, :, :size])

    def mask(self, positions):
        """Return what is added to attention's scores, (B, 1, T, size): a token sees its position and those before."""
        if self.newest:
            return None
        later = (
            torch.arange(self.kv.size(-2), device=positions.device) > positions[:, None, :, None]
        )
        return torch.zeros_like(later, dtype=self.kv.dtype).masked_fill_(later, -math.inf)

    def update(self, layer, positions, kv):
        """Store kv (2, B, nh, T, hs) of one layer at `positions` (B, T); return all of it, (2, B, nh, size, hs)."""
        if len(positions) == 1:
            return self.layers[layer].index_copy_(
                3, positions[0], kv
            )  # half the time of the general way
        self.layers[layer][:, self.rows, :, positions] = kv.permute(1, 3, 0, 2, 4)
        return self.layers[layer]


class Branches:
    """A context and, behind it in the same row, continuations that see it and not each other.

    `idx` (1, T) int64 and `positions` (1, T) are what GPT.hidden takes; this itself stands in the place of its KVCache,
    and keeps nothing. In one pass all continuations cost the tokens they have, and the context only once.
    """

    def __init__(self, context, continuations, model):
        """context: ids, one at least; continuations: a list of ids each."""
        wpe = model.transformer.wpe.weight
        n, lengths = len(context), list(map(len, continuations))
        idx = [*context, *(token for ids in continuations for token in ids)]
        positions = [*range(n), *(n + i for length in lengths for i in range(length))]
        branch = [0] * n + [
            number for number, length in enumerate(lengths, 1) for _ in range(length)
        ]
        self.idx, self.positions, self.branch = (
            torch.tensor([x], device=wpe.device) for x in (idx, positions, branch)
        )
        # attention computes in its dtype
        self.kv = torch.empty(0, dtype=wpe.dtype, device=wpe.device)

    def mask(self, positions):
        """Return what is added to attention's scores, (1, 1, T, T)."""
        query, key = self.branch[0, :, None], self.branch[0]
        masked = ~(((key == 0) | (key == query)).tril())
        return torch.zeros_like(masked, dtype=self.kv.dtype).masked_fill_(masked, -math.inf)[
            None, None
        ]

    def update(self, layer, positions, kv):
        return kv


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, positions=None, mask=None, documents=None):
        B, T = x.shape[:2]
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        dropout = self.dropout if self.training else 0.0
        if documents is None:
            qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
            if cache is not None:
                qkv = qkv.to(cache.kv.dtype)
            q, (k, v) = (
                qkv[0],
                qkv[1:] if cache is None else cache.update(self.layer, positions, qkv[1:]),
            )
            if cache is not None and T == 1 and B > 1 and not x.is_cuda:
                # of many rows a token each: a step of 16 takes 0.94 of the time it does with PyTorch's kernel
                y = (q * q.size(-1) ** -0.5 @ k.mT + mask).softmax(-1) @ v
            else:
                causal = cache is None and mask is None
                y = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
                )
            y = y.transpose(1, 2)  # (B, T, nh, hs)
        else:
            y = attend_within(documents, qkv.flatten(0, 1), T, dropout).view(B, T, self.n_head, -1)
        y = self.c_proj(y.flatten(-2).to(x.dtype))  # (B, T, C)
        return self.resid_dropout(y) if self.training else y


def attend_within(documents, qkv, longest, dropout):
    """Return causal attention (N, nh, hs) within each document, from qkv (N, 3, nh, hs); see GPT.hidden."""
    if qkv.is_cuda:
        from torch.nn.attention.varlen import (
            varlen_attn,
        )  # here: it takes 70 MB, which a chat on a CPU need not have

        q, k, v = qkv.unbind(1)
        return varlen_attn(q, k, v, documents, documents, longest, longest, window_size=(-1, 0))
    lengths = [n for n in documents.diff().tolist() if n]
    parts = (
        part.permute(1, 2, 0, 3)[:, None] for part in qkv.float().split(lengths)
    )  # (3, 1, nh, n, hs) each
    with torch.autocast(
        "cpu", enabled=False
    ):  # at T = 1024 float32 takes 0.75 of bfloat16's time here
        parts = [
            F.scaled_dot_product_attention(*part, dropout_p=dropout, is_causal=True)
            for part in parts
        ]
    return torch.cat(parts, 2)[0].transpose(0, 1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return self.dropout(y) if self.training else y


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, mask=None, documents=None):
        x = x + self.attn(self.ln_1(x), cache, positions, mask, documents)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """The head and the sum of its cross-entropies, with the gradients computed along.

    HeadLoss.apply(x (N, C), weight (V, C), targets (N,), smoothing, learned) -> () float32, in nats; smoothing is the
    share of the target that is spread over all V tokens (Szegedy et al. 2015, arXiv 1512.00567); learned (n,) int64,
    the rows of the weight that have a gradient, None: all. 0.64 of the time of F.linear and F.cross_entropy on two
    cores (bfloat16 autocast, N = 1024), where float32 is 50,257 wide for 64 rows at a time.
    """

    ROWS = 4096  # of logits in 16 bits at once, 0.4 GB
    CPU_ROWS = 64  # of them in float32 on a CPU

    @staticmethod
    def forward(ctx, x, weight, targets, smoothing=0.0, learned=None):
        device, V = x.device.type, len(weight)
        w = weight.to(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        )
        if device == "cuda":
            w = F.pad(w, (0, 0, 0, -V % 64))  # tensor cores want round sizes
        loss = torch.zeros((), device=x.device)
        training = ctx.needs_input_grad[0]
        if training:
            ctx.dx, ctx.dw = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), HeadLoss.ROWS):
            these = slice(start, start + HeadLoss.ROWS)
            h = x[these].to(w.dtype)  # (n, C)
            logits = h @ w.T  # (n, V), which give way to their gradients
            logits[:, V:] = -math.inf
            rows = HeadLoss.CPU_ROWS if device == "cpu" else HeadLoss.ROWS
            for part, target in zip(
                logits.split(rows), targets[these, None].split(rows), strict=True
            ):
                logprobs = part.log_softmax(-1, dtype=torch.float32)
                loss -= (1 - smoothing) * logprobs.gather(1, target).sum()
                if smoothing:
                    loss -= smoothing / V * logprobs[:, :V].sum()
                if training:  # the gradient: probabilities, less those that are wanted
                    logprobs.exp_().scatter_add_(
                        1, target, torch.full_like(logprobs[:, :1], smoothing - 1)
                    )
                    part.copy_(logprobs.sub_(smoothing / V) if smoothing else logprobs)
            if training:
                ctx.dx[these] = logits @ w
                # a sum over thousands of rows: float16 could not hold it; on a CPU float32 comes out of no 16 bits
                wide = (
                    {"out_dtype": torch.float32}
                    if device == "cuda" and w.dtype != torch.float32
                    else {}
                )
                if learned is None:
                    ctx.dw += torch.mm(logits.T, h, **wide)[:V]
                else:
                    ctx.dw[learned] += torch.mm(logits[:, learned].T, h, **wide)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        dx, dw = ctx.dx, ctx.dw
        del ctx.dx, ctx.dw  # they are changed in place: a second backward pass has to fail
        return dx.mul_(scale), dw.mul_(scale), None, None, None


def move(tensor, device):
    """Return `tensor` on the device; nothing waits for a copy from the CPU to a GPU."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class GPT(nn.Module):
    def __init__(self, config):
        """Raises ValueError where the width is no multiple of the number of heads."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.gradient_checkpointing = (
            False  # compute each block again in the backward pass, to keep less
        )
        self.label_smoothing = 0.0  # of the loss in training
        self.learned = None  # the tokens whose embeddings are trained, (n,) int64; None: all
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Make the head share the token embedding's weight."""
        self.lm_head.weight = self.transformer.wte.weight

    def freeze_embeddings(self, frozen):
        """Give the embeddings of some tokens no gradient: frozen (V,) bool, on the device."""
        self.learned = (~frozen).nonzero()[:, 0]
        self.transformer.wte.weight.register_hook(lambda grad: grad.masked_fill(frozen[:, None], 0))

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases 0; the two projections of each layer into the residual stream are
        scaled by 1 / sqrt(2 n_layer), since that many are added up (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(
                    std=0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02
                )

    def forward(self, idx, targets=None, cache=None, positions=None, documents=None):
        """Return (logits, loss).

        idx: (B, T) int64. Without `targets`: logits (B, T, V) of every position, loss None.
        targets: (B, T) int64, -100 where there is no loss. loss: the mean cross-entropy in nats over the supervised
        positions, 0 where there are none; logits None. The targets may be on the CPU when all else is on a GPU: then
        nothing waits for the GPU.
        cache, positions, documents: as in `hidden`, which also says what is raised.
        """
        x = self.hidden(idx, cache, positions, documents)
        return (self.lm_head(x), None) if targets is None else (None, self.loss(x, targets))

    def loss(self, x, targets):
        """Return the mean cross-entropy of targets (B, T) after the hidden states x (B, T, C)."""
        # the head is as much work as four layers: spare it where there is no loss
        targets = targets.flatten()
        supervised = (targets != -100).nonzero()[:, 0]  # (N,)
        x = x.flatten(0, 1)[move(supervised, x.device)]  # (N, C)
        smoothing = self.label_smoothing if self.training else 0.0
        targets = move(targets[supervised], x.device)
        loss = HeadLoss.apply(x, self.lm_head.weight, targets, smoothing, self.learned)
        return loss / max(1, len(supervised))

    def compiled(self):
        """Return the model as torch.compile makes it, but for the loss, whose sizes differ from batch to batch."""
        self.loss = torch.compiler.disable(self.loss)
        return torch.compile(self)

    def hidden(self, idx, cache=None, positions=None, documents=None):
        """Return the final hidden states (B, T, C) of idx (B, T); the head makes logits of them.

        cache: a KVCache; `positions` (B, T) says where in it, and at which position embedding, the tokens stand.
        documents: (n + 1,) int32, rising from 0 to B * T, where each document begins in the rows laid end to end, if
        rows hold several: positions restart and attention stays within each. Equal numbers: a document of no tokens.
        Raises ValueError for more tokens than there are positions, where no cache says at which they stand.
        """
        B, T = idx.shape
        if cache is None and self.config.block_size < T:
            raise ValueError(
                f"{T} tokens in a row, but the model has {self.config.block_size} positions"
            )
        mask = None
        if cache is not None:
            mask = cache.mask(positions)
        elif documents is not None:
            at = torch.arange(B * T, device=documents.device, dtype=documents.dtype)
            number = (
                torch.searchsorted(documents, at, right=True) - 1
            )  # (B * T,), of the document there
            positions = (at - documents[number]).view(B, T)
            if not self.attends_blockwise(idx.device):
                number = number.view(B, T)
                mask, documents = (
                    (number[:, :, None] == number[:, None]).tril()[:, None],
                    None,
                )  # (B, 1, T, T)
        else:
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(
            self.transformer.wte(idx) + self.transformer.wpe(positions)
        )  # (B, T, C)
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, None, None, mask, documents, use_reentrant=False)
            else:
                x = block(x, cache, positions, mask, documents)
        return self.transformer.ln_f(x)

    def attends_blockwise(self, device):
        """Return whether attention within documents is computed block by block there, else under a mask.

        On a CPU one after the other, at T = 1024 in half (with dropout in a sixth) of the mask's time; compiled, it
        would be compiled anew for each batch. On a GPU by FlashAttention, which takes 16 bits and knows no dropout.
        """
        if device.type == "cuda":
            autocast = torch.is_autocast_enabled("cuda")
            dtype = (
                torch.get_autocast_dtype("cuda") if autocast else self.transformer.wpe.weight.dtype
            )
            dropout, hs = (
                self.training and self.config.dropout > 0,
                self.config.n_embd // self.config.n_head,
            )
            fits = dtype != torch.float32 and not dropout and hs % 8 == 0 and hs <= 256
            return fits and torch.cuda.get_device_capability(device) >= (8, 0)
        return device.type == "cpu" and not torch.compiler.is_compiling()

    def kv_cache(self, rows, size):
        """Return an empty KVCache for this model."""
        c, like = self.config, self.transformer.wpe.weight
        shape = (c.n_layer, 2, rows, c.n_head, size, c.n_embd // c.n_head)
        if like.device.type == "cpu" and like.dtype == torch.float32:
            # NumPy asks the system for large pages: a step of 16 rows takes 0.96 of the time
            return KVCache(torch.from_numpy(np.zeros(shape, np.float32)))
        return KVCache(torch.zeros(shape, device=like.device, dtype=like.dtype))

    @torch.no_grad()
    def grow_vocab(self, vocab_size):
        """Append token embeddings up to `vocab_size`, each the mean of those there are: no new token stands out. Where
        there are as many, nothing happens."""
        old = self.transformer.wte.weight
        if vocab_size <= len(old):
            return
        mean = old.mean(0, keepdim=True).expand(vocab_size - old.size(0), -1)
        self.transformer.wte = nn.Embedding.from_pretrained(torch.cat([old, mean]), freeze=False)
        self.lm_head.out_features = self.config.vocab_size = vocab_size
        self.tie_weights()

    def num_parameters(self):
        """Return how many parameters there are; the head shares the embedding's and is not counted again."""
        c, C = self.config, self.config.n_embd
        layer = (
            12 * C * C + 13 * C
        )  # c_attn 3, c_proj 1, the MLP 8 C^2; their biases and two LayerNorms
        return (c.vocab_size + c.block_size) * C + c.n_layer * layer + 2 * C

    def flops_per_token(self, T, supervised=1.0):
        """Return the floating-point operations of training on one token in a text of T, forward and backward.

        6 for each weight of a matrix product (the head's included, the position embedding's not), and 12 n_layer C T
        for attention (PaLM, arXiv 2204.02311, appendix B). supervised: the share of tokens that need the head.
        """
        c = self.config
        weights = (
            self.num_parameters() - (c.block_size + (1 - supervised) * c.vocab_size) * c.n_embd
        )
        return 6 * weights + 12 * c.n_layer * c.n_embd * T


class RewardModel(GPT):
    """GPT-2 with a score of the text in place of the head: names and arithmetic of GPT2ForSequenceClassification with
    one label. State dicts pass both ways."""

    def __init__(self, config):
        super().__init__(config)
        del self.lm_head
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def tie_weights(self):
        """There is no head to share the embedding's weight."""

    def num_parameters(self):
        return super().num_parameters() + self.score.weight.numel()

    @torch.no_grad()
    def shorten(self, block_size):
        """Leave the model the first `block_size` positions."""
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].clone(), freeze=False
        )
        self.config.block_size = block_size

    def forward(self, idx, lengths):
        """Return the score of each row, (B,), a logit: the higher, the likelier is it that the reply is kept.

        idx: (B, T) int64, padded on the right with anything. lengths: (B,) int64, the tokens of each row, at least 1.
        """
        x = self.hidden(idx)  # (B, T, C)
        return self.score_of(x[torch.arange(len(x), device=x.device), lengths - 1])

    def score_of(self, x):
        """Return the scores (N,) float32 of final hidden states (N, C): in float32, since in 16 bits many are equal."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.score.weight.float())[:, 0]
