"""What benchmarks share: the JSON line they end with, random weights, memory, busy processes."""

import contextlib
import functools
import json
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import torch

from model import GPT, PRESETS, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.tokenizer import Tokenizer

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@dataclass
class ModelConfig:
    init_from: str = "random:gpt2"  # as for chat.py, or random:NAME: that shape, random weights
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    busy: int = 0  # run this many busy processes beside the measurement


def run_benchmark(measure, Config):
    """Run a script: print the figures of measure(config), a dict, as one line of JSON."""

    @functools.wraps(measure)  # so that --help shows the docstring of its module
    def main(config):
        result = {"bench": Path(sys.argv[0]).stem}
        with busy_processes(getattr(config, "busy", 0)):
            figures = measure(config)
        # the figures, with five digits
        for name, value in figures.items():
            result[name] = float(f"{value:.5g}") if isinstance(value, float) else value
        # what they depend on
        result["config"] = asdict(config)
        result["torch"] = torch.__version__
        result["threads"] = torch.get_num_threads()
        result["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        print(json.dumps(result, default=list))  # list: config.given is a set

    run(main, Config)


@contextlib.contextmanager
def busy_processes(n):
    """Let n other processes keep a core busy each, until the end of the block or of this one."""
    with contextlib.ExitStack() as stack:
        for _ in range(n):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        yield


def load(config):
    """Return (model, Tokenizer, device, dtype) for inference, as the knobs of ModelConfig say."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(resolve(config.init_from), device, dtype, inference=True)
    return model, tokenizer, device, dtype


def resolve(init_from, model_class=GPT):
    """Return init_from, or for random:NAME the directory of a model with the shape of that preset
    and random weights, written at its first use: speed does not depend on the weights."""
    name = init_from.removeprefix("random:")
    if name == init_from or name not in PRESETS:  # load_model reports a wrong name
        return init_from
    directory = Path("out/random") / f"{name}-{model_class.__name__}"
    if not (directory / "config.json").exists():  # save_model's last file
        # in another process, because this one reports its peak memory
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(save_random, name, model_class, directory).result()
    return str(directory)


def save_random(name, model_class, directory):
    """Write a checkpoint with random weights, the same on every machine."""
    torch.manual_seed(0)
    save_model(model_class(GPTConfig(**PRESETS[name])), Tokenizer(), directory)


def peak_memory(device):
    """Return the peak memory in MB: of tensors on CUDA, else of the process; None without /proc."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    kilobytes = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]  # "VmHWM:   123456 kB"
    return int(kilobytes) * 1024 / 1e6
