"""Tensors in files, and their names there: safetensors, pickles, shards.

Each name becomes model.py's. A file may hold more than the model: causal masks, other heads, the
head again, which is tied to the embedding. It must hold all of the model, in the right shapes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr

import safetensors
import torch

from nanochatgpt.files import check_format, load_tensors, read_json

# the files with a model's weights, or an index of their shards, best first
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"  # a reward model's, which has no lm_head
PARTS = ("wte", "wpe", "h", "ln_f")  # of the transformer
# parts of a name that say where the model is: in the base model's place or inside a wrapper of
# torch.compile, FSDP, activation checkpointing, DDP or Lightning
PREFIXES = {"transformer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PREFIXES |= {"module", "model"}


class NoScore(ValueError):
    """The weights are not a reward model's."""


@dataclass
class StoredTensor:
    path: Path  # its file
    shape: tuple
    dtype: str
    read: Callable  # () -> the tensor


# --- files ----------------------------------------------------------------------------------------


def open_weights(path, get_file):
    """Return {name: StoredTensor} of a file, or of the shards that an index lists (a .json file);
    get_file(name) returns the path of a shard. Raises ValueError if a file is damaged."""
    if path.suffix != ".json":
        return open_tensors(path)

    weight_map = read_json(path).get("weight_map")  # {name of a tensor: name of its file}
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is damaged: it lists no shards")
    shards = sorted(set(map(str, weight_map.values())))
    for name in shards:
        if not re.fullmatch(r"\w[\w.-]*", name):  # such as ../../secret.bin
            raise ValueError(f"{path}: {short_repr(name)} is not a file of its directory")
    stored = {}
    for name in shards:
        stored |= open_tensors(get_file(name))
    return stored


def open_tensors(path):
    """Return {name: StoredTensor} of one file. Raises ValueError if it is damaged."""
    check_format(path)  # also raises PermissionError; safetensors would call the file missing
    stored = {}
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    tensor = file.get_slice(name)
                    read = _reader(path, name)
                    shape = tuple(tensor.get_shape())
                    stored[name] = StoredTensor(path, shape, tensor.get_dtype(), read)
        else:
            tensors = load_tensors(path)
            tensors = tensors.get("state_dict", tensors)  # Lightning's
            for name, tensor in tensors.items():
                stored[str(name)] = in_memory(path, tensor)
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no state dict; save it again ({error})") from error
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return stored


def _reader(path, name):
    def read():
        # map the file anew for each tensor, so that no earlier one stays in memory
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def in_memory(path, tensor, transposed=False):
    """Return the StoredTensor of a tensor that is loaded or mapped, or of its transpose."""
    tensor = tensor.transpose(0, -1) if transposed else tensor
    return StoredTensor(path, tuple(tensor.shape), str(tensor.dtype), tensor.contiguous)


# --- names ----------------------------------------------------------------------------------------


def match_model(stored, model):
    """Return read(name) -> tensor for the weights of `model`; name is model.py's. Each tensor can
    be read once. Raises ValueError if the stored names, shapes or dtypes are not the model's, or a
    head is not its embedding; NoScore if a reward model's score is missing."""
    paths = {tensor.path for tensor in stored.values()}
    path = paths.pop() if len(paths) == 1 else paths.pop().parent  # for messages

    # 1. model.py's names; like transformers, skip masks and unknown heads
    tensors = {}
    for stored_name, tensor in stored.items():
        parts = stored_name.split(".")
        name = ".".join(part for part in parts if part not in PREFIXES)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if "transformer" in parts or name.startswith(tuple(f"{part}." for part in PARTS)):
            name = f"transformer.{name}"
        elif name not in (HEAD, SCORE):
            continue
        if name in tensors:
            raise ValueError(f"{path} has the tensor {name} twice")
        tensors[name] = tensor

    # the head is the embedding: a file may have only one of them
    head = tensors.pop(HEAD, None)
    if head:
        tensors.setdefault(EMBEDDING, head)

    # 2. compare names, shapes and dtypes with the model
    expected = model.state_dict()
    has_head = expected.pop(HEAD, None) is not None
    if SCORE in expected and SCORE not in tensors:
        raise NoScore(f"{path} is not a reward model: it has no {SCORE}")
    if SCORE in tensors and SCORE not in expected:
        raise ValueError(f"{path} is a reward model: it scores text and writes none")
    for name in sorted(expected.keys() ^ tensors.keys()):  # report the first difference
        verb = "lacks" if name in expected else "has"
        raise ValueError(f"{path} {verb} the tensor {name}, unlike the model in its config")
    for name, weight in expected.items():
        tensor = tensors[name]
        if tensor.shape != weight.shape:
            wanted = tuple(weight.shape)
            raise ValueError(f"{path}: {name} has shape {tensor.shape}, its config says {wanted}")
        if tensor.dtype.lower().removeprefix("torch.") not in FLOATS:
            dtype = f"{name} is {tensor.dtype}"
            raise ValueError(f"{path}: {dtype}; quantized weights are not supported")
    if head and has_head and not torch.equal(head.read(), tensors[EMBEDDING].read()):
        raise ValueError(f"{path}: {HEAD} differs from {EMBEDDING}; only tied ones are supported")
    return lambda name: tensors.pop(name).read()  # frees each tensor after use
