"""Write nano's hand-set start, a GPT with heads that copy: python assets/nano/start.py

To repeat a name it was told, a transformer needs two kinds of heads (induction heads: Elhage et al.
2021, Olsson et al. 2022, arXiv 2209.11895). A head in layer 0 notes the token before each token. A
head in layer 1 looks for the place whose note is the current token, and copies the token there:
after "my name is Bo ... your name is", Bo. Training finds them too, but later; README.md compares.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer


@dataclass
class Config:
    out_dir: str = "out/start"  # the checkpoint to write


@torch.no_grad()
def set_induction_heads(model):
    """Set the embeddings, a third of layer 0's heads and two thirds of layer 1's. That takes two
    layers, three heads and an even head size."""
    c = model.config
    C = c.n_embd
    hs = C // c.n_head  # size of a head
    half = hs // 2
    n_pairs = c.n_head // 3
    norm = math.sqrt(C / 2)  # of the position's and of the token's part, after a LayerNorm

    # embeddings of norm 1: positions as waves in hs dimensions, tokens as noise in the others
    frequencies = 2.5 * 0.003 ** (torch.arange(half) / half)  # (half,)
    angles = torch.arange(c.block_size)[:, None] * frequencies  # (block_size, half)
    wpe = model.transformer.wpe.weight.zero_()  # (block_size, C)
    wpe[:, :hs] = torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(half)
    wte = model.transformer.wte.weight.normal_(std=(C - hs) ** -0.5)  # (V, C)
    wte[:, :hs] = 0

    def random_code():
        """Return (C, hs): a random orthogonal projection of the token's part to a head's size."""
        basis, _ = torch.linalg.qr(torch.randn(C - hs, hs))
        return torch.cat([torch.zeros(hs, hs), basis])  # nothing of the position's part

    def set_head(layer, head, query, key, value, output):
        """query, key, value: (C, hs); output: (hs, C)."""
        attn = model.transformer.h[layer].attn
        qkv = attn.c_attn.weight.view(C, 3, c.n_head, hs)
        qkv[:, :, head] = torch.stack([query, key, value], 1)
        attn.c_proj.weight.view(c.n_head, hs, C)[head] = output

    # layer 0: the query is the position turned back by one, the key the position, the score 40
    cos = frequencies.cos().diag()
    sin = frequencies.sin().diag()
    upper = torch.cat([cos, -sin], 1)
    lower = torch.cat([sin, cos], 1)
    back = torch.cat([upper, lower])  # (hs, hs), a rotation
    position = torch.eye(C, hs) * math.sqrt(40 * math.sqrt(hs)) / norm
    tokens = [random_code() for _ in range(n_pairs)]
    notes = [random_code() for _ in range(n_pairs)]
    for head in range(n_pairs):
        set_head(0, head, position @ back, position, tokens[head], 1.5 / norm * notes[head].T)

    # layer 1: the query is the current token, the key the note; copy the token at that place
    sharpness = math.sqrt(5 * math.sqrt(hs) * (C - hs) / hs) / norm
    for head in range(2 * n_pairs):
        query = sharpness * tokens[head % n_pairs]
        key = sharpness * notes[head % n_pairs]
        value = random_code()
        set_head(1, head, query, key, value, 2 / norm * value.T)


def main(config):
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=512, n_layer=4, n_head=6, n_embd=192))
    set_induction_heads(model)
    save_model(model, Tokenizer(), config.out_dir)
    print(f"wrote {config.out_dir}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    run(main, Config)
