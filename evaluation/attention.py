"""Plot the attention mask and one head's attention in a packed row:

    python evaluation/attention.py --init_from=nano

Left: which tokens may attend to which, in a row of several conversations. Right: what one head
attends to in the last reply of the second conversation. Needs matplotlib (pip install matplotlib).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import new_figure, save
from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import run
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards


@dataclass
class Config:
    init_from: str = "nano"  # the model: nano, a directory, gpt2, ..., org/name
    dataset: str = "recall"  # pack the val*.bin of this folder of data/
    tokens: int = 480  # tokens in the row
    row: int = 15  # which row, from 0
    layer: int = 1  # draw a head of this layer, from 0
    head: int = 1  # which head, from 0
    png: str = "attention.png"  # the file to write


@torch.inference_mode()
def head_attention(model, x, documents, layer, head):
    """Return (mask (T, T) bool, attention weights (T, T) of a head) of a packed row x (1, T).
    documents: as in GPT.hidden."""
    # the conversation that each token is in, and its position in that
    index = torch.arange(x.size(1), dtype=documents.dtype)
    document_ids = torch.searchsorted(documents, index, right=True) - 1  # (T,)
    positions = index - documents[document_ids]
    mask = (document_ids[:, None] == document_ids).tril()  # (T, T)
    weights = []

    def attend(i, q, k, v, dropout):
        if i == layer:
            # with the identity as values, attention returns its weights
            eye = torch.eye(x.size(1)).expand(*q.shape[:2], -1, -1)
            weights.append(F.scaled_dot_product_attention(q, k, eye, attn_mask=mask)[0, head])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model.hidden(x, positions=positions[None], attend=attend)
    return mask, weights[0]


def main(config):
    figure = new_figure()
    model, tokenizer = load_model(config.init_from)
    c = model.config
    if config.layer not in range(c.n_layer) or config.head not in range(c.n_head):
        raise ValueError(f"the model has {c.n_layer} layers of {c.n_head} heads, counted from 0")

    # the row
    shards = find_shards("data", config.dataset, "val")
    x, y, documents = Loader(shards, 1, config.tokens, 0, tokenizer).batch(config.row)
    mask, weights = head_attention(model, x, documents, config.layer, config.head)

    # the last reply of the second conversation: the last run of positions that learn
    start, stop = documents[1:3].tolist()
    learned = (y[0, start:stop] != -100).nonzero()[:, 0]
    gaps = (learned.diff() > 1).nonzero()[:, 0]
    reply = learned.tensor_split(gaps + 1)[-1]

    # the text of each token of the conversation; repr writes a line break as \n
    labels = [repr(tokenizer.decode([token]))[1:-1] for token in x[0, start:stop]]
    reply_labels = [labels[pos] for pos in reply]

    # left: the mask
    figure.set_size_inches(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    left.imshow(mask.numpy(), cmap="Blues", vmax=2, interpolation="none")
    left.set_title("who may look at whom")

    # right: the reply's tokens (rows) over the tokens of their conversation
    picture = weights[start:stop, start:stop][reply].numpy()
    right.imshow(picture, cmap="Blues", aspect="auto", interpolation="none")
    right.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    right.set_yticks(range(len(reply)), reply_labels, fontsize=7)
    right.set_title(f"where head {config.head} of layer {config.layer} looks")
    save(figure, config.png)


if __name__ == "__main__":
    run(main, Config)
