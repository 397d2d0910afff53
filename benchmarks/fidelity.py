"""How far 8 or 16 bits move a model's predictions on real text: python benchmarks/fidelity.py"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import torch
import torch.nn.functional as F

from benchmarks.common import load, run_benchmark
from nanochatgpt.checkpoint import load_model
from nanochatgpt.shards import find_shards, open_shard


@dataclass
class Config:
    init_from: str = "nano"  # a trained model: nano, gpt2, ..., org/name or a directory
    data_dir: str = "data"  # where the datasets are
    dataset: str = "chitchat"  # take the text from this dataset's val*.bin
    positions: int = 2000  # next-token distributions to compare
    dtype: str = "int8"  # compare this one with float32: auto, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@torch.inference_mode()
def measure(config):
    """Predict the same text in float32 and in config.dtype; compare the distributions."""
    path, _ = find_shards(config.data_dir, config.dataset, "val")[0]
    model, _, device, _ = load(config)
    reference, _ = load_model(config.init_from, device)
    tokens = open_shard(path).tokens[: config.positions + 1].astype("int64")
    tokens = torch.from_numpy(tokens).to(device)

    # sum over the positions, a context at a time
    n = len(tokens) - 1
    kl = 0.0
    n_same = 0
    loss = 0.0
    reference_loss = 0.0
    block_size = model.config.block_size
    for x, y in zip(tokens[:-1].split(block_size), tokens[1:].split(block_size), strict=True):
        logits, _ = reference(x[None])  # (1, T, V)
        p = logits[0].float().log_softmax(-1)  # (T, V)
        logits, _ = model(x[None])
        q = logits[0].float().log_softmax(-1)
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        n_same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        reference_loss += F.nll_loss(p, y, reduction="sum").item()
        loss += F.nll_loss(q, y, reduction="sum").item()
    return {
        "kl": kl / n,  # mean KL divergence from float32, nats
        "same_top": n_same / n,  # share of positions with the same most likely token
        "perplexity": math.exp(loss / n),
        "perplexity_float32": math.exp(reference_loss / n),
        "positions": n,
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
