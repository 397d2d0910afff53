"""
Hugging Face's files, both ways: config.json, tensor names, tokenizer files and chat templates.

What we write, transformers, vLLM, llama.cpp's converter and lm-evaluation-harness read as it is.
What we read, we check: a config that asks for other arithmetic than model.py's is refused by name.
"""

import functools
import json
import reprlib
from dataclasses import replace
from pathlib import Path

import safetensors
import torch

from model import GPTConfig
from nanochatgpt.files import load_tensors
from nanochatgpt.tokenizer import END_OF_TEXT, TEMPLATES, Tokenizer, gpt2_vocab, vocab_file

# Options that change the arithmetic, and the one value of each that model.py implements
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
MAX_SIZE = 1 << 24  # of each number in a shape; beyond it the size of a matrix may overflow
FLOATS = {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
SCORE = "score.weight"  # what a reward model has in place of the head


class NoScore(ValueError):
    """A reward model was asked for, and the weights are not one's."""


# --- config.json ----------------------------------------------------------------------------------


def read_config(path):
    """Return the GPTConfig of a config.json. Raises ValueError naming the option that is not
    GPT-2's."""
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error

    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            given = reprlib.repr(config[name])
            raise ValueError(f"{path}: {name}={given} is not supported, only {value!r}")

    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    shape = {name: config.get(name) for name in names}
    for name, value in shape.items():
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            given = reprlib.repr(value)
            raise ValueError(f"{path}: {name}={given} is not a whole number from 1 to {MAX_SIZE:,}")
    n_embd = shape["n_embd"]
    if n_embd % shape["n_head"]:
        raise ValueError(f"{path}: n_embd={n_embd} is not a multiple of n_head={shape['n_head']}")
    if config.get("n_inner") not in (None, 4 * n_embd):
        given = reprlib.repr(config["n_inner"])
        raise ValueError(f"{path}: n_inner={given} is not supported, only 4 n_embd")
    return GPTConfig(block_size=shape.pop("n_positions"), **shape)


def config_files(model, tokenizer):
    """Return {name: text} of config.json and generation_config.json."""
    c = model.config
    config = {name: value for name, value in SUPPORTED.items() if value is not None}
    config |= {
        "architectures": [model.architecture],
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,  # llama.cpp's converter asks for OpenAI's name of it
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "dtype": str(model.transformer.wpe.weight.dtype).removeprefix("torch."),
    }
    if model.architecture == "GPT2ForSequenceClassification":
        config |= {"id2label": {0: "kept"}, "label2id": {"kept": 0}}
    ids = {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {
        "config.json": json.dumps(config | ids, indent=2),
        "generation_config.json": json.dumps(ids, indent=2),
    }


# --- weights --------------------------------------------------------------------------------------


def open_weights(path, config, model_class):
    """Return read(name) -> tensor for a weights file, under model.py's names. Each tensor can be
    read once.

    Checks the names, shapes and dtypes in the file against `config` first. A safetensors file is
    mapped anew for each tensor, so that what was read does not stay in memory. Raises ValueError
    for a file that is damaged or not this model, NoScore for one without a reward model's score.
    """
    open(path, "rb").close()  # safetensors says "no such file" of one that may not be read
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in list(file.keys())}
                stored = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}

            def read(name):
                with safetensors.safe_open(path, framework="pt") as file:
                    return file.get_tensor(name)

        else:
            tensors = load_tensors(path)
            stored = {n: (tuple(t.shape), str(t.dtype)) for n, t in tensors.items()}
            read = tensors.pop
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or no state dict ({error}); fetch or save it again"
        ) from error

    # Base models are saved without the prefix. The causal mask and the tied head are not weights.
    stored_name = {}
    for name in stored:
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        ours = name if name == SCORE else "transformer." + name.removeprefix("transformer.")
        stored_name[ours] = name

    # Build no more layers than there are tensors, however many the config asks for: the first
    # missing one is named below.
    config = replace(config, n_layer=min(config.n_layer, len(stored_name) + 1))
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    expected.pop("lm_head.weight", None)
    if SCORE in expected and SCORE not in stored_name:
        raise NoScore(f"{path} is not a reward model, it has no {SCORE}")
    if SCORE in stored_name and SCORE not in expected:
        raise ValueError(f"{path} is a reward model: it scores text and writes none")
    for name in sorted(expected.keys() ^ stored_name.keys()):
        verb = "has" if name in stored_name else "lacks"
        raise ValueError(
            f"{path} {verb} the tensor {name}: it is not the model that its config describes"
        )
    for name, tensor in expected.items():
        shape, dtype = stored[stored_name[name]]
        if shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {shape}, its config says {tuple(tensor.shape)}"
            )
        if dtype.lower().removeprefix("torch.") not in FLOATS:
            raise ValueError(f"{path}: {name} is {dtype}; quantized weights are not supported")
    return lambda name: read(stored_name[name])


