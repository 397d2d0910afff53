"""nanoGPT's ckpt.pt (karpathy/nanoGPT, train.py), read as it is."""

import re
import zipfile
from reprlib import repr as short_repr

import torch

from model import GPTConfig
from nanochatgpt.files import load_tensors
from nanochatgpt.huggingface import read_sizes
from nanochatgpt.tokenizer import END_OF_TEXT
from nanochatgpt.weights import in_memory

# nanoGPT's model_args; its forks have others, for other arithmetic
NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"}
LARGEST_PADDED = 51_200  # GPT-2's vocabulary, padded to a multiple of 1,024


def open_nanogpt(path):
    """Return ({name: StoredTensor}, GPTConfig) of nanoGPT's ckpt.pt. Its linear weights are [out,
    in] and its GELU is the exact one; with bias=False all biases are zero. Raises ValueError for
    any other file, or a vocabulary that is not GPT-2's."""
    # mapped, so that the optimizer's moments are never read
    checkpoint = load_tensors(path, mmap=zipfile.is_zipfile(path))
    is_nanogpt = isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()
    if not is_nanogpt or not all(isinstance(checkpoint[n], dict) for n in ("model", "model_args")):
        raise ValueError(f"{path} is not a checkpoint of nanoGPT: pass the directory of a model")

    # 1. the config
    args = checkpoint["model_args"]
    for name in args.keys() - NANOGPT_ARGS:
        raise ValueError(f"{path} is not nanoGPT's own: {short_repr(name)} in its model_args")
    config = GPTConfig(activation="gelu", **read_sizes(path, args, "block_size"))
    if not END_OF_TEXT < config.vocab_size <= LARGEST_PADDED:
        problem = f"vocab_size={config.vocab_size} is not GPT-2's vocabulary of 50,257 tokens"
        raise ValueError(f"{path}: {problem}, which is the only one that this project has")

    # 2. the weights
    stored = {}
    for name, tensor in checkpoint["model"].items():
        name = str(name)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path} is damaged: {short_repr(name)} is not a tensor")
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        stored[name] = in_memory(path, tensor, transposed=linear)
        has_bias = linear or "ln_" in name
        if has_bias and args.get("bias") is False and tensor.dim():
            zeros = torch.zeros(len(tensor), dtype=tensor.dtype)
            stored.setdefault(re.sub("weight$", "bias", name), in_memory(path, zeros))
    return stored, config
