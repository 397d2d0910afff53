"""How fast conversations become a shard, compared with tiktoken: python benchmarks/prepare.py"""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import peak_memory, run_benchmark
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import gpt2_encoding
from prepare import chitchat_package as chitchat
from prepare import corpus
from prepare.formats import ConversationReader
from prepare.records import read_records


@dataclass
class Config:
    megabytes: int = 64  # of text: the same conversations, repeated
    source: str = ""  # their file, as for prepare/jsonl.py; by default chitchat's conversations
    parquet: bool = False  # read them from a Parquet file, with prepare/hub.py


def measure(config):
    """Tokenize conversations into a shard, then encode at most 64 MB of their text by tiktoken."""
    conversations = []  # (id, messages)
    texts = []
    if config.source:
        pairs = read_records(Path(config.source), ConversationReader())
    else:
        pairs = ((key, messages) for key, messages, _ in chitchat.read(chitchat.packaged()))
    for key, messages in pairs:
        conversations.append((key, messages))
        texts.append("\n".join(message["content"] for message in messages))
    size = sum(len(text.encode()) for text in texts) / len(texts) / 1e6  # MB per conversation
    n = round(config.megabytes / size)  # conversations

    repeated = itertools.islice(itertools.cycle(conversations), n)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = Path(folder) / "talk.parquet"
        if config.parquet:
            write_parquet(path, repeated)
        start = time.perf_counter()
        if config.parquet:
            script = Path(__file__).resolve().parents[1] / "prepare" / "hub.py"
            command = [sys.executable, script, f"--dataset={path}", f"--out_dir={folder}"]
            subprocess.run(command, stdout=sys.stderr, check=True)
        else:
            corpus.prepare(corpus.Config(out_dir=folder), "bench", corpus.divide(repeated))
        seconds = time.perf_counter() - start
        tokens = sum(len(open_shard(path).tokens) for path in Path(folder).glob("*.bin"))
    # MB, before tiktoken adds to it; hub.py has a process of its own
    peak = None if config.parquet else peak_memory("cpu")

    # tiktoken alone, with all cores, on 64 MB at most
    texts = list(itertools.islice(itertools.cycle(texts), min(n, round(64 / size))))
    start = time.perf_counter()
    gpt2_encoding().encode_ordinary_batch(texts, num_threads=os.cpu_count())
    tiktoken_seconds = time.perf_counter() - start
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,  # from conversations to shards
        "megabytes_per_s": n * size / seconds,  # of text
        "tiktoken_megabytes_per_s": len(texts) * size / tiktoken_seconds,
        "peak_memory_mb": peak,
    }


def write_parquet(path, conversations):
    """Write (key, messages) pairs in row groups of 20,000 rows."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.Table.from_pylist([{"messages": [{"role": "", "content": ""}]}]).schema
    with ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(conversations, 20_000)):
            rows = [{"messages": messages} for _, messages in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


if __name__ == "__main__":
    run_benchmark(measure, Config)
