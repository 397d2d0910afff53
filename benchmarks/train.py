"""How fast a model learns, in one of three loops: python benchmarks/train.py [--loop=padded]

packed   train.py's: rows packed with conversations, the loss of the supervised positions
nanogpt  nanoGPT's: the same rows, the logits of all positions, no borders in attention
padded   transformers' model: a conversation per row, padded to the longest of the batch
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import device_name, peak_memory, resolve, run_benchmark
from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import keep_freed_memory, move, peak_flops, pick_device, pick_dtype
from nanochatgpt.fast import compiled, speed_up
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer


@dataclass
class Config:
    loop: str = "packed"  # packed, nanogpt or padded
    init_from: str = "random:gpt2"  # random:gpt2, random:gpt2-medium, ..., or a directory
    data_dir: str = "data"  # where the datasets are
    dataset: str = ""  # train on its train*.bin; default: random tokens, all supervised
    batch_size: int = 4  # rows in a step; padded: conversations
    block_size: int = 256  # tokens in a row; padded: at most
    dropout: float = 0.1  # share of activations dropped
    steps: int = 5  # measured steps, after two for warm-up; the result is their median
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "bfloat16"  # autocast to float32 or bfloat16
    compile: bool = False  # torch.compile the model
    gradient_checkpointing: bool = False  # recompute activations in backward; not in padded


def measure(config):
    """Run whole steps: batch, forward, backward, clipping, AdamW; return the median rates."""
    at_least(1, config, "batch_size", "block_size", "steps")
    if config.loop not in ("packed", "nanogpt", "padded"):
        raise ValueError(f"loop={config.loop} is not one of packed, nanogpt, padded")
    directory = resolve(config.init_from)
    start = time.perf_counter()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    # precision of float32 products, as in train.py
    torch.backends.cuda.matmul.fp32_precision = "tf32"

    # the model
    if config.loop == "padded":
        from transformers import GPT2LMHeadModel

        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        model = GPT2LMHeadModel.from_pretrained(directory, **dropout).to(device)
        gpt, _ = load_model(directory, "meta")  # to count FLOPs
        run_model = torch.compile(model) if config.compile else model
    else:
        model, _ = load_model(directory, device, dropout=config.dropout)
        model.gradient_checkpointing = config.gradient_checkpointing
        gpt = model
        if config.loop == "packed":
            keep_freed_memory()  # as train.py does on a CPU
            speed_up(model)
        run_model = compiled(model) if config.compile else model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    # the steps
    batch, fill, span = open_data(config)
    seconds = []
    counts = []  # tokens, supervised tokens, positions of each step
    for step in range(config.steps + 2):
        t0 = time.perf_counter()
        x, y, extra = batch(step)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss = compute_loss(config.loop, run_model, x, y, extra, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()  # waits for the device
        t1 = time.perf_counter()
        print(f"{step}: {t1 - t0:.3f} s, loss {loss:.3f}", file=sys.stderr)
        if step == 0:
            first_step = t1 - start
        if step > 1:
            seconds.append(t1 - t0)
            n_tokens = extra.sum().item() if config.loop == "padded" else fill * y.numel()
            counts.append([n_tokens, (y != -100).sum().item(), y.numel()])

    counts = np.array(counts)  # (steps, 3)
    tokens_per_s, supervised_per_s, _ = np.median(counts / np.array(seconds)[:, None], axis=0)
    n_tokens, _, n_positions = counts.sum(0)
    flops_per_token = gpt.flops_per_token(span, supervised_per_s / tokens_per_s)
    peak = peak_flops(device) if dtype != torch.float32 else None
    return {
        "tokens_per_s": tokens_per_s,
        "supervised_tokens_per_s": supervised_per_s,
        "seconds": float(np.median(seconds)),  # per step
        "fill": n_tokens / n_positions,  # share of positions that hold tokens
        "mfu": tokens_per_s * flops_per_token / peak if peak else None,  # model FLOPs utilization
        "first_step_s": first_step,  # with loading and compiling
        "peak_memory_mb": peak_memory(device),
        "device": device_name(device),
    }


def compute_loss(loop, model, x, y, extra, device):
    """Return the loss of a batch of open_data."""
    x = move(x, device)  # (B, T)
    extra = None if extra is None else move(extra, device)
    if loop == "packed":
        return model(x, y, extra)[1]  # takes y from the CPU, to find what is supervised
    y = move(y, device)
    if loop == "nanogpt":
        logits, _ = model(x)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return model(x, attention_mask=extra, labels=y).loss


def open_data(config):
    """Return (batch, fill, span). batch(number) returns (x, y, extra); extra: documents, or for
    padded the attention mask. fill, span: as in Loader."""
    B = config.batch_size
    T = config.block_size
    if config.dataset:
        shards = find_shards(config.data_dir, config.dataset, "train", shares=True)
        loader = Loader(shards, B, T, 0, Tokenizer())
        batch = partial(padded_batch, loader) if config.loop == "padded" else loader.batch
        return batch, loader.fill, loader.span

    # without a dataset: the same random tokens in each batch
    ids = torch.randint(0, 50257, (B, T + 1), generator=torch.Generator().manual_seed(0))
    x = ids[:, :-1]
    if config.loop == "padded":  # transformers shifts the labels
        return lambda number: (x, x, torch.ones_like(x)), 1.0, T
    return lambda number: (x, ids[:, 1:], None), 1.0, T


def padded_batch(loader, number):
    """Return (ids, labels, attention mask), (B, T) each: shuffled conversations of a loader's first
    shard, cut to block_size and padded to the longest of them."""
    shard = loader.parts[0].shard
    # the conversations of this batch, in a fixed random order
    order = np.random.default_rng(0).permutation(len(shard.offsets) - 1)
    B = loader.batch_size
    x = torch.full((B, loader.block_size), loader.tokenizer.pad_id)
    y = torch.full_like(x, -100)
    mask = torch.zeros_like(x)
    for b, i in enumerate(np.take(order, range(number * B, (number + 1) * B), mode="wrap")):
        start = shard.offsets[i]
        n = min(shard.offsets[i + 1] - start, loader.block_size)
        x[b, :n] = torch.from_numpy(shard.tokens[start : start + n].astype(np.int64))
        supervised = torch.from_numpy(shard.mask(start, start + n))  # (n,) bool
        y[b, :n] = x[b, :n].where(supervised, -100)
        mask[b, :n] = 1
    longest = mask.sum(1).max()  # tokens
    return x[:, :longest], y[:, :longest], mask[:, :longest]


if __name__ == "__main__":
    run_benchmark(measure, Config)
