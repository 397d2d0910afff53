"""What benchmarks share: the JSON line they end with, random weights, memory."""

import functools
import json
import platform
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from model import GPT, PRESETS, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer


def run_benchmark(measure, Config):
    """Run a script: print the figures of measure(config), a dict, as one line of JSON."""

    @functools.wraps(measure)  # so that --help shows the docstring of its module
    def main(config):
        result = {"bench": Path(sys.argv[0]).stem}
        for name, value in measure(config).items():
            result[name] = float(f"{value:.5g}") if isinstance(value, float) else value
        result["config"] = asdict(config)
        result["config"].pop("given", None)  # not a knob
        result["torch"] = torch.__version__
        result["cpu"] = platform.processor() or platform.machine()
        result["threads"] = torch.get_num_threads()
        print(json.dumps(result))

    run(main, Config)


def resolve(init_from, model_class=GPT):
    """Return init_from, or for random:NAME the directory of a model with the shape of that preset
    and random weights, written at its first use: speed does not depend on the weights."""
    name = init_from.removeprefix("random:")
    if name == init_from or name not in PRESETS:
        return init_from
    directory = Path("out/random") / (name if model_class is GPT else f"{name}-reward")
    if not directory.exists():
        # in another process, because this one reports its peak memory
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(save_random, name, model_class, directory).result()
    return str(directory)


def save_random(name, model_class, directory):
    """Write a checkpoint with random weights; the directory appears when it is complete."""
    torch.manual_seed(0)
    model = model_class(GPTConfig(**PRESETS[name]))
    unfinished = directory.with_name(f"{directory.name}.part")
    save_model(model, Tokenizer(), unfinished)
    unfinished.rename(directory)


def peak_memory(device):
    """Return the most memory used so far in MB: by tensors on CUDA, otherwise by the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return process_memory("VmHWM")


def process_memory(field, pid="self"):
    """Return a process's VmRSS (resident now) or VmHWM (its peak) in MB, None without /proc."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    kilobytes = re.search(rf"{field}:\s*(\d+) kB", status.read_text())[1]
    return int(kilobytes) * 1024 / 1e6


def device_name(device):
    """Return the name of a GPU, for other devices the device."""
    is_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_gpu else device
