"""How fast conversations become a shard, compared with tiktoken: python benchmarks/prepare.py"""

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import peak_memory, run_benchmark
from nanochatgpt.configurator import at_least
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import gpt2_encoding
from prepare import chitchat_package as chitchat
from prepare import corpus


@dataclass
class Config:
    megabytes: int = 64  # of text: chitchat's conversations, over and over


def measure(config):
    """Tokenize conversations into a shard, then encode at most 64 MB of their text by tiktoken."""
    at_least(1, config, "megabytes")
    # how many conversations make the megabytes asked for
    conversations = [messages for _, messages, _ in chitchat.read(chitchat.packaged())]
    size = 0
    for messages in conversations:
        size += sum(len(message["content"].encode()) for message in messages)
    size /= 1e6 * len(conversations)  # MB per conversation
    n = max(2, round(config.megabytes / size))
    memory = peak_memory("cpu")  # MB, before the work

    # to a shard: the first conversation to val, the others to train
    def divided():
        for i in range(n):
            yield ("train" if i else "val"), conversations[i % len(conversations)]

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        corpus.prepare(corpus.Config(out_dir=folder), "bench", divided())
        seconds = time.perf_counter() - start
        tokens = sum(len(open_shard(path).tokens) for path in Path(folder).glob("*.bin"))
    peak = peak_memory("cpu")  # MB, before tiktoken adds to it

    # tiktoken alone, with all cores
    texts = []
    for i in range(min(n, round(64 / size))):  # 64 MB at most
        messages = conversations[i % len(conversations)]
        texts.append("\n".join(message["content"] for message in messages))
    start = time.perf_counter()
    gpt2_encoding().encode_ordinary_batch(texts, num_threads=os.cpu_count())
    tiktoken_seconds = time.perf_counter() - start
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,  # from conversations to the shard
        "megabytes": n * size,  # of text
        "megabytes_per_s": n * size / seconds,
        "tiktoken_megabytes_per_s": len(texts) * size / tiktoken_seconds,
        "peak_memory_mb": peak,
        "peak_memory_before_mb": memory,  # with chitchat in memory
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
