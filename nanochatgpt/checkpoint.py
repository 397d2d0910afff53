"""
Weights in and out. A checkpoint is a Hugging Face GPT-2 directory; `init_from` says where weights come from:

    gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2      OpenAI's and Hugging Face's weights, from the hub
    org/name                                                any model on the hub with GPT-2's architecture
    nano                                                    the small chat model in assets/nano/
    a directory                                             config.json and model.safetensors or pytorch_model.bin
    random:gpt2, ...                                        that shape with random weights, for benchmarks
"""

import contextlib
import json
import pickle
import reprlib
import shutil
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from model import GPT, PRESETS, Conv1D, GPTConfig, RewardModel
from nanochatgpt.atomic import replacing
from nanochatgpt.device import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, mallopt
from nanochatgpt.download import hub_file
from nanochatgpt.quantize import FBGEMM, BFloat16Linear, Float16Linear, Int8Linear
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer

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
# the layers that weights of a dtype are packed into for inference on a CPU
PACKED = {torch.bfloat16: BFloat16Linear, torch.float16: Float16Linear, torch.int8: Int8Linear}

LARGEST = (
    1 << 24
)  # of the numbers that make a shape: with more, the number of a matrix's bytes may overflow
FLOATS = {
    "f64",
    "f32",
    "f16",
    "bf16",
    "float64",
    "float32",
    "float16",
    "bfloat16",
}  # of safetensors, and of torch

SCORE = "score.weight"  # what a reward model has in place of the head

NANO = (
    Path(__file__).parents[1] / "assets" / "nano"
)  # a small chat model in the project; see its README.md


class NoScore(ValueError):
    """A reward model was asked for, and what is there is none."""


@torch.no_grad()
def load_model(
    init_from, device="cpu", dtype=torch.float32, dropout=0.0, inference=False, Model=GPT
):
    """Return (GPT, Tokenizer) of `init_from` (see above), with the weights in `dtype` on `device`; or (RewardModel,
    Tokenizer), if that is the `Model`.

    With `inference`, on an x86 CPU, bfloat16, float16 and int8 weights are packed into the layers of linear.py: these
    are the fastest for one row, and can be neither trained nor saved. Raises FileNotFoundError or ConnectionError where
    there is no such model, ValueError where it is damaged or its arithmetic is not GPT-2's.
    """
    if init_from.removeprefix("random:") in PRESETS and init_from.startswith("random:"):
        config, tokenizer = GPTConfig(**PRESETS[init_from.removeprefix("random:")]), Tokenizer()
        tensors = Model(config).state_dict()
        tensors.pop("lm_head.weight", None)  # the embedding's, which it would keep alive
        read = tensors.pop
    else:
        weights, config, tokenizer = _find(init_from)
        read = _open_weights(weights, config, Model)
    config.dropout = dropout
    with torch.device("meta"):
        model = Model(config)
    Linear = (
        PACKED.get(dtype) if inference and FBGEMM and torch.device(device).type == "cpu" else None
    )
    tensors = {}
    # one tensor at a time is read and converted: there is never a second copy of them all
    if Linear:
        mallopt(
            M_MMAP_THRESHOLD, 1 << 20
        )  # what is freed goes back at once: int8 peaks at 640 MB, not at 660 to 890
        embedding = read("transformer.wte.weight").float()
        if Model is GPT:
            model.lm_head = Linear(embedding)
        tensors["transformer.wte.weight"] = embedding.to(
            torch.float16 if dtype == torch.int8 else dtype
        )
        del embedding
        for name, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                weight, bias = (read(f"{name}.{part}").float() for part in ("weight", "bias"))
                model.set_submodule(name, Linear(weight.T.contiguous(), bias))
        dtype = torch.float32  # of the rest
    for name in model.state_dict().keys() - tensors.keys() - {"lm_head.weight"}:
        # a copy, since a mapped file need not lie on the 64-byte boundaries on which results are the same to the bit
        tensors[name] = read(name).to(device, dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)
    if Linear:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # as glibc would have set them by itself
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
    else:
        model.tie_weights()
    return model.requires_grad_(not Linear), tokenizer


