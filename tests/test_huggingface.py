"""Hugging Face's files: our tokenizers in transformers, theirs here; and clear refusals of what is
damaged or not a GPT-2."""

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_talk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_tokenizer import EXCHANGE, HUMAN_BOT, PROSE, TOKENIZERS, in_both_templates, plain_text

import chat
import serve
from evaluation.replies import ReplyConfig, load
from model import GPT, GPTConfig
from nanochatgpt import configurator
from nanochatgpt.checkpoint import save_model
from nanochatgpt.huggingface import (
    chat_template,
    read_config,
    read_tokenizer,
    tokenizer_files,
)
from nanochatgpt.tokenizer import TEMPLATES, Template, Tokenizer, vocab_file
from nanochatgpt.weights import match_model, open_tensors
from serving.service import Service

# our tokenizers in transformers


def write_directory(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """What transformers makes of the files of each of our tokenizers: {template: its tokenizer}."""
    from transformers import AutoTokenizer

    tokenizers = {}
    for name in TOKENIZERS:
        folder = write_directory(tmp_path_factory.mktemp(name), tokenizer_files(name))
        tokenizers[name] = AutoTokenizer.from_pretrained(folder)
    return tokenizers


@in_both_templates
@settings(deadline=None, max_examples=50)
@given(text=plain_text)
@example(text=PROSE)
def test_text_is_encoded_as_transformers_encodes_it(tok, hf, text):
    assert hf[tok.template](text, split_special_tokens=True)["input_ids"] == tok.encode(text)


def test_the_text_of_every_token_is_encoded_as_transformers_encodes_it(hf):
    texts = [HUMAN_BOT.decode([i]) for i in range(50256)]
    theirs = hf["human_bot"](texts)["input_ids"]
    assert theirs == [HUMAN_BOT.encode(text) for text in texts]
    # the rest are parts of characters, or never chosen
    assert sum(ids == [i] for i, ids in enumerate(theirs)) > 49_000


@in_both_templates
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_apply_chat_template_gives_the_same_ids(tok, hf, add_generation_prompt):
    many = [EXCHANGE, EXCHANGE[1:2], EXCHANGE[2:4], EXCHANGE[:1], EXCHANGE[1:2] * 3]
    for messages in [*many, *small_talk(20)]:
        theirs = hf[tok.template].apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        assert theirs == tok.render(messages, add_generation_prompt)[0]


@in_both_templates
def test_transformers_has_the_special_tokens_where_we_have_them(tok, hf):
    theirs = hf[tok.template]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tok.eos_id, tok.pad_id)
    assert len(theirs) == tok.n_vocab
    assert [theirs.decode([i]) for i in tok.stop_ids] == [tok.decode([i]) for i in tok.stop_ids]
    assert theirs.decode(tok.render(EXCHANGE)[0]) == tok.decode(tok.render(EXCHANGE)[0])


@in_both_templates
def test_apply_chat_template_masks_what_render_masks(tok, hf):
    """Replies and their end tokens, but not a reply of weight 0."""
    unlearned = [EXCHANGE[0], *EXCHANGE[1:3], {**EXCHANGE[2], "weight": 0}, *EXCHANGE[1:3]]
    empty = [EXCHANGE[1], {"role": "assistant", "content": ""}]
    for messages in [EXCHANGE, EXCHANGE[1:2], unlearned, empty, *small_talk(20)]:
        theirs = hf[tok.template].apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert (theirs["input_ids"], theirs["assistant_masks"]) == tok.render(messages)


@in_both_templates
def test_the_chat_template_takes_parts_and_developers_and_strips_nothing(tok, hf):
    system = {"role": "system", "content": " i like tea.\n"}
    user = {"role": "user", "content": "\n  hello\tyou \n"}
    reply = {"role": "assistant", "content": " hi\n"}
    ids, mask = tok.render([system, user, reply, user])
    parts = [{"type": "text", "text": "\n  hel"}, {"type": "text", "text": "lo\tyou \n"}]
    theirs = hf[tok.template].apply_chat_template(
        [
            {**system, "role": "developer"},
            {**user, "content": parts},
            {**reply, "content": [{"type": "text", "text": " hi\n"}]},
            user,
        ],
        return_assistant_tokens_mask=True,
    )
    assert (theirs["input_ids"], theirs["assistant_masks"]) == (ids, mask)


