"""
Plot the attention mask and one head's attention in a packed row:

    python evaluation/attention.py --init_from=nano

Left: which tokens may attend to which, in a row of several conversations. Right: what one head
attends to in the last reply of the second conversation. Needs matplotlib (pip install matplotlib).
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import COLORS
from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import run
from nanochatgpt.files import replacing
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards


@dataclass
class Config:
    init_from: str = "nano"  # the model: nano, a directory, gpt2, ..., org/name
    data_dir: str = "data"  # where the shards are
    dataset: str = "recall"  # pack its val*.bin
    tokens: int = 480  # tokens in the row
    row: int = 5  # which row, from 0
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
    mask = document_ids[:, None] == document_ids
    mask = mask.tril()  # (T, T)
    weights = []

    def attend(i, q, k, v, dropout):
        if i == layer:
            scores = q[0, head] @ k[0, head].T  # (T, T)
            scores /= math.sqrt(q.size(-1))
            scores = scores.masked_fill(~mask, -math.inf)
            weights.append(scores.softmax(-1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model.hidden(x, positions=positions[None], attend=attend)
    return mask, weights[0]


def main(config):
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("this picture needs matplotlib: pip install matplotlib") from None
    model, tokenizer = load_model(config.init_from)
    c = model.config
    if config.layer not in range(c.n_layer) or config.head not in range(c.n_head):
        raise ValueError(f"the model has {c.n_layer} layers of {c.n_head} heads, counted from 0")

    # the row
    shards = find_shards(config.data_dir, config.dataset, "val")
    loader = Loader(shards, 1, config.tokens, 0, tokenizer)
    x, y, documents = loader.batch(config.row)
    mask, weights = head_attention(model, x, documents, config.layer, config.head)

    # the positions that learn the next token, and where each conversation begins
    learned = (y[0] != -100).nonzero()[:, 0].tolist()
    starts = documents.unique().tolist()  # ends with the length of the row
    if not x[0, starts[-2] :].any():
        del starts[-2]  # where the padding begins

    # the last reply of the second conversation, or of the only one
    start, stop = starts[:3][-2:]
    reply = []
    for pos in learned:
        if start <= pos < stop:
            if pos - 1 not in reply:
                reply = []  # a new reply
            reply.append(pos)

    # the text of each token; matplotlib would read $ as mathematics
    labels = []
    for token in x[0].tolist():
        text = tokenizer.decode([token])
        labels.append(text.replace("\n", r"\n").replace("$", r"\$"))
    reply_labels = [labels[pos] for pos in reply]

    # left: the mask, every other conversation darker; the positions that learn in orange
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    shade = torch.zeros(config.tokens, 1)
    for i, first in enumerate(starts[:-1]):
        shade[first:] = 1 + i % 2
    picture = (mask * shade).numpy()
    left.imshow(picture, cmap="Blues", vmin=0, vmax=3, interpolation="none")
    margin = [-config.tokens // 50] * len(learned)
    left.scatter(margin, learned, s=4, color=COLORS[1], marker="s", clip_on=False)
    left.set_xlabel("looked at: position in the row")
    left.set_ylabel("looking (orange: learns the next)")
    left.set_title("who may look at whom")

    # right: the reply's tokens (rows) over the tokens of their conversation
    picture = weights[reply, start:stop].numpy()
    right.imshow(picture, cmap="Blues", aspect="auto", interpolation="none")
    right.set_xticks(range(stop - start), labels[start:stop], rotation=90, fontsize=6)
    right.set_yticks(range(len(reply)), reply_labels, fontsize=7)
    right.set_title(f"where head {config.head} of layer {config.layer} looks")

    with replacing(Path(config.png)) as part:
        figure.savefig(part, format="png")
    print(f"wrote {config.png}", file=sys.stderr)
    print(json.dumps({"begin": starts[:-1], "reply": "".join(reply_labels)}))


if __name__ == "__main__":
    run(main, Config)
