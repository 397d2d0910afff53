"""
Weights in and out. A checkpoint is a Hugging Face GPT-2 directory; `init_from` says which one:

    gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2    OpenAI's and Hugging Face's, from the hub
    org/name                                              any model on the hub that is a GPT-2
    nano                                                  the small chat model in assets/nano/
    a directory                                           config.json and model.safetensors or
                                                          pytorch_model.bin
"""

import contextlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import GPT, PRESETS, Conv1D, GPTConfig
from nanochatgpt.device import FBGEMM
from nanochatgpt.files import hub_file, replacing
from nanochatgpt.huggingface import (
    config_files,
    open_weights,
    read_config,
    read_tokenizer,
    tokenizer_files,
)
from nanochatgpt.tokenizer import Tokenizer

# short name -> repository, sha256 of its model.safetensors
HUB = {
    "gpt2": (
        "openai-community/gpt2",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": (
        "openai-community/gpt2-medium",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large": (
        "openai-community/gpt2-large",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl": (
        "openai-community/gpt2-xl",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
    "distilgpt2": (
        "distilbert/distilgpt2",
        "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
    ),
}
NANO = Path(__file__).parents[1] / "assets" / "nano"  # the model in the box; see its README.md


@torch.no_grad()
def load_model(
    init_from, device="cpu", dtype=torch.float32, dropout=0.0, inference=False, model_class=GPT
):
    """Return (model, Tokenizer) of `init_from` (see above), with weights in `dtype` on `device`.

    inference: on an x86 CPU, pack bfloat16, float16 and int8 weights into the layers of quantize.py,
    which are the fastest for one row and can be neither trained nor saved. model_class: GPT, or
    RewardModel for a model that scores. Raises FileNotFoundError or ConnectionError if there is no
    such model, ValueError if it is damaged or its arithmetic is not GPT-2's.
    """
    # find
    path, config, tokenizer = find(init_from)
    read = open_weights(path, config, model_class)

    # build, without memory for the weights
    config.dropout = dropout
    with torch.device("meta"):
        model = model_class(config)

    # fill, one tensor at a time, so that there is never a second copy of all of them
    if inference and FBGEMM and torch.device(device).type == "cpu" and dtype != torch.float32:
        from nanochatgpt.quantize import pack

        return pack(model, read, dtype), tokenizer
    tensors = {}
    for name in model.state_dict().keys() - {"lm_head.weight"}:
        # a copy: a mapped file need not be 64-byte aligned, and then the last bits may differ
        tensors[name] = read(name).to(device, dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model, tokenizer


def save_model(model, tokenizer, directory):
    """Write `model` and `tokenizer` as a Hugging Face GPT-2 directory; if that fails, the old files
    stay whole.

    Raises ValueError for a model that was packed for inference.
    """
    if not isinstance(model.transformer.h[0].mlp.c_fc, Conv1D):
        raise ValueError("a model loaded for inference is packed and cannot be saved")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    texts = tokenizer_files(tokenizer.template) | config_files(model, tokenizer)
    with contextlib.ExitStack() as stack:  # write all files before the first takes its place
        for name, text in texts.items():
            path = stack.enter_context(replacing(directory / name))
            path.write_text(text, encoding="utf-8")
        weights = stack.enter_context(replacing(directory / "model.safetensors"))
        save_file(tensors, weights, metadata={"format": "pt"})
        shutil.copymode(path, weights)  # safetensors makes files that only their owner can read


def default_model():
    """Return the model that scripts use by default: the chat model trained here, else nano."""
    return "out/chat" if Path("out/chat/model.safetensors").exists() else "nano"


def find(init_from):
    """Return (path of the weights, GPTConfig, Tokenizer)."""
    if init_from == "nano":
        return _find_local(NANO)
    if Path(init_from).is_dir():
        return _find_local(Path(init_from))
    if init_from in HUB:
        repo, sha256 = HUB[init_from]
        path = hub_file(repo, "model.safetensors", sha256=sha256)
        return path, GPTConfig(**PRESETS[init_from]), Tokenizer()
    # out/NAME is where train.py writes: never ask the hub for it
    local = init_from.startswith("out/") or Path(init_from).parent.is_dir()
    if init_from.count("/") == 1 and not local:
        return _find_on_hub(init_from)
    raise FileNotFoundError(
        f"init_from={init_from}: there is no such directory; train a model into it first, "
        f"or take an org/name on the hub or one of nano, {', '.join(HUB)}"
    )


def _find_local(directory):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            config = read_config(directory / "config.json")
            return directory / name, config, read_tokenizer(directory)
    raise FileNotFoundError(f"{directory} has neither model.safetensors nor pytorch_model.bin")


def _find_on_hub(repo):
    config = hub_file(repo, "config.json")
    folder = config.parent
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        with contextlib.suppress(FileNotFoundError):  # a repository has the first, or the others
            folder = hub_file(repo, name).parent
            if name == "tokenizer.json":
                break
    with contextlib.suppress(FileNotFoundError):
        hub_file(repo, "tokenizer_config.json")  # says which template it talks in
    try:
        weights = hub_file(repo, "model.safetensors")
    except FileNotFoundError:
        weights = hub_file(repo, "pytorch_model.bin")
    return weights, read_config(config), read_tokenizer(folder)