def load_reward_model(name, tokenizer, device, **how):
    """Return the RewardModel of that name, to score what this tokenizer writes; `how` goes to load_model. Raises
    ValueError where it is none, or knows other tokens."""
    if (
        how.get("dtype") == torch.float16
        and device == "cpu"
        and torch.cpu._is_avx512_bf16_supported()
    ):
        how["dtype"] = (
            torch.bfloat16
        )  # many tokens at once: 0.75 of the time of float16, which is for few
    try:
        model, theirs = load_model(name, device, Model=RewardModel, **how)
    except (FileNotFoundError, NoScore) as error:
        what = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else str(error).partition(";")[0]
        )
        what = what.removeprefix(f"init_from={name}: ")
        raise ValueError(f"reward={name}: {what}. Make one by train_reward.py") from error
    if theirs.template != tokenizer.template or model.config.vocab_size < tokenizer.n_vocab:
        which = f"{model.config.vocab_size} tokens, in template {theirs.template}"
        ours = f"{tokenizer.n_vocab} in template {tokenizer.template}"
        raise ValueError(
            f"reward={name} knows {which}; the model that talks {ours}: another vocabulary. Train one on shards in "
            f"template {tokenizer.template}"
        )
    return model.eval()


def save_model(model, tokenizer, directory):
    """Write `model` and `tokenizer` as a Hugging Face GPT-2 directory. If that fails, what was there is whole.

    A RewardModel becomes a GPT2ForSequenceClassification. Raises ValueError for a model that was packed for inference.
    """
    if not isinstance(model.transformer.h[0].mlp.c_fc, Conv1D):
        raise ValueError(
            "a model that was loaded for inference is packed and cannot be saved: load it without"
        )
    c = model.config
    config = (
        {name: value for name, value in SUPPORTED.items() if value is not None}
        | {
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": c.vocab_size,
            "n_positions": c.block_size,
            "n_ctx": c.block_size,  # as OpenAI's own config.json has it: llama.cpp's converter asks for it
            "n_embd": c.n_embd,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "resid_pdrop": c.dropout,
            "dtype": str(model.transformer.wpe.weight.dtype).removeprefix("torch."),
        }
    )
    if isinstance(model, RewardModel):
        config |= {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {0: "kept"},
            "label2id": {"kept": 0},
        }
    ids = {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    texts = tokenizer.files() | {
        "config.json": json.dumps(config | ids, indent=2),
        "generation_config.json": json.dumps(ids, indent=2),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().cpu().contiguous()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight"
    }
    with (
        contextlib.ExitStack() as stack
    ):  # all files are on the disk before the first takes its place
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
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code: not loaded"
        ) from error
    except Exception as error:  # of whatever kind: the unpickler promises none for damaged bytes
        raise ValueError(
            f"{path} is damaged or cut short ({error}); fetch or save it again"
        ) from error


def default_model():
    """Return what a script talks to unless told otherwise: the chat model trained here, else the one in the box."""
    return "out/chat" if Path("out/chat/model.safetensors").exists() else "nano"


def _find(init_from):
    """Return (path of the weights, GPTConfig, Tokenizer)."""
    if init_from == "nano":
        return _find_local(NANO)
    if Path(init_from).is_dir():
        return _find_local(Path(init_from))
    if init_from in HUB:
        repo, sha256 = HUB[init_from]
        weights = hub_file(repo, "model.safetensors", sha256=sha256)
        return weights, GPTConfig(**PRESETS[init_from]), Tokenizer()
    if (
        init_from.count("/") == 1
        and not init_from.startswith("out/")
        and not Path(init_from).parent.is_dir()
    ):
        return _find_on_hub(init_from)
    # out/NAME is where train.py writes: not to be asked of whoever owns that name on the hub
    raise FileNotFoundError(
        f"init_from={init_from}: there is no such directory; train a model into it first, "
        f"or take an org/name on the hub or one of nano, {', '.join(HUB)}"
    )


