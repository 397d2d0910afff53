"""
What a dtype costs: how far its next-token distributions are from float32's, on real text.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.shards import find_shards, open_shard


@dataclass
class Config:
    init_from: str = "nano"  # a trained model: nano, a directory, gpt2, ... or org/name on the hub
    data_dir: str = "data"  # where the shards are
    dataset: str = "chitchat"  # the text: this data set's val*.bin
    positions: int = 2000  # next-token distributions to compare
    dtype: str = "int8"  # what to compare with float32: auto, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@torch.inference_mode()
def measure(config):
    """Return the mean KL divergence of the dtype's next-token distributions from float32's, in nats, over the first
    positions of a validation set, how often both have the same likeliest token, and both perplexities."""
    at_least(1, config, "positions")
    if config.init_from.startswith("random:"):
        raise ValueError(
            f"init_from={config.init_from}: two random models have nothing in common; take a trained one"
        )
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    paths = find_shards(config.data_dir, config.dataset, "val")
    models = [load_model(config.init_from, device)[0].eval()]
    models.append(load_model(config.init_from, device, dtype, inference=True)[0].eval())
    block = models[0].config.block_size
    tokens = torch.from_numpy(
        open_shard(paths[0][0]).tokens[: config.positions + 1].astype("int64")
    ).to(device)
    if len(tokens) < 2:
        raise ValueError(f"{paths[0][0]} has {len(tokens)} tokens: too few to compare")
    kl = same = n = 0
    losses = [0.0, 0.0]
    for x, y in zip(tokens[:-1].split(block), tokens[1:].split(block), strict=True):
        positions = torch.arange(len(x), device=device)[None]
        # through the cache, as in generation: it may round keys and values
        caches = [model.kv_cache(1, block).part(slice(1), len(x)) for model in models]
        logits = [
            model(x[None], None, cache, positions)[0][0]
            for model, cache in zip(models, caches, strict=True)
        ]
        p, q = (each.float().log_softmax(-1) for each in logits)  # (T, V)
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        losses = [
            loss + F.nll_loss(r, y, reduction="sum").item()
            for loss, r in zip(losses, (p, q), strict=True)
        ]
        n += len(x)
        print(f"{n} of {len(tokens) - 1} positions", file=sys.stderr)
    perplexity, of_float32 = (
        torch.tensor(loss / n).exp().item() for loss in (losses[1], losses[0])
    )
    return {
        "kl": kl / n,
        "same_top": same / n,
        "perplexity": perplexity,
        "perplexity_float32": of_float32,
        "positions": n,
    }
