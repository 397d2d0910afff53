"""Hugging Face's files, both ways: config.json, tokenizer files and chat templates.

transformers, vLLM, llama.cpp's converter and lm-evaluation-harness load our files unchanged. We
reject any option that model.py does not implement, and name it.
"""

import functools
import json
import re
from reprlib import repr as short_repr

from model import GPTConfig
from nanochatgpt.files import check_format, read_json
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.tokenizer import END_OF_TEXT, TEMPLATES, Tokenizer, gpt2_vocab, vocab_file

# Options that change the arithmetic, and the one value of each that model.py implements
SUPPORTED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,  # torch's default
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "quantization_config": None,  # weights in floating point
}
# activation_function -> GPTConfig.activation: transformers has several names for each form of GELU
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
ACTIVATIONS = dict.fromkeys(TANH, "gelu_new") | dict.fromkeys(("gelu", "gelu_python"), "gelu")
LARGEST = 1 << 20  # upper bound of a size; anything larger means a corrupt file
# what a directory or repository with an adapter_config.json is
ADAPTER = "is a LoRA adapter: merge it into its model with peft's merge_and_unload, and save that"


# --- config.json ----------------------------------------------------------------------------------


def read_config(path):
    """Return the GPTConfig of a config.json. Raises ValueError if that is not a GPT-2's."""
    config = read_json(path)
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            given = f"{name}={short_repr(config[name])}"
            raise ValueError(f"{path}: {given} is not supported, only {value!r}")
    activation = str(config.get("activation_function", "gelu_new"))
    if activation not in ACTIVATIONS:
        given = f"activation_function={short_repr(activation)}"
        raise ValueError(f"{path}: {given} is not supported, only {', '.join(ACTIVATIONS)}")
    sizes = read_sizes(path, config, "n_positions")
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise ValueError(f"{path}: n_inner={short_repr(config['n_inner'])} is not 4 n_embd")
    return GPTConfig(activation=ACTIVATIONS[activation], **sizes)


def read_sizes(path, config, context):
    """Return GPTConfig's sizes from a config that was read from `path`; `context` is its name of
    the block size. Raises ValueError for one that is missing or cannot be."""
    sizes = {}
    for name in (context, "vocab_size", "n_layer", "n_head", "n_embd"):
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{path}: {name}={short_repr(value)} is not from 1 to {LARGEST:,}")
        sizes[name] = value
    n_embd = sizes["n_embd"]
    if n_embd % sizes["n_head"]:
        raise ValueError(f"{path}: n_embd={n_embd} is not a multiple of n_head={sizes['n_head']}")
    return {"block_size": sizes.pop(context), **sizes}