# --- tokenizer files ------------------------------------------------------------------------------


@functools.cache
def tokenizer_files(template):
    """Return {name: text} of the files from which transformers makes the same tokenizer."""
    tokenizer = Tokenizer(template)
    t = TEMPLATES[template]
    merges = vocab_file("vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": token, "content": text, **flags, "special": True}
        for text, token in tokenizer.special_ids.items()
    ]
    fast = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": gpt2_vocab(),
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": t.end,
        "pad_token": next(iter(t.specials), "<|endoftext|>"),
        "unk_token": "<|endoftext|>",
        "chat_template": chat_template(template),
    }
    return {
        "tokenizer.json": json.dumps(fast),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def chat_template(template):
    """Return a template in Jinja, for transformers' `apply_chat_template`."""
    t = TEMPLATES[template]
    return (
        f"{{%- set openers = {json.dumps(t.openers)} -%}}"
        "{%- for message in messages -%}"
        "{%- set opener = openers[message['role']] -%}"
        f"{{{{- (opener | trim if loop.first else opener) + {json.dumps(t.before)}"
        f" + message['content'] + {json.dumps(t.after)}"
        f" + ({json.dumps(t.end)} if message['role'] == 'assistant' else '') -}}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- openers['assistant'] -}}{%- endif -%}"
    )


def read_tokenizer(directory):
    """Return the Tokenizer of a Hugging Face directory: of the template whose tokens were added, or
    whose chat template stands there, else human_bot.

    Raises ValueError if the vocabulary is not GPT-2's or the template's tokens have other ids.
    """
    directory = Path(directory)
    added = {}
    vocab = gpt2_vocab()
    jinja = None
    try:
        if (path := directory / "tokenizer_config.json").exists():
            jinja = dict(json.loads(path.read_bytes())).get("chat_template")
        if (path := directory / "tokenizer.json").exists():
            fast = json.loads(path.read_bytes())
            added = {token["content"]: token["id"] for token in fast["added_tokens"]}
            vocab = dict(fast["model"]["vocab"])
        elif (path := directory / "vocab.json").exists():
            vocab = dict(json.loads(path.read_bytes()))
            if (directory / "added_tokens.json").exists():
                path = directory / "added_tokens.json"
                added = dict(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged or not a tokenizer's: {reason}") from error
    if any(vocab.get(token) != i for token, i in gpt2_vocab().items()):
        raise ValueError(f"{path} is not GPT-2's vocabulary; only models that use it can be loaded")

    # a template with tokens of its own is known by its end token, the others by their Jinja
    added = {"<|endoftext|>": END_OF_TEXT} | added
    for name, template in TEMPLATES.items():
        if template.specials and template.end in added:
            tokenizer = Tokenizer(name)
            if any(added.get(token) != i for token, i in tokenizer.special_ids.items()):
                raise ValueError(f"{path}: the tokens of template {name} have other ids than here")
            return tokenizer
    for name in TEMPLATES:
        if chat_template(name) == jinja:
            return Tokenizer(name)
    return Tokenizer()
