"""How fast a model learns: python benchmarks/train.py [--padded=true]

By default as in train.py: rows packed with conversations, the loss of the supervised positions.
padded: transformers' model, a conversation per row, padded to the longest of the batch.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import ModelConfig, peak_memory, resolve, run_benchmark
from nanochatgpt.checkpoint import load_model
from nanochatgpt.device import keep_freed_memory, move, peak_flops, pick_device, precision
from nanochatgpt.fast import compiled, speed_up
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer


@dataclass
class Config(ModelConfig):
    padded: bool = False  # measure the padded transformers loop instead of train.py's
    data_dir: str = "data"  # where the datasets are
    dataset: str = ""  # train on its train*.bin; default: random tokens, all supervised
    batch_size: int = 4  # rows in a step; padded: conversations
    block_size: int = 256  # tokens in a row; padded: at most
    dropout: float = 0.1  # share of activations dropped
    attention_dropout: float = 0.0  # the same of attention weights; transformers' default is 0.1
    steps: int = 5  # measured steps, after two for warm-up; the result is their median
    dtype: str = "bfloat16"  # autocast to float32 or bfloat16
    compile: bool = False  # torch.compile the model


def measure(config):
    """Run whole steps: batch, forward, backward, clipping, AdamW; return the median rates."""
    device = pick_device(config.device)
    dtype, autocast, _ = precision(config.dtype, device)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # as in train.py

    # the data: a dataset, or the same random tokens in each step
    T = config.block_size
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (config.batch_size, T + 1))
    loader = None
    if config.dataset:
        shards = find_shards(config.data_dir, config.dataset, "train", shares=True)
        loader = Loader(shards, config.batch_size, T, 0, Tokenizer())

    directory = resolve(config.init_from)
    gpt, _ = load_model(directory, "meta")  # to count FLOPs
    if config.padded:
        from transformers import GPT2LMHeadModel

        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout)
        dropout["attn_pdrop"] = config.attention_dropout
        model = GPT2LMHeadModel.from_pretrained(directory, **dropout).to(device)
        compile_model = torch.compile
    else:
        keep_freed_memory()  # as train.py does on a CPU
        dropout = {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
        model, _ = load_model(directory, device, **dropout)
        speed_up(model)
        compile_model = compiled
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run_model = compile_model(model) if config.compile else model

    steps = []  # (seconds, tokens, supervised tokens, positions) of each
    for step in range(config.steps + 2):
        start = time.perf_counter()
        # a batch; extra: the documents, or for padded the attention mask
        x = ids[:, :-1]  # (B, T)
        y = ids[:, 1:]
        extra = None
        fill = 1.0  # share of positions that hold tokens
        if loader and config.padded:
            x, y, extra = padded_batch(loader, step)
            fill = extra.float().mean().item()
        elif loader:
            x, y, extra = loader.batch(step)
            fill = loader.fill
        x = move(x, device)
        extra = move(extra, device) if loader else None

        # forward, backward, update
        with autocast:
            if config.padded:
                loss = run_model(x, attention_mask=extra, labels=move(y, device)).loss
            else:
                _, loss = run_model(x, y, extra)  # y stays on the CPU, see fast_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        n_supervised = (y != -100).sum().item()
        steps.append([seconds, fill * y.numel(), n_supervised, y.numel()])
        print(f"{step}: {seconds:.3f} s, loss {loss:.3f}", file=sys.stderr)

    # the first two steps were the warm-up
    seconds, n_tokens, n_supervised, n_positions = np.array(steps[2:]).T  # (steps,) each
    tokens_per_s = np.median(n_tokens / seconds)
    span = loader.span if loader else T  # mean length of the texts
    flops_per_token = gpt.flops_per_token(span, n_supervised.sum() / n_tokens.sum())
    peak = peak_flops(device)
    peak_mb = peak_memory(device)
    C = gpt.config.n_embd
    products = product_flops(config.batch_size * T, C, dtype, device)
    return {
        "tokens_per_s": tokens_per_s,
        "supervised_tokens_per_s": np.median(n_supervised / seconds),
        "seconds": np.median(seconds),  # per step
        "fill": n_tokens.sum() / n_positions.sum(),  # share of positions that hold tokens
        "of_products": tokens_per_s * flops_per_token / products,  # of what products alone allow
        "mfu": tokens_per_s * flops_per_token / peak if peak else None,  # of the peak in 16 bits
        "peak_memory_mb": peak_mb,
    }


def product_flops(rows, C, dtype, device):
    """Return the FLOP/s of one matrix product of a step, that of the MLP's first layer: the median
    of five times ten."""
    a = torch.randn(rows, C, device=device, dtype=dtype)
    b = torch.randn(C, 4 * C, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(10):
            y = a @ b
        y[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 10 * 2 * rows * C * 4 * C / np.median(seconds[1:])


def padded_batch(loader, step):
    """Return (ids, labels, attention mask), (B, T) each: random conversations of a loader's first
    shard, cut to block_size and padded to the longest of them."""
    shard = loader.parts[0].shard
    draw = np.random.default_rng(step)
    rows = []  # (n, 2) each: ids and labels
    for i in draw.integers(len(shard.offsets) - 1, size=loader.batch_size):
        start, stop = shard.offsets[i : i + 2].tolist()
        stop = min(stop, start + loader.block_size)
        ids = torch.from_numpy(shard.tokens[start:stop].astype(np.int64))  # (n,)
        supervised = torch.from_numpy(shard.mask(start, stop))  # (n,) bool
        rows.append(torch.stack([ids, ids.where(supervised, -100)], dim=1))
    x, y = pad_sequence(rows, batch_first=True, padding_value=-100).unbind(2)
    return x.clamp(min=0), y, (x != -100).long()  # the mask hides the padding


if __name__ == "__main__":
    run_benchmark(measure, Config)
