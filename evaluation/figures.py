"""
Draw what the README shows: python figures.py attention|repetition|best_of [--knob=value ...]

    attention   a packed row: what each token may look at, and where one head of the model in the box does look
    repetition  how much of a reply has been said before, the longer it gets, with and without a penalty
    best_of     the reward of the best of N replies

The picture needs matplotlib (pip install matplotlib); its numbers are printed as one JSON object.
Loss curves are plot.py's.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import best_of
from evaluation.metrics import repeated_4grams
from evaluation.report import COLOURS
from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import at_least, run, take_mode
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.files import replacing
from nanochatgpt.generate import generate
from nanochatgpt.loader import Loader
from nanochatgpt.sampling import ChatSampling, for_template, options_of
from nanochatgpt.shards import find_shards, open_shard, sample_prompts

PENALTIES = {  # of the curves of repetition
    "none": {"frequency_penalty": 0.0},
    "repetition_penalty 1.1": {"frequency_penalty": 0.0, "repetition_penalty": 1.1},
    "frequency_penalty 0.7": {"frequency_penalty": 0.7},
}


@dataclass
class Attention:
    init_from: str = "nano"  # as for chat.py
    data_dir: str = "data"  # where the shards are
    dataset: str = "recall"  # whose val*.bin is packed
    tokens: int = 480  # in the row
    row: int = 5  # which row of it, from 0 on
    conversation: int = 1  # in the row, from 0 on: of it the last reply is looked into
    layer: int = 1  # whose head is drawn, from 0 on
    head: int = 1  # which of its heads, from 0 on
    png: str = "attention.png"  # where the picture is written


@dataclass
class Repetition(ChatSampling):
    init_from: str = default_model()  # as for chat.py
    data_dir: str = "data"  # where the shards are
    dataset: str = "personachat"  # whose held-out people are replied to: this data set's val*.bin
    prompts: int = 200  # so many of them
    max_new_tokens: int = 120  # tokens of a reply, which is not allowed to end before
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    png: str = "repetition.png"  # where the picture is written


@dataclass
class BestOf(best_of.Config):
    png: str = "best_of.png"  # where the picture is written


@torch.inference_mode()
def row_attention(config):
    """Return (seen (T, T) bool, a head's attention (T, T), the row's ids (T,), where its conversations begin, which of
    its tokens are followed by one that is learned, the Tokenizer)."""
    at_least(1, config, "tokens")
    at_least(0, config, "row", "conversation", "layer", "head")
    model, tokenizer = load_model(config.init_from)
    c, T = model.eval().config, config.tokens
    if config.layer >= c.n_layer or config.head >= c.n_head:
        raise ValueError(
            f"layer={config.layer}, head={config.head}: there are {c.n_layer} layers of {c.n_head} heads"
        )
    shards = find_shards(config.data_dir, config.dataset, "val")
    x, y, documents = Loader(shards, 1, T, 0, tokenizer).batch(config.row)
    caught = []
    model.transformer.h[config.layer].attn.c_attn.register_forward_hook(
        lambda *call: caught.append(call[2])
    )
    model.hidden(x, documents=documents)
    q, k, _ = caught[0].view(T, 3, c.n_head, -1)[:, :, config.head].unbind(1)  # (T, hs)
    starts = documents.unique()[:-1]
    if not (x[0, starts[-1] :].any() or (y[0, starts[-1] :] >= 0).any()):
        starts = starts[:-1]  # what is there is padding
    number = torch.searchsorted(starts, torch.arange(T, dtype=starts.dtype), right=True)
    seen = (number[:, None] == number).tril()  # (T, T)
    weights = (q @ k.T / q.size(-1) ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return seen, weights, x[0], starts.tolist(), (y[0] != -100).nonzero()[:, 0], tokenizer


def attention(config):
    """Draw a row's mask, and what a head looks at in the last reply of one of its conversations."""
    seen, weights, ids, starts, learned, tokenizer = row_attention(config)
    if config.conversation >= len(starts):
        raise ValueError(
            f"conversation={config.conversation}: there are {len(starts)} in the row, from 0 on"
        )
    first, last = [*starts, len(ids)][config.conversation : config.conversation + 2]
    reply = learned[(learned >= first) & (learned < last)]
    gaps = (reply.diff() > 1).nonzero()[:, 0].tolist()
    reply = reply[gaps[-1] + 1 :] if gaps else reply
    texts = [
        tokenizer.decode([token]).replace("\n", r"\n").replace("$", r"\$") for token in ids.tolist()
    ]

    def draw(figure):
        row, one = figure.subplots(1, 2, width_ratios=(1, 2))
        shade = torch.zeros(len(ids))
        for n, start in enumerate(starts):
            shade[start:] = n % 2 + 1
        row.imshow(
            (seen * shade[:, None]).numpy(), cmap="Blues", vmin=0, vmax=3, interpolation="none"
        )
        row.scatter(
            [-0.02 * len(ids)] * len(learned),
            learned,
            s=4,
            color=COLOURS[1],
            marker="s",
            clip_on=False,
        )
        row.set(
            xlabel="looked at: position in the row",
            ylabel="looking (orange: what follows is learned)",
        )
        row.set_title("who may look at whom")
        one.imshow(
            weights[reply, first:last].numpy(), cmap="Blues", aspect="auto", interpolation="none"
        )
        one.set_xticks(range(last - first), texts[first:last], rotation=90, fontsize=6)
        one.set_yticks(range(len(reply)), [texts[at] for at in reply], fontsize=7)
        one.set_title(
            f"where head {config.head} of layer {config.layer} looks in a reply of conversation {config.conversation}"
        )

    return draw, (11, 4.2), {"begin": starts, "reply": "".join(texts[at] for at in reply)}