def test_a_chat_template_may_spell_anything(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    openers = {"system": '\n[END "%}]:', "user": "\n[OPENERS {{é]:", "assistant": "\n[AFTER\\n]:"}
    monkeypatch.setitem(TEMPLATES, "odd", Template(openers, before=" BEFORE "))
    folder = write_directory(tmp_path, tokenizer_files("odd"))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(EXCHANGE[:3], add_generation_prompt=True)["input_ids"]
    assert ids == Tokenizer("odd").render(EXCHANGE[:3], add_generation_prompt=True)[0]
    assert read_tokenizer(folder).template == "odd"


@in_both_templates
def test_the_chat_template_refuses_what_it_cannot_render(tok, hf):
    from jinja2 import UndefinedError

    tool = {"role": "tool", "content": "4"}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
    for messages in ([tool], [*EXCHANGE[:2], tool], [image]):
        with pytest.raises(UndefinedError):
            hf[tok.template].apply_chat_template(messages)


@in_both_templates
def test_the_chat_template_is_the_same_wherever_programs_look_for_it(tmp_path, tok):
    """transformers 5 reads chat_template.jinja, older versions tokenizer_config.json."""
    from transformers import AutoTokenizer

    folder = write_directory(tmp_path, tokenizer_files(tok.template, context=96))
    new = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    old = AutoTokenizer.from_pretrained(folder)
    assert new.chat_template == old.chat_template
    assert new.model_max_length == 96
    # as transformers writes it, it is still known
    new.save_pretrained(folder / "again")
    assert "chat_template" not in (folder / "again" / "tokenizer_config.json").read_text()
    again = read_tokenizer(folder / "again")
    assert (again.template, again.notice) == (tok.template, "")


# tokenizers of others

ADDED = ("[PAD]", "<|End|>", "<|USER|>", "<|SYSTEM|>", "<|ASSISTANT|>")  # Locutusque's


def old_directory(folder, added=()):
    """Write a directory as transformers did before tokenizer.json, with these added tokens."""
    folder.mkdir(exist_ok=True)
    shutil.copy(vocab_file("encoder.json"), folder / "vocab.json")
    shutil.copy(vocab_file("vocab.bpe"), folder / "merges.txt")
    if added:
        ids = {token: 50257 + i for i, token in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    return folder


def new_directory(folder, added=()):
    """Let transformers add these tokens to GPT-2's tokenizer and write a directory."""
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer.from_pretrained(old_directory(folder.with_name("plain")))
    theirs.add_tokens(list(added), special_tokens=True)
    theirs.save_pretrained(folder)
    assert (folder / "tokenizer.json").exists()
    return folder


in_both_forms = pytest.mark.parametrize("directory", [old_directory, new_directory])


@in_both_forms
@pytest.mark.parametrize(
    ("added", "template"), [((), "human_bot"), (ADDED[:1], "human_bot"), (ADDED, "user_assistant")]
)
def test_the_template_of_a_directory_is_the_one_whose_tokens_were_added(
    tmp_path, directory, added, template
):
    assert read_tokenizer(directory(tmp_path / "model", added)).template == template


@in_both_forms
@pytest.mark.parametrize("added", [(ADDED[1], ADDED[0], *ADDED[2:]), ADDED[:4]])
def test_a_templates_tokens_that_are_missing_or_have_other_ids_are_refused(
    tmp_path, directory, added
):
    folder = directory(tmp_path / "model", added)
    with pytest.raises(ValueError, match=r"model.*user_assistant"):
        read_tokenizer(folder)


def test_a_directory_without_a_tokenizer_gets_the_default(tmp_path):
    assert read_tokenizer(tmp_path).template == "human_bot"


@in_both_templates
def test_the_files_of_a_tokenizer_make_the_same_tokenizer(tmp_path, tok):
    folder = write_directory(tmp_path, tokenizer_files(tok.template))
    assert read_tokenizer(folder).template == tok.template


def test_a_template_without_tokens_of_its_own_is_known_by_its_chat_template(tmp_path, monkeypatch):
    """Else a model trained in it would be talked to in another."""
    openers = {"system": "\n[Context]:", "user": "\n[Q]:", "assistant": "\n[A]:"}
    monkeypatch.setitem(TEMPLATES, "qa", Template(openers))
    folder = write_directory(tmp_path, tokenizer_files("qa"))
    assert read_tokenizer(folder).template == "qa"
    (folder / "chat_template.jinja").unlink()  # it comes before tokenizer_config.json
    assert read_tokenizer(folder).template == "qa"
    several = {"chat_template": [{"name": "default", "template": "?"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(several))
    assert read_tokenizer(folder).template == "human_bot"


QA = Template({"system": "\n[Context]:", "user": "\n[Q]:", "assistant": "\n[A]:"})
# as versions before this one wrote it, for human_bot in assets/nano
EARLIER = (
    "{%- set openers = OPENERS -%}{%- for message in messages -%}"
    "{%- set opener = openers[message['role']] -%}{{- (opener | trim if loop.first else opener)"
    " + \" \" + message['content'] + \"\" + (\"<|endoftext|>\" if message['role'] == 'assistant'"
    " else '') -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- openers['assistant'] -}}"
    "{%- endif -%}"
)


@pytest.mark.parametrize("template", ["human_bot", "qa"])
def test_the_chat_template_of_an_earlier_version_is_known(tmp_path, monkeypatch, template):
    monkeypatch.setitem(TEMPLATES, "qa", QA)
    jinja = EARLIER.replace("OPENERS", json.dumps(TEMPLATES[template].openers))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": jinja}))
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.template, tokenizer.notice) == (template, "")


def test_a_chat_template_file_comes_before_the_config_and_the_default_before_others(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(TEMPLATES, "qa", QA)
    ours = [chat_template("human_bot"), chat_template("qa")]
    named = [{"name": n, "template": t} for n, t in zip(("rag", "default"), ours, strict=True)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_tokenizer(tmp_path).template == "qa"
    (tmp_path / "chat_template.jinja").write_text(ours[0])
    assert read_tokenizer(tmp_path).template == "human_bot"


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", CHATML),
        ("tokenizer_config.json", json.dumps({"chat_template": CHATML})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": CHATML}]}),
        ),
    ],
)
@pytest.mark.parametrize(("added", "template"), [((), "human_bot"), (ADDED, "user_assistant")])
def test_a_model_with_a_chat_template_of_its_own_says_in_which_it_is_talked_to(
    tmp_path, file, content, added, template
):
    folder = old_directory(tmp_path / "model", added)
    (folder / file).write_text(content)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.template == template
    assert template in tokenizer.notice


def test_whatever_chats_says_so_on_stderr_and_nano_says_nothing(tmp_path, in_process):
    save_model(GPT(GPTConfig(64, 50257, 1, 2, 8)), Tokenizer(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    knobs = ["--device=cpu", "--max_new_tokens=4"]
    scripts = [
        (chat.Config, chat.Chat),
        (serve.Config, lambda config: Service(config).scheduler.close()),
        (ReplyConfig, lambda config: load(config.init_from, config)),  # evaluate.py
    ]
    for Config, main in scripts:
        run = functools.partial(configurator.run, main, Config)
        done = in_process(run, "chat.py", f"--init_from={tmp_path}", *knobs)
        assert "human_bot" in done.stderr and len(done.stderr.splitlines()) == 1, done
        assert in_process(run, "chat.py", "--init_from=nano", *knobs).stderr == ""


def foreign_vocabularies():
    from tokenizers import models

    swapped = json.loads(vocab_file("encoder.json").read_text(encoding="utf-8"))
    swapped["the"], swapped["and"] = swapped["and"], swapped["the"]
    yield models.BPE(vocab=swapped, merges=[])
    yield models.WordPiece(vocab={"[UNK]": 0, "hello": 1}, unk_token="[UNK]")
    yield models.Unigram([("hello", -1.0), ("world", -2.0)])  # T5, Llama 2: a list, not a dict


def test_a_vocabulary_that_is_not_gpt2s_is_refused(tmp_path):
    import tokenizers

    for model in foreign_vocabularies():
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"tokenizer\.json is not GPT-2's vocabulary"):
            read_tokenizer(tmp_path)


ODD_TOKEN = '{"added_tokens": [{"content": "<|End|>", "id": [1]}], "model": {"vocab": %s}}'
ODD_TOKEN %= vocab_file("encoder.json").read_text()
FOREIGN = ["{}", "[]", "null", '{"hello": 0}', '{"hello": [0]}', "", "{", "[" * 100_000, "\xff"]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_a_damaged_or_foreign_tokenizer_is_refused_by_its_name(tmp_path, name):
    contents = [*FOREIGN, ODD_TOKEN] if name == "tokenizer.json" else FOREIGN
    if name == "added_tokens.json":
        old_directory(tmp_path)
        contents = ["[1]", "null", "", "{", "[" * 100_000, "\xff"]
    for content in contents:
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as refused:
            read_tokenizer(tmp_path)
        assert len(str(refused.value)) < 500


# config.json


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with the config.json of a tiny model, and its weights in three formats."""
    directory = tmp_path_factory.mktemp("tiny")
    save_model(tiny_model(), Tokenizer(), directory)
    (directory / "tokenizer.json").unlink()  # quicker
    weights = load_file(directory / "model.safetensors")
    for kind in ("zip", "legacy"):
        zipped = kind == "zip"
        torch.save(weights, directory / f"{kind}.bin", _use_new_zipfile_serialization=zipped)
    return directory


def tiny_model(device="cpu"):
    with torch.device(device):
        return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8))


@pytest.fixture
def config(tiny, tmp_path):
    """Write config.json with other values, None for a name that is left out; return its path."""

    def write(**changes):
        config = json.loads((tiny / "config.json").read_text()) | changes
        config = {name: value for name, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return write


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "quick_gelu"),
        ("activation_function", "relu"),
        ("n_inner", 100),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"load_in_8bit": True}),
    ],
)
def test_an_option_that_is_not_gpt2s_is_refused_by_its_name(config, option, value):
    with pytest.raises(ValueError, match=rf"config\.json.*{option}="):
        read_config(config(**{option: value}))


def test_an_option_may_be_written_out_as_its_default_or_left_out(config):
    expected = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)
    written = config(n_inner=32, tie_word_embeddings=True, layer_norm_epsilon=0.00001)
    assert read_config(written) == expected
    bare = config(model_type=None, activation_function=None, layer_norm_epsilon=None)
    assert read_config(bare) == expected


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_config_without_a_sound_shape_is_refused(config, key):
    for value in ("12", None, 0, -1, 1.5, True, 1 << 24, 10**30):
        with pytest.raises(ValueError, match=rf"config\.json.*{key}"):
            read_config(config(**{key: value}))
    with pytest.raises(ValueError, match=r"config\.json.*n_embd"):
        read_config(config(n_head=3))


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"gpt2"', "\xff\xfe", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


# weights


def assert_refused_as(match, path, content=None):
    """The file is refused, after `content` (bytes or tensors) is written to it."""
    if isinstance(content, dict):
        tensors = {name: tensor.contiguous().clone() for name, tensor in content.items()}
        save_file(tensors, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        match_model(open_tensors(path), tiny_model("meta"))


def test_missing_extra_misshapen_and_integer_tensors_are_named(tiny, tmp_path):
    tensors = load_file(tiny / "model.safetensors")
    lacking = dict(tensors)
    del lacking["transformer.h.1.mlp.c_fc.bias"]
    transposed = tensors["transformer.h.0.attn.c_attn.weight"].T
    integer = torch.zeros(8, dtype=torch.int32)
    four_bits = torch.zeros(8, dtype=torch.uint8)  # of a torch before 2.10, which cannot copy them
    if torch.__version__ >= (2, 10):
        four_bits = four_bits[:4].view(torch.float4_e2m1fn_x2)  # two in a byte
    for wrong, words in (
        (lacking, r"lacks .*transformer\.h\.1\.mlp\.c_fc\.bias"),
        (
            tensors | {"transformer.h.0.adapter.weight": torch.zeros(1, 8)},
            r"has .*transformer\.h\.0\.adapter\.weight",
        ),
        (tensors | {"score.weight": torch.zeros(1, 8)}, "reward model"),
        (
            tensors | {"transformer.h.0.attn.c_attn.weight": transposed},
            r"transformer\.h\.0\.attn\.c_attn\.weight .*\(24, 8\).*\(8, 24\)",
        ),
        (tensors | {"transformer.ln_f.bias": integer}, r"transformer\.ln_f\.bias.*I32"),
        (tensors | {"transformer.ln_f.bias": four_bits}, r"transformer\.ln_f\.bias.*(F4|U8)"),
    ):
        assert_refused_as(rf"model\.safetensors.*{words}", tmp_path / "model.safetensors", wrong)


@pytest.mark.parametrize("change", ["n_layer", "vocab_size", "block_size"])
def test_weights_of_another_config_are_refused(tiny, change):
    for n in (1, 3):
        config = tiny_model().config
        setattr(config, change, n)
        with torch.device("meta"):
            other = GPT(config)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            match_model(open_tensors(tiny / "model.safetensors"), other)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    path = tmp_path / "pytorch_model.bin"
    torch.save({"transformer.wte.weight": Malicious()}, path)
    assert_refused_as(r"pytorch_model\.bin", path)
    assert_refused_as(r"pytorch_model\.bin", path, pickle.dumps(Malicious(), protocol=2))
    assert not (tmp_path / "it ran").exists()


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content in ([1, 2], torch.zeros(3), {1: torch.zeros(3)}, {"wte.weight": 1.0}, {}):
        torch.save(content, path)
        assert_refused_as(r"pytorch_model\.bin", path)


def test_weights_that_may_not_be_read_are_not_called_missing(tiny, tmp_path):
    weights = Path(shutil.copy(tiny / "model.safetensors", tmp_path))
    weights.chmod(0)
    if os.access(weights, os.R_OK):
        pytest.skip("root reads what it likes")
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        match_model(open_tensors(weights), tiny_model("meta"))


@pytest.mark.parametrize("kind", ["model.safetensors", "zip.bin", "legacy.bin"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_cut_short_anywhere_are_refused(tiny, kind, data):
    whole = (tiny / kind).read_bytes()
    n = data.draw(st.integers(0, 200) | st.integers(0, len(whole) - 1))
    assert_refused_as("cut", (tiny / "cut").with_suffix(Path(kind).suffix), whole[:n])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_header_of_the_weights_is_refused(tiny, data):
    content = bytearray((tiny / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")  # the header's length, then that much JSON
    metadata = range(content.index(b'"__metadata__"'), content.index(b"}"))
    index = data.draw(st.integers(0, end - 1).filter(lambda index: index not in metadata))
    others = {*range(256)} - {content[index], *b" \t\n\r"}
    content[index] = data.draw(st.sampled_from(sorted(others)))
    assert_refused_as("damaged", tiny / "damaged.safetensors", bytes(content))


def test_a_sound_file_of_each_format_is_read(tiny):
    for kind in ("model.safetensors", "zip.bin", "legacy.bin"):
        read = match_model(open_tensors(tiny / kind), tiny_model("meta"))
        for name, tensor in load_file(tiny / "model.safetensors").items():
            assert torch.equal(read(name), tensor)
