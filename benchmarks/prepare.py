"""
How fast conversations become a shard, beside tiktoken alone, and in how much memory.
"""

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochatgpt.configurator import at_least
from nanochatgpt.device import peak_memory
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import gpt2_encoding
from prepare import chitchat, corpus


@dataclass
class Config:
    megabytes: int = 64  # of text: chitchat's conversations, again and again


def measure(config):
    """Return how fast conversations become a shard, how fast tiktoken alone encodes the same text, and peak memory.

    The conversations are chitchat's, again and again; of tiktoken the first 64 MB are measured, and of ours all.
    """
    at_least(1, config, "megabytes")
    talk = [messages for _, messages in chitchat.read(chitchat.packaged())]
    size = (
        sum(len(message["content"].encode()) for messages in talk for message in messages)
        / len(talk)
        / 1e6
    )
    total = max(2, round(config.megabytes / size))
    before = peak_memory("cpu")
    conversations = (("train" if i else "val", talk[i % len(talk)]) for i in range(total))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        corpus.prepare(corpus.Config(out_dir=folder), "bench", conversations)
        seconds = time.perf_counter() - start
        tokens = sum(len(open_shard(path).tokens) for path in Path(folder).glob("*.bin"))
    peak = peak_memory("cpu")
    texts = [
        "\n".join(m["content"] for m in talk[i % len(talk)])
        for i in range(min(total, round(64 / size)))
    ]
    start = time.perf_counter()
    gpt2_encoding().encode_ordinary_batch(texts, num_threads=os.cpu_count())
    alone = len(texts) * size / (time.perf_counter() - start)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "megabytes": total * size,
        "megabytes_per_s": total * size / seconds,
        "tiktoken_megabytes_per_s": alone,
        "peak_memory_mb": peak,
        "peak_memory_before_mb": before,  # with chitchat in memory
    }
