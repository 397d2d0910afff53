"""
Hugging Face's files, both ways: config.json, tensor names, tokenizer files and chat templates.

What we write, transformers, vLLM, llama.cpp's converter and lm-evaluation-harness read as it is.
What we read, we check: a config that asks for other arithmetic than model.py's is refused by name.
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
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
}
# The sizes in a config.json, and the largest of each that is not taken for damage
LARGEST = {
    "n_positions": 1 << 20,
    "vocab_size": 1 << 20,
    "n_layer": 1 << 10,
    "n_head": 1 << 10,
    "n_embd": 1 << 16,
}
FLOATS = {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
SCORE = "score.weight"  # what a reward model has in place of the head


class NoScore(ValueError):
    """A reward model was asked for, but the weights are another model's."""


# --- config.json ----------------------------------------------------------------------------------


def read_config(path):
    """Return the GPTConfig of a config.json. Raises ValueError for what is not a GPT-2's."""
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error

    # same arithmetic
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            given = f"{name}={short_repr(config[name])}"
            raise ValueError(f"{path}: {given} is not supported, only {value!r}")

    # sizes that a GPT can have
    sizes = {}
    for name, largest in LARGEST.items():
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= largest:
            given = f"{name}={short_repr(value)}"
            raise ValueError(f"{path}: {given} is not a whole number from 1 to {largest:,}")
        sizes[name] = value
    n_embd = sizes["n_embd"]
    if n_embd % sizes["n_head"]:
        raise ValueError(f"{path}: n_embd={n_embd} is not a multiple of n_head={sizes['n_head']}")
    if config.get("n_inner") not in (None, 4 * n_embd):
        given = f"n_inner={short_repr(config['n_inner'])}"
        raise ValueError(f"{path}: {given} is not supported, only 4 n_embd")
    return GPTConfig(block_size=sizes.pop("n_positions"), **sizes)


def config_files(model, tokenizer):
    """Return {name: text} of config.json and generation_config.json."""
    c = model.config
    config = {name: value for name, value in SUPPORTED.items() if value is not None}
    config["architectures"] = [model.architecture]  # the class that transformers makes
    config["dtype"] = str(model.transformer.wpe.weight.dtype).removeprefix("torch.")
    config |= {"vocab_size": c.vocab_size, "n_positions": c.block_size}
    config["n_ctx"] = c.block_size  # OpenAI's name for it, which llama.cpp's converter reads
    config |= {"n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    config |= {"embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "resid_pdrop": c.dropout}
    if model.architecture == "GPT2ForSequenceClassification":  # a reward model: one label
        config |= {"id2label": {0: "kept"}, "label2id": {"kept": 0}}
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": tokenizer.eos_id}
    ids["pad_token_id"] = tokenizer.pad_id
    return {
        "config.json": json.dumps(config | ids, indent=2),
        "generation_config.json": json.dumps(ids, indent=2),
    }


# --- weights --------------------------------------------------------------------------------------


def open_weights(path, model):
    """Return read(name) -> tensor for a file with the weights of `model`, under model.py's names.
    Each tensor can be read once.

    Raises ValueError if the file is damaged, or its names, shapes or dtypes are not the model's;
    NoScore if it lacks a reward model's score.
    """
    # 1. what the file has
    open(path, "rb").close()  # raises PermissionError, where safetensors says there is no such file
    stored = {}  # name in the file -> (shape, dtype)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    tensor = file.get_slice(name)
                    stored[name] = (tuple(tensor.get_shape()), tensor.get_dtype())

            def read(name):
                # map the file anew for each tensor, so that earlier ones do not stay in memory
                with safetensors.safe_open(path, framework="pt") as file:
                    return file.get_tensor(name)

        else:
            tensors = load_tensors(path)
            for name, tensor in tensors.items():
                stored[str(name)] = (tuple(tensor.shape), str(tensor.dtype))
            read = tensors.pop  # lets go of what was read
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no state dict; save it again ({error})") from error

    # 2. names: base models are saved without the prefix; masks and the tied head are no weights
    stored_name = {}  # name in model.py -> name in the file
    for name in stored:
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        prefix = "" if name == SCORE else "transformer."
        stored_name[prefix + name.removeprefix("transformer.")] = name

    # 3. compare with the model
    expected = model.state_dict()
    expected.pop("lm_head.weight", None)
    if SCORE in expected and SCORE not in stored_name:
        raise NoScore(f"{path} is not a reward model, it has no {SCORE}")
    if SCORE in stored_name and SCORE not in expected:
        raise ValueError(f"{path} is a reward model: it scores text and writes none")
    for name in sorted(expected.keys() | stored_name.keys()):
        if name not in stored_name:
            raise ValueError(f"{path} lacks the tensor {name} of the model in its config")
        if name not in expected:
            raise ValueError(f"{path} has the tensor {name}, unlike the model in its config")
        shape, dtype = stored[stored_name[name]]
        if shape != expected[name].shape:
            wanted = tuple(expected[name].shape)
            raise ValueError(f"{path}: {name} has shape {shape}, its config says {wanted}")
        if dtype.lower().removeprefix("torch.") not in FLOATS:
            raise ValueError(f"{path}: {name} is {dtype}; quantized weights are not supported")
    return lambda name: read(stored_name[name])


# --- tokenizer files ------------------------------------------------------------------------------


@functools.cache
def tokenizer_files(template):
    """Return {name: text} of the files from which transformers makes the same tokenizer."""
    tokenizer = Tokenizer(template)
    # the vocabulary, in the format of the tokenizers library
    lines = vocab_file("vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines[1:-1]]  # the first line is the format's version
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = []
    for text, token in tokenizer.special_ids.items():
        added.append({"id": token, "content": text, **flags, "special": True})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    byte_level |= {"trim_offsets": True, "use_regex": True}
    fast = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": gpt2_vocab(), "merges": merges},
    }
    # what transformers adds: roles of special tokens, and the chat template
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": tokenizer.decode([tokenizer.eos_id]),
        "pad_token": tokenizer.decode([tokenizer.pad_id]),
        "unk_token": "<|endoftext|>",
        "chat_template": chat_template(template),
    }
    config_json = json.dumps(config, indent=2)
    return {"tokenizer.json": json.dumps(fast), "tokenizer_config.json": config_json}


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
    """Return the Tokenizer of a Hugging Face directory: the template is the one whose special
    tokens it has, else the one of its chat template, else human_bot.

    Raises ValueError if the vocabulary is not GPT-2's or a template's tokens have other ids.
    """
    # tokenizer.json has everything; older directories have vocab.json and added_tokens.json
    vocab = gpt2_vocab()
    added = {}
    jinja = None
    path = directory / "tokenizer_config.json"
    try:
        if path.exists():
            jinja = dict(json.loads(path.read_bytes())).get("chat_template")
        path = directory / "tokenizer.json"
        if path.exists():
            fast = json.loads(path.read_bytes())
            added = {token["content"]: token["id"] for token in fast["added_tokens"]}
            vocab = dict(fast["model"]["vocab"])
        elif (directory / "vocab.json").exists():
            path = directory / "added_tokens.json"
            added = dict(json.loads(path.read_bytes())) if path.exists() else {}
            path = directory / "vocab.json"
            vocab = dict(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged or not a tokenizer's: {reason}") from error
    if any(vocab.get(token) != i for token, i in gpt2_vocab().items()):
        raise ValueError(f"{path} is not GPT-2's vocabulary; only models that use it can be loaded")

    # a template with special tokens is known by its end token, others by their chat template
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