def config_files(model, tokenizer):
    """Return {name: text} of config.json and generation_config.json."""
    c = model.config
    config = dict(SUPPORTED)
    del config["quantization_config"]  # no key: not quantized
    config["activation_function"] = c.activation
    config["architectures"] = [model.architecture]  # the class that transformers makes
    config["dtype"] = str(model.transformer.wpe.weight.dtype).removeprefix("torch.")
    # sizes; llama.cpp's converter reads n_ctx, OpenAI's name of n_positions
    config |= {"vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size}
    config |= {"n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    config |= {"embd_pdrop": c.dropout, "resid_pdrop": c.dropout}
    config["attn_pdrop"] = c.attention_dropout
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": tokenizer.eos_id}
    ids["pad_token_id"] = tokenizer.pad_id
    generation = dict(ids)
    if model.architecture == "GPT2ForSequenceClassification":  # a reward model: one label
        config |= {"id2label": {0: "kept"}, "label2id": {"kept": 0}}
    else:  # chat.py's sampling; these programs have no frequency_penalty in this file
        sampling = for_template(ChatSampling(), tokenizer.template)
        generation |= {"do_sample": True, "temperature": sampling.temperature}
        generation |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
    config = json.dumps(config | ids, indent=2)
    return {"config.json": config, "generation_config.json": json.dumps(generation, indent=2)}


# --- tokenizer files ------------------------------------------------------------------------------


@functools.cache
def tokenizer_files(template, context=1024):
    """Return {name: text} of the files that make the same tokenizer in transformers, for a model
    of this context."""
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
    jinja = chat_template(template)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context,
        "bos_token": "<|endoftext|>",
        "eos_token": tokenizer.decode([tokenizer.eos_id]),
        "pad_token": tokenizer.decode([tokenizer.pad_id]),
        "unk_token": "<|endoftext|>",
        "chat_template": jinja,  # for programs that do not know chat_template.jinja
    }
    return {
        "tokenizer.json": json.dumps(fast),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "chat_template.jinja": jinja,
    }


# Tokenizer.render in Jinja. `generation` marks what is learned, for return_assistant_tokens_mask.
CHAT_TEMPLATE = """\
{%- set openers = OPENERS -%}
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {%- set opener = openers[role].strip() if loop.first else openers[role] -%}
    {%- set text = namespace(content=message['content']) -%}
    {%- if message['content'] is not string -%}
        {%- set text.content = '' -%}
        {%- for part in message['content'] -%}
            {%- set text.content = text.content + part['text'] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set body = BEFORE + text.content + AFTER + (END if role == 'assistant' else '') -%}
    {%- if role == 'assistant' and message['weight'] != 0 -%}
        {{- opener -}}
        {%- generation -%}{{- body -}}{%- endgeneration -%}
    {%- else -%}
        {{- opener + body -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- openers['assistant'] -}}{%- endif -%}
"""


def chat_template(template):
    """Return a template in Jinja for transformers' `apply_chat_template`."""
    t = TEMPLATES[template]
    values = {"OPENERS": t.openers, "BEFORE": t.before, "AFTER": t.after, "END": t.end}
    names = rf"\b({'|'.join(values)})\b"
    return re.sub(names, lambda name: json.dumps(values[name[0]]), CHAT_TEMPLATE)


def _is_chat_template_of(template, jinja):
    """Return whether a text in Jinja is our template, from this version or an earlier one."""
    return f"set openers = {json.dumps(TEMPLATES[template].openers)} -%}}" in (jinja or "")


def _read_chat_template(directory):
    """Return the chat template of a directory, a text in Jinja, or None."""
    path = directory / "chat_template.jinja"  # as in transformers, it overrides tokenizer_config's
    if path.exists():
        check_format(path)
        return path.read_text(encoding="utf-8", errors="replace")
    path = directory / "tokenizer_config.json"
    jinja = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(jinja, list):  # of several, {"name", "template"} each
        for entry in jinja:
            if isinstance(entry, dict) and entry.get("name") == "default":
                jinja = entry.get("template")
    return jinja if isinstance(jinja, str) else None


def read_tokenizer(directory):
    """Return the Tokenizer of a Hugging Face directory, with the template whose special tokens it
    has, else that of its chat template, else human_bot; `notice` says so if this replaces a chat
    template. Raises ValueError if the vocabulary is not GPT-2's or a template's tokens have other
    ids."""

    def read(name, default):
        path = directory / name
        return read_json(path) if path.exists() else default

    # the vocabulary: in tokenizer.json, or in older directories in two files
    path = directory / "tokenizer.json"
    if path.exists():
        fast = read_json(path)
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
    jinja = _read_chat_template(directory)
    by_tokens = [name for name, t in TEMPLATES.items() if t.specials and t.end in added]
    by_jinja = [name for name in TEMPLATES if _is_chat_template_of(name, jinja)]
    tokenizer = Tokenizer([*by_tokens, *by_jinja, "human_bot"][0])
    template = tokenizer.template
    if by_tokens and not tokenizer.special_ids.items() <= added.items():
        raise ValueError(f"{path}: the tokens of template {template} have other ids than here")
    if jinja and not _is_chat_template_of(template, jinja):
        replaced = "the model's own chat template is not one of nanoChatGPT's"
        tokenizer.notice = f"{replaced}: this talks to it in {template}"
    return tokenizer
