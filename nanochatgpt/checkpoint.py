"""
Weights in and out. A checkpoint is a Hugging Face GPT-2 directory; `init_from` says which one:

    nano                    the small chat model in assets/nano/
    a directory             config.json and model.safetensors or pytorch_model.bin
    gpt2, gpt2-medium, ...  one of HUB, from the Hugging Face hub
    org/name                any GPT-2 on the hub
"""

import contextlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import GPT, PRESETS, Conv1D, GPTConfig
from nanochatgpt import huggingface
from nanochatgpt.device import FBGEMM
from nanochatgpt.files import hub_file, replacing
from nanochatgpt.tokenizer import Tokenizer

# short name -> sha256 of its model.safetensors
HUB = {
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    "gpt2-large": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    "distilgpt2": "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
}
NANO = Path(__file__).parents[1] / "assets" / "nano"  # its README.md says how it was trained


@torch.no_grad()
def load_model(
    init_from, device="cpu", dtype=torch.float32, dropout=0.0, inference=False, model_class=GPT
):
    """Return (model, Tokenizer) of `init_from` (see above), with weights in `dtype` on `device`.

    inference: on an x86 CPU, pack 16- and 8-bit weights into the layers of quantize.py, which can
    be neither trained nor saved. model_class: GPT or RewardModel. Raises FileNotFoundError or
    ConnectionError if there is no such model, ValueError if it is damaged or not a GPT-2.
    """
    path, config, tokenizer = find(init_from)
    # each token needs an embedding
    if config.vocab_size < tokenizer.n_vocab:
        sizes = f"{config.vocab_size} embeddings but its tokenizer has {tokenizer.n_vocab} tokens"
        raise ValueError(f"{init_from}: the model has {sizes}")

    # build the model without memory for the weights
    config.dropout = dropout
    with torch.device("meta"):
        model = model_class(config)

    # load one tensor at a time: a second copy of the model may not fit into memory
    read = huggingface.open_weights(path, model)
    if inference and FBGEMM and torch.device(device).type == "cpu" and dtype != torch.float32:
        from nanochatgpt.quantize import pack

        return pack(model, read, dtype), tokenizer
    tensors = {}
    for name in model.state_dict().keys() - {"lm_head.weight"}:
        # copy: mapped tensors may be misaligned, which changes the last bits of sums
        tensors[name] = read(name).to(device, dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)  # all but lm_head, which is tied
    model.tie_weights()
    return model, tokenizer


def save_model(model, tokenizer, directory):
    """Write a Hugging Face GPT-2 directory. If that fails, the old files stay. Raises ValueError
    for a model that was loaded for inference."""
    if not isinstance(model.transformer.h[0].mlp.c_fc, Conv1D):
        raise ValueError("a model loaded for inference is packed and cannot be saved")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    # the contents of the files
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            tensors[name] = tensor.detach().cpu().contiguous()
    texts = huggingface.config_files(model, tokenizer)
    texts |= huggingface.tokenizer_files(tokenizer.template)

    # write all files before the first replaces an old one
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            path = stack.enter_context(replacing(directory / name))
            path.write_text(text, encoding="utf-8")
        weights = stack.enter_context(replacing(directory / "model.safetensors"))
        save_file(tensors, weights, metadata={"format": "pt"})
        shutil.copymode(path, weights)  # safetensors makes files that only their owner can read


def default_model():
    """Return the chat model that train.py wrote, else nano."""
    return "out/chat" if Path("out/chat/model.safetensors").exists() else "nano"


def find(init_from):
    """Return (path of the weights, GPTConfig, Tokenizer)."""
    # a directory on this machine
    directory = NANO if init_from == "nano" else Path(init_from)
    if directory.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (directory / name).is_file():
                config = huggingface.read_config(directory / "config.json")
                return directory / name, config, huggingface.read_tokenizer(directory)
        raise FileNotFoundError(f"{directory} has neither model.safetensors nor pytorch_model.bin")

    # a short name
    if init_from in HUB:
        owner = "distilbert" if init_from == "distilgpt2" else "openai-community"
        path = hub_file(f"{owner}/{init_from}", "model.safetensors", sha256=HUB[init_from])
        return path, GPTConfig(**PRESETS[init_from]), Tokenizer()

    # org/name, but not out/NAME, where train.py writes
    if init_from.count("/") == 1 and not directory.parent.is_dir() and directory.parts[0] != "out":
        return _find_on_hub(init_from)
    names = f"one of nano, {', '.join(HUB)}, or an org/name on the hub"
    raise FileNotFoundError(f"init_from={init_from}: train this directory first, or take {names}")


def _find_on_hub(repo):
    def fetch(name):  # None if the repository lacks the file
        with contextlib.suppress(FileNotFoundError):
            return hub_file(repo, name)

    # download before reading
    config = hub_file(repo, "config.json")
    fetch("tokenizer_config.json")  # has the chat template
    # older repositories have two files in place of tokenizer.json
    tokenizer = fetch("tokenizer.json") or fetch("vocab.json") or config
    if tokenizer.name == "vocab.json":
        fetch("added_tokens.json")
    weights = fetch("model.safetensors") or hub_file(repo, "pytorch_model.bin")
    tokenizer = huggingface.read_tokenizer(tokenizer.parent)
    return weights, huggingface.read_config(config), tokenizer
