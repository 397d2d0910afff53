"""
How fast it learns: tokens and supervised tokens a second, beside nanoGPT's and transformers' loop.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import GPT, PRESETS, GPTConfig
from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import (
    keep_freed_memory,
    move,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
)
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer


@dataclass
class Config:
    loop: str = (
        "packed"  # packed (ours), nanogpt, or padded (transformers', to the longest in a batch)
    )
    init_from: str = "random:gpt2"  # random:gpt2, random:gpt2-medium, ...: of that shape
    data_dir: str = "data"  # where the shards are
    dataset: str = ""  # its train*.bin; without it random tokens, all of them supervised
    batch_size: int = 4  # rows of a step; for padded, conversations
    block_size: int = 256  # tokens in a row; for padded, at most
    dropout: float = 0.1  # share of activations dropped
    steps: int = 5  # measured, after two that are not; the median is given
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "bfloat16"  # of autocast: float32, bfloat16
    compile: bool = False  # torch.compile the model
    gradient_checkpointing: bool = (
        False  # compute activations again in the backward pass; not for padded
    )


def measure(config):
    """Return tokens and supervised tokens a second of whole steps: batch, forward, backward, clipping, AdamW."""
    at_least(1, config, "batch_size", "block_size", "steps")
    if config.loop not in ("packed", "nanogpt", "padded"):
        raise ValueError(f"loop={config.loop} is not one of packed, nanogpt, padded")
    shape = config.init_from.removeprefix("random:")
    if shape not in PRESETS or shape == config.init_from:
        names = ", ".join(f"random:{name}" for name in PRESETS)
        raise ValueError(
            f"init_from={config.init_from} is not one of {names}; speed does not depend on the weights"
        )
    if config.loop == "padded" and config.gradient_checkpointing:
        raise ValueError("gradient_checkpointing is not for loop=padded: leave it out")
    start = time.perf_counter()
    B, T, device = config.batch_size, config.block_size, pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if config.loop == "packed":
        keep_freed_memory()
    if config.loop == "padded":
        from transformers import GPT2Config, GPT2LMHeadModel

        drop = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        model = GPT2LMHeadModel(GPT2Config(**PRESETS[shape], **drop)).to(device).train()
    else:
        model = load_model(config.init_from, device, dropout=config.dropout)[0].train()
        model.gradient_checkpointing = config.gradient_checkpointing
    with torch.device("meta"):
        flops_per_token = GPT(GPTConfig(**PRESETS[shape])).flops_per_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run_model = model
    if config.compile:
        run_model = torch.compile(model) if config.loop == "padded" else model.compiled()

    if config.dataset:
        shards = find_shards(config.data_dir, config.dataset, "train", shares=True)
        loader = Loader(shards, B, T, 0, Tokenizer())
    fill, span = (loader.fill, loader.span) if config.dataset else (1.0, T)
    random_ids = torch.randint(0, 50257, (B, T + 1), generator=torch.Generator().manual_seed(0))

    def batch(number):
        return (
            loader.batch(number)
            if config.dataset
            else (random_ids[:, :-1], random_ids[:, 1:], None)
        )

    def packed(number):
        """Return the loss of a batch, how many of its positions hold tokens, and its targets."""
        x, y, documents = batch(number)
        documents = None if documents is None else move(documents, device)
        return run_model(move(x, device), y, documents=documents)[1], fill * y.numel(), y

    def nanogpt(number):
        """Alike; logits of all positions, attention to all that came before in the row."""
        x, y, _ = batch(number)
        logits = run_model(move(x, device))[0]
        return F.cross_entropy(logits.flatten(0, 1), move(y, device).flatten()), fill * y.numel(), y

    def padded(number):
        """Alike; as transformers' own examples do it."""
        ids = random_ids[:, :-1]
        x, y, seen = (
            padded_batch(loader, number) if config.dataset else (ids, ids, torch.ones_like(ids))
        )
        loss = run_model(
            move(x, device), attention_mask=move(seen, device), labels=move(y, device)
        ).loss
        return loss, seen.sum().item(), y

    loss_of = {"packed": packed, "nanogpt": nanogpt, "padded": padded}[config.loop]
    seconds, counts, first_step = [], [], None
    for step in range(config.steps + 2):
        t0 = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss, tokens, targets = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # which waits for the device
        t1 = time.perf_counter()
        first_step = first_step or t1 - start
        print(f"{step}: {t1 - t0:.3f} s, loss {loss.item():.3f}", file=sys.stderr)
        if step > 1:
            seconds.append(t1 - t0)
            counts.append((tokens, (targets != -100).sum().item(), targets.numel()))

    def rate(i):
        return statistics.median(count[i] / s for count, s in zip(counts, seconds, strict=True))

    peak = peak_flops(device) if dtype != torch.float32 else None
    return {
        "tokens_per_s": rate(0),
        "supervised_tokens_per_s": rate(1),
        "seconds": statistics.median(seconds),
        "fill": sum(count[0] for count in counts) / sum(count[2] for count in counts),
        "mfu": rate(0) * flops_per_token(span, rate(1) / rate(0)) / peak if peak else None,
        "first_step_s": first_step,  # since the imports, with loading and compiling
        "peak_memory_mb": peak_memory(device),
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else device,
    }


def padded_batch(loader, number):
    """Return ids, labels, attention mask of the next conversations of a loader's first shard, in the order of a
    shuffle, cut at the block and padded to the longest of them."""
    shard, B = loader.parts[0].shard, loader.batch_size
    order = np.random.default_rng(0).permutation(len(shard.offsets) - 1)
    rows, labels = [], []
    for i in np.take(order, range(number * B, (number + 1) * B), mode="wrap"):
        start, stop = (
            shard.offsets[i],
            min(shard.offsets[i + 1], shard.offsets[i] + loader.block_size),
        )
        rows.append(torch.from_numpy(shard.tokens[start:stop].astype(np.int64)))
        labels.append(rows[-1].where(torch.from_numpy(shard.mask(start, stop)), -100))
    seen = [torch.ones_like(row) for row in rows]
    padding = ((rows, loader.tokenizer.pad_id), (labels, -100), (seen, 0))
    return [pad_sequence(part, batch_first=True, padding_value=value) for part, value in padding]
