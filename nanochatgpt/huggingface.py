"""Hugging Face's files, both ways: config.json, tensor names, tokenizer files and chat templates.

transformers, vLLM, llama.cpp's converter and lm-evaluation-harness load our files unchanged. We
reject any option that model.py does not implement, and name it.
"""

import functools
import json
from reprlib import repr as short_repr

import safetensors

from model import GPTConfig
from nanochatgpt.files import load_tensors
from nanochatgpt.tokenizer import END_OF_TEXT, TEMPLATES, Tokenizer, gpt2_vocab, vocab_file

# Options that change the arithmetic, and the one value of each that model.py implements
SUPPORTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,  # torch's default
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "quantization_config": None,  # weights in floating point
}
SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")  # keys of config.json
LARGEST = 1 << 20  # upper bound of a size; anything larger means a corrupt file
FLOATS = {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
SCORE = "score.weight"  # a reward model's, which has no lm_head


class NoScore(ValueError):
    """The weights are not a reward model's."""


# --- config.json ----------------------------------------------------------------------------------


def _read_json(path):
    """Return the JSON object in a file. Raises ValueError if it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_config(path):
    """Return the GPTConfig of a config.json. Raises ValueError if that is not a GPT-2's."""
    config = _read_json(path)

    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            given = f"{name}={short_repr(config[name])}"
            raise ValueError(f"{path}: {given} is not supported, only {value!r}")

    sizes = {}
    for name in SIZES:
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{path}: {name}={short_repr(value)} is not from 1 to {LARGEST:,}")
        sizes[name] = value
    n_embd = sizes["n_embd"]
    if n_embd % sizes["n_head"]:
        raise ValueError(f"{path}: n_embd={n_embd} is not a multiple of n_head={sizes['n_head']}")
    if config.get("n_inner") not in (None, 4 * n_embd):
        raise ValueError(f"{path}: n_inner={short_repr(config['n_inner'])} is not 4 n_embd")
    return GPTConfig(block_size=sizes.pop("n_positions"), **sizes)


def config_files(model, tokenizer):
    """Return {name: text} of config.json and generation_config.json."""
    c = model.config
    config = dict(SUPPORTED)
    del config["quantization_config"]  # no key: not quantized
    config["architectures"] = [model.architecture]  # the class that transformers makes
    config["dtype"] = str(model.transformer.wpe.weight.dtype).removeprefix("torch.")
    # sizes; llama.cpp's converter reads n_ctx, OpenAI's name of n_positions
    config |= {"vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size}
    config |= {"n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    config |= {"embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "resid_pdrop": c.dropout}
    if model.architecture == "GPT2ForSequenceClassification":  # a reward model: one label
        config |= {"id2label": {0: "kept"}, "label2id": {"kept": 0}}
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": tokenizer.eos_id}
    ids["pad_token_id"] = tokenizer.pad_id
    config = json.dumps(config | ids, indent=2)
    return {"config.json": config, "generation_config.json": json.dumps(ids, indent=2)}


# --- weights --------------------------------------------------------------------------------------


def open_weights(path, model):
    """Return read(name) -> tensor for a file with the weights of `model`; name is model.py's. Each
    tensor can be read once. Raises ValueError if the file is damaged, or its names, shapes or
    dtypes are not the model's; NoScore if it lacks a reward model's score."""
    # 1. list the tensors in the file
    open(path, "rb").close()  # raises PermissionError; safetensors would call the file missing
    stored = {}  # name in the file -> (shape, dtype)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    tensor = file.get_slice(name)
                    stored[name] = (tuple(tensor.get_shape()), tensor.get_dtype())

            def read(name):
                # map the file anew for each tensor, so that no earlier one stays in memory
                with safetensors.safe_open(path, framework="pt") as file:
                    return file.get_tensor(name)

        else:
            tensors = load_tensors(path)
            for name, tensor in tensors.items():
                stored[str(name)] = (tuple(tensor.shape), str(tensor.dtype))
            read = tensors.pop  # frees each tensor after use
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no state dict; save it again ({error})") from error

    # 2. map the names: base models lack the prefix; masks and the tied head are not weights
    stored_name = {}  # name in model.py -> name in the file
    for name in stored:
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        prefix = "" if name == SCORE else "transformer."
        stored_name[prefix + name.removeprefix("transformer.")] = name

    # 3. compare names, shapes and dtypes with the model
    expected = model.state_dict()
    expected.pop("lm_head.weight", None)
    if SCORE in expected and SCORE not in stored_name:
        raise NoScore(f"{path} is not a reward model: it has no {SCORE}")
    if SCORE in stored_name and SCORE not in expected:
        raise ValueError(f"{path} is a reward model: it scores text and writes none")
    for name in sorted(expected.keys() ^ stored_name.keys()):  # report the first difference
        verb = "lacks" if name in expected else "has"
        raise ValueError(f"{path} {verb} the tensor {name}, unlike the model in its config")
    for name, tensor in expected.items():
        shape, dtype = stored[stored_name[name]]
        if shape != tensor.shape:
            wanted = tuple(tensor.shape)
            raise ValueError(f"{path}: {name} has shape {shape}, its config says {wanted}")
        if dtype.lower().removeprefix("torch.") not in FLOATS:
            raise ValueError(f"{path}: {name} is {dtype}; quantized weights are not supported")
    return lambda name: read(stored_name[name])  # under model.py's name


# --- tokenizer files ------------------------------------------------------------------------------


@functools.cache
def tokenizer_files(template):
    """Return {name: text} of the files that make the same tokenizer in transformers."""
    tokenizer = Tokenizer(template)
    # the vocabulary, in the format of the tokenizers library
    lines = vocab_file("vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines[1:-1]]  # the first line is the format's version
    # special tokens match anywhere, as they are
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = []
    for text, token in tokenizer.special_ids.items():
        added.append({"id": token, "content": text, **flags, "special": True})
    # words are split and mapped from bytes to characters as in GPT-2
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    byte_level |= {"trim_offsets": True, "use_regex": True}
    fast = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": gpt2_vocab(), "merges": merges},
    }
    # the roles of the special tokens, and the chat template
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": tokenizer.decode([tokenizer.eos_id]),
        "pad_token": tokenizer.decode([tokenizer.pad_id]),
        "unk_token": "<|endoftext|>",
        "chat_template": chat_template(template),
    }
    config = json.dumps(config, indent=2)
    return {"tokenizer.json": json.dumps(fast), "tokenizer_config.json": config}


def chat_template(template):
    """Return a template in Jinja for transformers' `apply_chat_template`."""
    t = TEMPLATES[template]
    return (  # as in Tokenizer.render: opener, content, and the end token of a reply
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
    """Return the Tokenizer of a Hugging Face directory, with the template whose special tokens it
    has, else that of its chat template, else human_bot. Raises ValueError if the vocabulary is not
    GPT-2's or a template's tokens have other ids."""

    def read(name, default):
        path = directory / name
        return _read_json(path) if path.exists() else default

    # the vocabulary: in tokenizer.json, or in older directories in two files
    path = directory / "tokenizer.json"
    if path.exists():
        fast = _read_json(path)
        try:
            vocab = dict(fast["model"]["vocab"])
            added = {token["content"]: token["id"] for token in fast["added_tokens"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a tokenizer's: {error!r}") from error
    else:
        path = directory / "vocab.json"
        vocab = read("vocab.json", gpt2_vocab())  # a repository without one uses GPT-2's
        added = read("added_tokens.json", {})
    if not gpt2_vocab().items() <= vocab.items():
        raise ValueError(f"{path} is not GPT-2's vocabulary; only models that use it can be loaded")

    added = {"<|endoftext|>": END_OF_TEXT} | added
    # a template with special tokens is known by its end token, others by their chat template
    for name, template in TEMPLATES.items():
        if template.specials and template.end in added:
            tokenizer = Tokenizer(name)
            if not tokenizer.special_ids.items() <= added.items():
                raise ValueError(f"{path}: the tokens of template {name} have other ids than here")
            return tokenizer
    jinja = read("tokenizer_config.json", {}).get("chat_template")
    for name in TEMPLATES:
        if chat_template(name) == jinja:
            return Tokenizer(name)
    return Tokenizer()
