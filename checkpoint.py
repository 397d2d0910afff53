"""
Weights in and out. A checkpoint is a Hugging Face GPT-2 directory; `init_from` says where weights come from:

    gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2      OpenAI's and Hugging Face's weights, from the hub
    org/name                                                any model on the hub with GPT-2's architecture
    a directory                                             config.json and model.safetensors or pytorch_model.bin
    random:gpt2, ...                                        that shape with random weights, for benchmarks
"""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from download import hub_file
from model import GPT, PRESETS, GPTConfig
from tokenizer import END_OF_TEXT, Tokenizer

# short name -> repository, sha256 of its model.safetensors
HUB = {
    "gpt2": ("openai-community/gpt2", "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("openai-community/gpt2-medium", "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("openai-community/gpt2-large", "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("openai-community/gpt2-xl", "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
    "distilgpt2": ("distilbert/distilgpt2", "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b"),
}
# Hugging Face's options that change the arithmetic, and the one value of each that model.py implements
SUPPORTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
}


def pick_device(name):
    """Return the device of a `device` knob; 'auto' is CUDA, else Apple's MPS, else the CPU. Raises ValueError for one
    that this machine has not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    with contextlib.suppress(RuntimeError):  # of torch.device, for a name that is none
        device = torch.device(name)
        if available.get(device.type) and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()):
            return name
    there = ", ".join(device for device, there in available.items() if there)
    raise ValueError(f"device={name} is not there; this machine has {there}")


def pick_dtype(name, device):
    """Return the torch dtype of a `dtype` knob; 'auto' is bfloat16 (or float16) on CUDA, else float32."""
    if name == "auto":
        on_cuda = torch.device(device).type == "cuda"
        in_hardware = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if in_hardware else "float16" if on_cuda else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name} is not one of auto, float32, bfloat16, float16")
    return getattr(torch, name)


def load_model(init_from, device="cpu", dtype=torch.float32, dropout=0.0):
    """Return (GPT, Tokenizer) of `init_from` (see above), with the weights in `dtype` on `device`.

    Raises FileNotFoundError or ConnectionError where there is no such model, ValueError where it is damaged or its
    arithmetic is not GPT-2's.
    """
    if init_from.removeprefix("random:") in PRESETS and init_from.startswith("random:"):
        config = GPTConfig(**PRESETS[init_from.removeprefix("random:")], dropout=dropout)
        return GPT(config).to(device, dtype), Tokenizer()
    if Path(init_from).is_dir():
        weights, config, tokenizer = _find_local(Path(init_from))
    elif init_from in HUB:
        repo, sha256 = HUB[init_from]
        weights = hub_file(repo, "model.safetensors", sha256=sha256)
        config, tokenizer = GPTConfig(**PRESETS[init_from]), Tokenizer()
    elif init_from.count("/") == 1 and not init_from.startswith("out/") and not Path(init_from).parent.is_dir():
        weights, config, tokenizer = _find_on_hub(init_from)
    else:  # out/NAME is where train.py writes: not to be asked of whoever owns that name on the hub
        raise FileNotFoundError(
            f"init_from={init_from}: there is no such directory; train a model into it first, "
            f"or take an org/name on the hub or one of {', '.join(HUB)}"
        )
    config.dropout = dropout
    with torch.device("meta"):
        model = GPT(config)
    tensors = _read_weights(weights, model.state_dict())
    # copies, since a mapped file need not lie on the 64-byte boundaries on which results are the same bit for bit
    tensors = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, assign=True)
    model.tie_weights()
    return model, tokenizer


def save_model(model, tokenizer, directory):
    """Write `model` and `tokenizer` as a Hugging Face GPT-2 directory. If that fails, what was there is whole."""
    c = model.config
    config = {name: value for name, value in SUPPORTED.items() if value is not None} | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    texts = tokenizer.files() | {
        "config.json": json.dumps(config | ids, indent=2),
        "generation_config.json": json.dumps(ids, indent=2),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    with contextlib.ExitStack() as stack:  # all files are on the disk before the first takes its place
        for name, text in texts.items():
            path = stack.enter_context(replacing(directory / name))
            path.write_text(text, encoding="utf-8")
        weights = stack.enter_context(replacing(directory / "model.safetensors"))
        save_file(tensors, weights, metadata={"format": "pt"})
        shutil.copymode(path, weights)  # safetensors lets only the owner read


def load_tensors(path):
    """Return what torch.save wrote to `path`, if it is tensors and plain values. Raises ValueError if it is not."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors, which could run code: not loaded") from error
    except Exception as error:  # of whatever kind: the unpickler promises none for damaged bytes
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch or save it again") from error


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write to; what was written there then takes the place of `path` at one instant, or not at all.

    Raises OSError, with the path, where it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (safetensors.SafetensorError, RuntimeError) as error:  # how these and torch tell of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def _find_local(directory):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).exists():
            return directory / name, _read_config(directory / "config.json"), Tokenizer.from_directory(directory)
    raise FileNotFoundError(f"{directory} has neither model.safetensors nor pytorch_model.bin")


def _find_on_hub(repo):
    config = hub_file(repo, "config.json")
    folder = config.parent
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):  # a repository has the first, or the others
        with contextlib.suppress(FileNotFoundError):
            folder = hub_file(repo, name).parent
            if name == "tokenizer.json":
                break
    try:
        weights = hub_file(repo, "model.safetensors")
    except FileNotFoundError:
        weights = hub_file(repo, "pytorch_model.bin")
    return weights, _read_config(config), Tokenizer.from_directory(folder)


def _read_config(path):
    """Return the GPTConfig of a Hugging Face config.json. Raises ValueError naming the option that is not GPT-2's."""
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name}={config[name]!r} is not supported, only {value!r}")
    shape = {name: config.get(name) for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")}
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {name}={value!r} is not a whole number above 0")
    if config.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise ValueError(f"{path}: n_inner={config['n_inner']!r} is not supported, only 4 n_embd")
    return GPTConfig(block_size=shape.pop("n_positions"), **shape)


def _read_weights(path, expected):
    """Return {name: tensor} of a weights file under model.py's names, checked against the state dict `expected`."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            tensors = load_tensors(path)
        # the base model is saved without the prefix; the causal mask and the tied head are no weights of their own
        tensors = {
            "transformer." + name.removeprefix("transformer."): tensor
            for name, tensor in tensors.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight"
        }
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no state dict ({error}); fetch or save it again") from error
    expected = {name: tensor.shape for name, tensor in expected.items() if name != "lm_head.weight"}
    for name in sorted(expected.keys() ^ tensors.keys()):
        verb = "has" if name in tensors else "lacks"
        raise ValueError(f"{path} {verb} the tensor {name}: it is not the model that its config describes")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, its config says {tuple(shape)}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{path}: {name} is of {tensors[name].dtype}; quantized weights are not supported")
    return tensors