def repetition(config):
    """Draw the share of 4-grams that came before in the same reply; return it for each penalty, every 20 tokens."""
    at_least(1, config, "prompts")
    at_least(20, config, "max_new_tokens")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    shards = [open_shard(path) for path, _ in find_shards(config.data_dir, config.dataset, "val")]
    prompts, _ = sample_prompts(
        shards, tokenizer, config.prompts, model.config.block_size - config.max_new_tokens, 0
    )
    if not prompts:
        raise ValueError(
            f"no reply in {config.dataset} leaves room for max_new_tokens={config.max_new_tokens}: lower it"
        )
    lengths, found = range(20, config.max_new_tokens + 1, 20), {}
    for name, penalty in PENALTIES.items():
        options = options_of(for_template(config, tokenizer.template)) | penalty
        never = dict.fromkeys(
            tokenizer.stop_ids, -100.0
        )  # a reply that ended could not repeat itself any more
        replies = generate(model, prompts, seed=0, logit_bias=never, tokenizer=tokenizer, **options)
        found[name] = [
            repeated_4grams([tokenizer.decode(ids[:n]) for ids in replies]) for n in lengths
        ]
        print(f"{name}: {', '.join(f'{share:.1%}' for share in found[name])}", file=sys.stderr)

    def draw(figure):
        axes = figure.subplots()
        for (name, shares), colour in zip(found.items(), COLOURS, strict=False):
            axes.plot(
                lengths,
                [100 * share for share in shares],
                "o-",
                color=colour,
                label=name,
                markersize=4,
            )
        axes.set(
            xlabel="tokens of the reply so far", ylabel="% of its 4-grams that it has said before"
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()

    return draw, (7, 3.8), {"lengths": list(lengths)} | found


def rewards(config):
    """Draw the mean reward of the best of 1, 2, 4, ... replies; return what `bench.py best_of` does."""
    result = best_of.measure(config)

    def draw(figure):
        axes = figure.subplots()
        axes.plot(list(result["rewards"]), list(result["rewards"].values()), "o-", color=COLOURS[0])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(result["rewards"]), list(result["rewards"]))
        axes.set(xlabel="replies to choose from", ylabel="mean reward of the best")
        axes.grid(alpha=0.3)

    return draw, (7, 3.3), result


MODES = {
    "attention": (attention, Attention),
    "repetition": (repetition, Repetition),
    "best_of": (rewards, BestOf),
}


def main():
    make, Config = MODES[take_mode(MODES, __doc__)]

    def save(config):
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ValueError("pictures need matplotlib: pip install matplotlib") from None
        draw, size, numbers = make(config)
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        draw(figure)
        with replacing(Path(config.png)) as part:
            figure.savefig(part, format="png")
        print(f"wrote {config.png}", file=sys.stderr)
        print(json.dumps(numbers))

    run(save, Config)


if __name__ == "__main__":
    main()
