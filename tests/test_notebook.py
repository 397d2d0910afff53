"""docs/finetune.ipynb runs from top to bottom, and its arithmetic holds."""

import functools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train
from model import GPT, GPTConfig
from nanochatgpt.configurator import parse
from nanochatgpt.fast import speed_up

PATH = ROOT / "docs/finetune.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
# in front of the notebook: a command that fails is an error of its cell
CHECK = """\
def system(command, run=get_ipython().system):
    run(command)
    assert _exit_code == 0, command
get_ipython().system = system
"""


def source(name):
    [cell] = [cell for cell in NOTEBOOK["cells"] if cell["id"] == name]
    return "".join(cell["source"])


def test_it_is_committed_without_outputs_and_opens_anywhere():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    cells = NOTEBOOK["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert not re.search(r"(?<!/)/(home|root|tmp|work|Users)\b", PATH.read_text(encoding="utf-8"))


def test_the_computed_memory_of_activations_is_what_autograd_keeps(capsys):
    """bfloat16 on a CPU has the sizes of float16 on a T4. Without dropout, which has other kernels
    on a CPU."""
    names = {}
    exec(source("memory"), names)
    B, T, C, n_layer = 2, 256, 96, 3
    names |= {"T": T, "C": C, "n_layer": n_layer}
    expected = names["activation_bytes"](B * T) - B * T * n_layer * 2 * C  # 2 C: dropout masks

    def kept_bytes(n_layer):
        model = speed_up(GPT(GPTConfig(T, 512, n_layer, 3, C)))
        del model.packed_attention  # a T4 uses the plain one, with a mask
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}  # address -> storage, kept alive so that no address is used twice

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        x = torch.randint(0, 512, (B, T))
        documents = torch.arange(0, B * T + 1, 64, dtype=torch.int32)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(x, x, documents)
        return sum(storage.nbytes() for storage in storages.values())

    layers = kept_bytes(1 + n_layer) - kept_bytes(1) - n_layer * 2 * 12 * C**2  # 16-bit weights
    assert layers == pytest.approx(expected, rel=0.02)


def test_the_arithmetic_is_about_the_config_and_fits_a_t4(capsys):
    names = {}
    exec(source("memory"), names)
    exec(source("time"), names)
    config = parse(train.Config, [str(ROOT / "config/finetune_t4.py")])
    tokens = config.batch_size * config.block_size  # in a micro-batch
    activations = names["activation_bytes"](tokens)
    assert names["memory"][f"activations of {config.batch_size} rows"] == activations
    assert names["T"] == config.block_size
    gpt2 = SimpleNamespace(config=GPTConfig())  # a GPT without weights
    gpt2.num_parameters = functools.partial(GPT.num_parameters, gpt2)
    assert names["n_params"] == gpt2.num_parameters()
    flops = GPT.flops_per_token(gpt2, config.block_size, supervised=0.5)
    assert names["flops_per_token"] == pytest.approx(flops, rel=0.01)
    assert names["tokens"] == config.max_iters * config.gradient_accumulation_steps * tokens
    assert sum(names["memory"].values()) < 10e9  # a third of 15 GB is left
    assert 20 * 60 < names["seconds"] < 35 * 60


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_in_an_empty_environment(tmp_path):
    """As on a machine without a GPU that has torch and Jupyter, and nothing of the project."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    version = torch.__version__.partition("+")[0]
    packages = [f"torch=={version}", "nbclient", "ipykernel"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)

    def torch_folder():
        [folder] = (tmp_path / "venv").glob("lib/*/site-packages/torch")
        return folder.stat().st_ino

    installed = torch_folder()
    check = {"cell_type": "code", "id": "check", "metadata": {}, "source": CHECK}
    check |= {"outputs": [], "execution_count": None}
    copy = NOTEBOOK | {"cells": [check, *NOTEBOOK["cells"]]}
    (tmp_path / "finetune.ipynb").write_text(json.dumps(copy), encoding="utf-8")
    env = os.environ | {"NANOCHATGPT_REPO": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"IPYTHONDIR": str(tmp_path / "ipython")}
    command = [python, "-m", "jupyter", "execute", "finetune.ipynb", "--output=done.ipynb"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    # what its cells printed and showed
    cells = json.loads((tmp_path / "done.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = {cell["id"]: cell["outputs"] for cell in cells if cell["cell_type"] == "code"}
    texts = {}
    for name, parts in outputs.items():
        texts[name] = "".join("".join(part.get("text", "")) for part in parts)
    assert "best validation loss" in texts["train"]
    assert len(re.findall(r"^Bot: \w", texts["chat"], re.MULTILINE)) == 3
    assert "image/svg+xml" in outputs["plot"][-1]["data"]
    assert "perplexity" in texts["compare"]
    assert torch_folder() == installed  # not installed again
    out = tmp_path / "nanochatgpt/out/notebook"
    assert (out / "model.safetensors").exists()
    losses = re.findall(r"val loss ([\d.]+)", texts["train"])
    assert float(losses[-1]) < float(losses[0]) - 0.1