def _find_local(directory):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return (
                directory / name,
                _read_config(directory / "config.json"),
                Tokenizer.from_directory(directory),
            )
    raise FileNotFoundError(f"{directory} has neither model.safetensors nor pytorch_model.bin")


def _find_on_hub(repo):
    config = hub_file(repo, "config.json")
    folder = config.parent
    for name in (
        "tokenizer.json",
        "vocab.json",
        "added_tokens.json",
    ):  # a repository has the first, or the others
        with contextlib.suppress(FileNotFoundError):
            folder = hub_file(repo, name).parent
            if name == "tokenizer.json":
                break
    with contextlib.suppress(FileNotFoundError):
        hub_file(repo, "tokenizer_config.json")  # which says in which template it talks
    try:
        weights = hub_file(repo, "model.safetensors")
    except FileNotFoundError:
        weights = hub_file(repo, "pytorch_model.bin")
    return weights, _read_config(config), Tokenizer.from_directory(folder)


def _read_config(path):
    """Return the GPTConfig of a Hugging Face config.json. Raises ValueError naming the option that is not GPT-2's."""
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name}={reprlib.repr(config[name])} is not supported, only {value!r}"
            )
    shape = {
        name: config.get(name)
        for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    }
    for name, value in shape.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(
                f"{path}: {name}={reprlib.repr(value)} is not a whole number from 1 to {LARGEST:,}"
            )
    if shape["n_embd"] % shape["n_head"]:
        raise ValueError(
            f"{path}: n_embd={shape['n_embd']} is not a multiple of n_head={shape['n_head']}"
        )
    if config.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise ValueError(
            f"{path}: n_inner={reprlib.repr(config['n_inner'])} is not supported, only 4 n_embd"
        )
    return GPTConfig(block_size=shape.pop("n_positions"), **shape)


def _open_weights(path, config, Model):
    """Return read(name) -> tensor for a weights file, under model.py's names; each tensor can be read once.

    What the file holds is checked against `config` first. A safetensors file is mapped anew for each tensor, so that
    what was read does not stay in memory.
    """
    open(path, "rb").close()  # safetensors says of a file that may not be read that there is none
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

            def read(name):
                with safetensors.safe_open(path, framework="pt") as file:
                    return file.get_tensor(name)
        else:
            tensors = load_tensors(path)
            found = {
                name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
                for name, t in tensors.items()
            }
            read = tensors.pop
        # the base model is saved without the prefix; the causal mask and the tied head are no weights of their own
        stored = {
            name if name == SCORE else "transformer." + name.removeprefix("transformer."): name
            for name in found
            if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight"
        }
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or no state dict ({error}); fetch or save it again"
        ) from error
    # no more layers than there are tensors: a config may ask for any number, and the first that lacks is named below
    config = replace(config, n_layer=min(config.n_layer, len(stored) + 1))
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in Model(config).state_dict().items()
        }
    expected.pop("lm_head.weight", None)
    if SCORE in expected and SCORE not in stored:
        raise NoScore(f"{path} is no reward model, it has no {SCORE}")
    if SCORE in stored and SCORE not in expected:
        raise ValueError(f"{path} is a reward model: it scores text and writes none")
    for name in sorted(expected.keys() ^ stored.keys()):
        verb = "has" if name in stored else "lacks"
        raise ValueError(
            f"{path} {verb} the tensor {name}: it is not the model that its config describes"
        )
    for name, shape in expected.items():
        there, dtype = found[stored[name]]
        if there != shape:
            raise ValueError(f"{path}: {name} has shape {there}, its config says {shape}")
        if dtype.lower() not in FLOATS:
            raise ValueError(f"{path}: {name} is of {dtype}; quantized weights are not supported")
    return lambda name: read(stored[name])
