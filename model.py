"""
GPT-2 in one file, with the names, layouts and arithmetic of Hugging Face's GPT2LMHeadModel, so that
state dicts pass both ways. nanochatgpt/fast.py computes the same loss and packed attention faster,
nanochatgpt/engine.py generates faster: the same greedy text, but its own random numbers.

Shapes: B rows, T tokens in a row, C = n_embd, nh heads of size hs = C / nh, V = vocab_size.
References: openai/gpt-2 (src/model.py), transformers (models/gpt2/modeling_gpt2.py),
karpathy/nanoGPT (model.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
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
    block_size: int = 1024  # the context: the number of position embeddings
    vocab_size: int = 50257  # GPT-2's tokens; a template may add some
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the hidden states
    dropout: float = 0.0  # on embeddings and each block's two outputs
    attention_dropout: float = 0.0  # on attention weights; keeps packed rows off fast kernels
    activation: str = "gelu_new"  # GPT-2's tanh form of GELU; gelu: the exact form, with erf


class Conv1D(nn.Module):
    """A linear layer that stores its weight as [in, out], as OpenAI's code does."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


# Who may look at whom. An `attend` function takes the layer's number, queries, keys and values
# (B, nh, T, hs) and the dropout probability, and returns (B, nh, T, hs). The engine passes its
# key-value cache instead, which is called the same way.


def causal_attention(layer, q, k, v, dropout):
    """Each token looks at itself and at all tokens before it in its row."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def packed_attention(documents, document_ids):
    """Return an `attend` for rows that hold several documents: causal, and within each document.

    documents: see GPT.hidden; document_ids: (B, T), which document a token is in.
    """
    same_document = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
    mask = same_document.tril()[:, None]  # (B, 1, T, T)

    def attend(layer, q, k, v, dropout):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    return attend


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer  # tells the engine's cache which layer calls
        self.n_head = config.n_head
        self.dropout = config.attention_dropout
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, attend):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        y = attend(self.layer, q, k, v, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).flatten(2))  # heads side by side again: (B, T, C)
        return self.resid_dropout(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = {"gelu_new": "tanh", "gelu": "none"}[config.activation]

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4 C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, attend):
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    architecture = "GPT2LMHeadModel"  # transformers' class with these weights
    packed_attention = staticmethod(packed_attention)

    def __init__(self, config):
        """Raises ValueError if the width is not a multiple of the number of heads."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # tokens
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # positions
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.gradient_checkpointing = False  # True: recompute blocks, instead of storing them
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Make the head share the token embedding's weight."""
        self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases 0. The two projections of each layer into the
        residual stream are scaled by 1 / sqrt(2 n_layer), because 2 n_layer of them are summed
        (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 2:  # LayerNorm weights stay 1
                scale = 1 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1
                p.normal_(std=0.02 * scale)

    def forward(self, idx, targets=None, documents=None):
        """Return (logits, loss).

        idx: (B, T) int64. Without targets: logits (B, T, V), loss None.
        targets: (B, T) int64, the next token where there is a loss and -100 elsewhere. Then logits
        are None and loss is the mean cross-entropy in nats over the supervised positions, 0 if
        there are none.
        documents, errors: as in `hidden`.
        """
        x = self.hidden(idx, documents)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        return None, self.loss(x, targets)

    def hidden(self, idx, documents=None, positions=None, attend=causal_attention):
        """Return the final hidden states (B, T, C) of idx (B, T). `lm_head` turns them into logits.

        documents: (n + 1,) int32 cu_seqlens, for rows that hold several documents: document i is
        tokens documents[i]:documents[i+1] of the flattened batch, empty if both are equal. They
        rise from 0 to B * T. Positions restart in each document and attention stays within it.
        positions, attend: (B, T) int64 and a function as above, for callers with a cache.
        Raises ValueError for rows longer than the context.
        """
        B, T = idx.shape
        if positions is None:
            context = self.config.block_size
            if context < T:
                raise ValueError(f"a row of {T} tokens exceeds the context of {context}")
            index = torch.arange(B * T, device=idx.device)
            if documents is None:
                positions = index[:T]
            else:
                document_ids = torch.searchsorted(documents, index, right=True) - 1  # (B * T,)
                positions = (index - documents[document_ids]).view(B, T)  # restart at 0
                attend = self.packed_attention(documents, document_ids.view(B, T))

        # token and position embeddings, the blocks, the final LayerNorm
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, attend, use_reentrant=False)
            else:
                x = block(x, attend)
        return self.transformer.ln_f(x)

    def loss(self, x, targets):
        """Return the mean cross-entropy of targets (B, T) given the hidden states x (B, T, C)."""
        targets = targets.to(x.device)
        supervised = targets != -100  # skip the rest: the head costs as much as four layers
        logits = self.lm_head(x[supervised]).float()  # (N, V)
        total = F.cross_entropy(logits, targets[supervised], reduction="sum")
        return total / supervised.sum().clamp(min=1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Return idx (B, T) with max_new_tokens sampled tokens appended; temperature 0 takes the
        most likely one, top_k=0 samples from all. Recomputes the whole context for each token:
        the reference for nanochatgpt/engine.py."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1]  # (B, V)
            if top_k:
                kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
                logits[logits < kth] = -math.inf
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                next_token = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat([idx, next_token], dim=1)
        return idx

    @torch.no_grad()
    def grow_vocab(self, vocab_size):
        """Append token embeddings up to vocab_size, each the mean of the existing ones so that no
        new token stands out. No-op if the vocabulary is already that large."""
        old = self.transformer.wte.weight
        if vocab_size <= len(old):
            return
        new = old.mean(0, keepdim=True).expand(vocab_size - len(old), -1)
        self.transformer.wte = nn.Embedding.from_pretrained(torch.cat([old, new]), freeze=False)
        self.config.vocab_size = vocab_size
        self.tie_weights()

    def num_parameters(self):
        """Return the number of parameters; the head shares the embedding's and adds none."""
        c = self.config
        layer = 12 * c.n_embd**2 + 13 * c.n_embd  # c_attn 3, c_proj 1, MLP 8; biases, LayerNorms
        return (c.vocab_size + c.block_size + 2) * c.n_embd + c.n_layer * layer

    def flops_per_token(self, T, supervised=1.0):
        """Return the FLOPs of one training token in a text of T tokens, forward and backward.

        6 for each weight of a matrix product (the head's included, the position embedding's not),
        and 12 n_layer C T for attention (PaLM, arXiv 2204.02311, appendix B). supervised: the share
        of tokens that need the head.
        """
        c = self.config
        embeddings = (c.block_size + (1 - supervised) * c.vocab_size) * c.n_embd
        weights = self.num_parameters() - embeddings
        return 6 * weights + 12 * c.n_layer * c.n_embd * T
