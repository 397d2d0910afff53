"""
Heads that copy, set by hand: a small GPT that starts from scratch then remembers what was said from its first steps on.

To repeat a name it was told, a transformer needs two kinds of heads (induction heads: Elhage et al. 2021, Olsson et al.
2022, arXiv 2209.11895). In layer 0 a head looks at the token before and notes which one that was; in layer 1 another
looks for the place whose note says what the current token is, and copies what stands there: after "my name is Bo ...
your name is", Bo. Training finds them by itself, but late: with 11.5M parameters and 0.9M tokens of recall
(prepare/recall.py) half of the questions for what was said three exchanges ago were answered, from weights drawn at
random one in fifty. Nothing is fixed: training may keep these heads or change them.
"""

import math

import torch


@torch.no_grad()
def set_induction_heads(model):
    """Set the embeddings of a new GPT, a third of layer 0's heads and two thirds of layer 1's to copy.

    The first hs dimensions carry the position alone, as sines and cosines, the others the token. Raises ValueError for
    a shape without room: fewer than two layers or three heads, or heads of an odd width.
    """
    c, parts = model.config, model.transformer
    C, hs, n_looking = c.n_embd, c.n_embd // c.n_head, c.n_head // 3
    if c.n_layer < 2 or n_looking < 1 or hs % 2:
        shape = f"n_layer={c.n_layer}, n_head={c.n_head}, n_embd={c.n_embd}"
        raise ValueError(
            f"induction_heads needs two layers, three heads and heads of an even width, not {shape}"
        )
    norm = math.sqrt(
        C / 2
    )  # of a position's and of a token's half of the residual stream, behind a LayerNorm

    # what a position and a token look like: vectors of norm 1, in dimensions of their own
    frequencies = 2.5 * 0.003 ** (torch.arange(hs // 2) / (hs // 2))
    angles = torch.arange(c.block_size)[:, None] * frequencies  # (block_size, hs / 2)
    parts.wpe.weight.zero_()
    parts.wpe.weight[:, :hs] = torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(hs / 2)
    parts.wte.weight.normal_(std=(C - hs) ** -0.5)
    parts.wte.weight[:, :hs] = 0

    def code():
        """Return (C, hs): a projection of the token's half to the width of a head."""
        return torch.cat([torch.zeros(hs, hs), torch.linalg.qr(torch.randn(C - hs, hs))[0]])

    def set_head(layer, head, query, key, value, output):
        """query, key, value: (C, hs); output: (hs, C)."""
        attn, at = parts.h[layer].attn, head * hs
        for i, weight in enumerate((query, key, value)):
            attn.c_attn.weight[:, i * C + at : i * C + at + hs] = weight
        attn.c_proj.weight[at : at + hs] = output

    # layer 0: a key is its position, a query its position turned back by one step; the score is 40 where they meet
    cos, sin = torch.diag(frequencies.cos()), torch.diag(frequencies.sin())
    back = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])  # (hs, hs)
    position = torch.eye(C, hs) * math.sqrt(40 * math.sqrt(hs)) / norm
    tokens, notes = [code() for _ in range(n_looking)], [code() for _ in range(n_looking)]
    for head, (token, note) in enumerate(zip(tokens, notes, strict=True)):
        set_head(0, head, position @ back, position, token, 1.5 / norm * note.T)

    # layer 1: a key is the note, a query the token, in the same code; the value is the token there
    sharp = math.sqrt(5 * math.sqrt(hs) * (C - hs) / hs) / norm
    for head in range(2 * n_looking):
        copied = code()
        token, note = tokens[head % n_looking], notes[head % n_looking]
        set_head(1, head, sharp * token, sharp * note, copied, 2 / norm * copied.T)
