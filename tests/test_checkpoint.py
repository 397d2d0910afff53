"""Weights in: whatever transformers writes, and clear refusals of the rest. Weights out: whole, or not at all."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, largest_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
)

import chat
from model import GPT, PRESETS, GPTConfig
from nanochatgpt import configurator
from nanochatgpt.checkpoint import NANO, load_model, save_model
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.huggingface import tokenizer_files
from nanochatgpt.tokenizer import TEMPLATES, Template, Tokenizer, vocab_file

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TALK = [
    {"role": "system", "content": "i like tea."},
    {"role": "user", "content": "hello, how are you?"},
    {"role": "assistant", "content": "i am fine."},
    {"role": "user", "content": "what now"},
]


@pytest.fixture
def directory(hf_gpt2, tmp_path):
    """A directory as transformers writes it, of a small model with 90 tokens."""
    hf_gpt2(vocab_size=90, initializer_range=0.3).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def logits(directory):
    """What transformers computes from it, for IDX."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(IDX).logits


IDX = torch.arange(0, 90, 7)[None]


def read(directory):
    return load_file(directory / "model.safetensors")


def write(directory, tensors):
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({name: value for name, value in config.items() if value != "absent"})
    )


def assert_loads(init_from, expected, **tolerance):
    model, tokenizer = load_model(str(init_from))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(IDX)[0], expected, **(tolerance or {"atol": 1e-4, "rtol": 0})
        )
    return model, tokenizer


def as_base_model(tensors):
    """Without the prefix and with the causal mask in each layer: as OpenAI's weights stand on the hub."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def with_masks(tensors):
    masks = {
        f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8)
        for i in range(2)
    }
    return tensors | masks


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.parametrize("stored", [dict, as_base_model, with_masks, with_head])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "old pytorch_model.bin"]
)
def test_weights_load_however_they_were_stored(directory, logits, stored, file):
    tensors = stored(read(directory))
    if file == "model.safetensors":
        write(directory, tensors)
    else:
        (directory / "model.safetensors").unlink()
        zipped = not file.startswith("old")
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_loads(directory, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(directory, dtype):
    half = {name: tensor.to(dtype) for name, tensor in read(directory).items()}
    write(directory, half)
    model, _ = load_model(str(directory))
    loaded = model.state_dict()
    for name, tensor in half.items():
        assert torch.equal(loaded[name], tensor.float())


def test_weights_load_in_the_dtype_asked_for(directory):
    model, _ = load_model(str(directory), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_loaded_model_can_be_trained_with_its_head_tied_and_its_file_let_go(directory):
    before = (directory / "model.safetensors").read_bytes()
    model, _ = load_model(str(directory), dropout=0.25)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.requires_grad for p in model.parameters())
    assert model.num_parameters() == sum(tensor.numel() for tensor in read(directory).values())
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (directory / "model.safetensors").read_bytes() == before


def make_tokenizer(directory, *added):
    """Let transformers write GPT-2's tokenizer to the directory, with these tokens added in this order."""
    shutil.copy(vocab_file("encoder.json"), directory / "vocab.json")
    shutil.copy(vocab_file("vocab.bpe"), directory / "merges.txt")
    tokenizer = GPT2Tokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(directory)
    return tokenizer


LOCUTUSQUE = ("[PAD]", "<|End|>", "<|USER|>", "<|SYSTEM|>", "<|ASSISTANT|>")


def test_a_model_with_locutusques_added_tokens_comes_with_the_template_user_assistant(
    hf_gpt2, tmp_path
):
    theirs = make_tokenizer(tmp_path, *LOCUTUSQUE)
    hf = hf_gpt2()
    hf.resize_token_embeddings(len(theirs), mean_resizing=False)
    hf.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert model.config.vocab_size == 50262
    assert tokenizer.template == "user_assistant"
    assert theirs("<|USER|> hello <|ASSISTANT|>").input_ids == [50259, 23748, 220, 50261]
    assert tokenizer.render([{"role": "user", "content": "hello"}], True)[0] == [
        50259,
        23748,
        220,
        50261,
    ]
    idx = torch.tensor([[50257, 50258, 50259, 50260, 50261, 23748]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)
    talk = chat.Chat(
        configurator.parse(chat.Config, [f"--init_from={tmp_path}", "--max_new_tokens=4"])
    )
    assert (talk.tokenizer.template, talk.config.top_k, talk.config.top_p) == (
        "user_assistant",
        35,
        0.80,
    )
    "".join(talk.reply("hello"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_added_tokens_with_other_ids_are_refused(directory):
    make_tokenizer(directory, *LOCUTUSQUE[1:], LOCUTUSQUE[0])
    with pytest.raises(ValueError, match="user_assistant have other ids"):
        load_model(str(directory))


def test_a_directory_with_gpt2s_own_tokenizer_or_none_has_the_template_human_bot(directory):
    assert load_model(str(directory))[1].template == "human_bot"
    make_tokenizer(directory)
    assert load_model(str(directory))[1].template == "human_bot"


ODD_TOKEN = '{"added_tokens": [{"content": "<|End|>", "id": [1]}], "model": {"vocab": %s}}'


@pytest.mark.parametrize(
    "content", ['{"added', "{}", "[]", "", "[" * 100_000, "\xff" * 10_000, ODD_TOKEN]
)
def test_a_damaged_tokenizer_is_refused_by_its_name(directory, content):
    content = content.replace("%s", vocab_file("encoder.json").read_text())
    (directory / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer\.json") as refused:
        load_model(str(directory))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("preset", PRESETS)
def test_random_presets_have_the_shape_and_need_no_file(preset):
    with torch.device("meta"):
        model, tokenizer = load_model(
            f"random:{preset}", device="meta", dtype=torch.bfloat16, dropout=0.1
        )
    assert model.config == GPTConfig(**PRESETS[preset], dropout=0.1)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert tokenizer.template == "human_bot"


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and an empty one of ours; put(repo, *files) places files as huggingface_hub does."""
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(repo, *files, revision="0123abc"):
        folder = tmp_path / "hf_home" / "hub" / f"models--{repo.replace('/', '--')}"
        for path in (folder / "refs", folder / "blobs", folder / "snapshots" / revision):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
        for file in files:
            file.rename(folder / "blobs" / file.name)
            (folder / "snapshots" / revision / file.name).symlink_to(
                Path("../../blobs") / file.name
            )

    return put


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_in_the_hugging_face_cache_loads_without_a_network(
    hf_cache, directory, logits, name
):
    make_tokenizer(directory, *LOCUTUSQUE)
    if name == "pytorch_model.bin":
        torch.save(read(directory), directory / name)
        (directory / "model.safetensors").unlink()
    hf_cache("some-org/some-model", *directory.iterdir())
    _, tokenizer = assert_loads("some-org/some-model", logits)
    assert tokenizer.template == "user_assistant"


def test_a_model_of_the_hub_talks_in_the_template_that_it_was_trained_in(
    hf_cache, directory, tmp_path, monkeypatch
):
    """Though it has no tokens of its own: its files say so."""
    openers = {"system": "\n[Context]:", "user": "\n[Q]:", "assistant": "\n[A]:"}
    monkeypatch.setitem(TEMPLATES, "qa", Template(openers, " ", "", "<|endoftext|>", ()))
    for name, text in tokenizer_files("qa").items():
        (directory / name).write_text(text)
    hf_cache("some-org/some-model", *directory.iterdir())
    assert load_model("some-org/some-model")[1].template == "qa"


def test_a_tokenizer_is_found_where_the_other_files_are_not(hf_cache, directory, tmp_path):
    make_tokenizer(directory, *LOCUTUSQUE)
    ours = tmp_path / "cache" / "nanochatgpt" / "models" / "some-org" / "some-model"
    ours.mkdir(parents=True)
    (directory / "tokenizer.json").rename(ours / "tokenizer.json")
    hf_cache("some-org/some-model", directory / "config.json", directory / "model.safetensors")
    assert load_model("some-org/some-model")[1].template == "user_assistant"


def test_the_short_names_stand_for_the_published_repositories(hf_cache, directory):
    hf_cache("openai-community/gpt2-medium", directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"gpt2-medium.*lacks the tensor transformer\.h\.10\."):
        load_model("gpt2-medium")


def test_a_model_of_the_hub_that_is_not_here_gives_one_clear_error(script, tmp_path):
    done = script("sample.py", "--init_from=some-org/some-model", env={"HF_HOME": str(tmp_path)})
    assert_refused(done, "some-org/some-model", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("init_from", ["gpt3", "random:gpt3", "runs/of/mine"])
def test_an_unknown_name_is_refused_with_the_names_that_there_are(tmp_path, monkeypatch, init_from):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"init_from={init_from}.*gpt2-medium"):
        load_model(init_from)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "gelu"),
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
def test_an_option_that_is_not_gpt2s_is_refused_by_its_name(directory, option, value):
    edit_config(directory, **{option: value})
    with pytest.raises(ValueError, match=rf"config\.json.*{option}="):
        load_model(str(directory))


def test_an_option_may_be_written_out_as_its_default(directory, logits):
    edit_config(directory, n_inner=128, tie_word_embeddings=True, layer_norm_epsilon=0.00001)
    assert_loads(directory, logits)
    edit_config(
        directory, model_type="absent", activation_function="absent", layer_norm_epsilon="absent"
    )
    assert_loads(directory, logits)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
@pytest.mark.parametrize("value", ["absent", "12", None, 0, -1, 1.5, 10**9, 2**62, 10**30])
def test_a_config_without_a_sound_shape_is_refused(directory, key, value):
    edit_config(directory, **{key: value})
    with pytest.raises(ValueError, match=f"{key}|config"):
        load_model(str(directory))


def test_a_config_of_very_many_layers_or_heads_is_refused_at_once(directory):
    for key, value in (("n_layer", 1 << 24), ("n_head", 3)):
        edit_config(directory, **{key: value})
        with pytest.raises(ValueError, match=str(directory)):
            load_model(str(directory))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"gpt2"', "\xff\xfe", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(directory, content):
    (directory / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(str(directory))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(str(directory))
    (directory / name).mkdir()
    with pytest.raises(OSError, match=name):
        load_model(str(directory))


def test_weights_that_may_not_be_read_are_not_called_missing(directory):
    weights = directory / "model.safetensors"
    weights.chmod(0)
    if os.access(weights, os.R_OK):
        pytest.skip("root reads what it likes")
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        load_model(str(directory))


def test_missing_extra_misshapen_and_integer_tensors_are_named(directory):
    tensors = read(directory)
    lacking = {
        name: tensor for name, tensor in tensors.items() if name != "transformer.h.1.mlp.c_fc.bias"
    }
    extra = tensors | {"classifier.weight": torch.zeros(1, 32)}
    scoring = tensors | {"score.weight": torch.zeros(1, 32)}
    transposed = tensors | {
        "transformer.h.0.attn.c_attn.weight": tensors["transformer.h.0.attn.c_attn.weight"].T
    }
    integer = tensors | {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int32)}
    four_bits = tensors | {
        "transformer.ln_f.bias": torch.zeros(16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    }
    for wrong, words in (
        (lacking, r"lacks the tensor transformer\.h\.1\.mlp\.c_fc\.bias"),
        (extra, r"has the tensor .*classifier\.weight"),
        (scoring, "is a reward model"),
        (
            transposed,
            r"transformer\.h\.0\.attn\.c_attn\.weight has shape \(96, 32\), its config says \(32, 96\)",
        ),
        (integer, r"transformer\.ln_f\.bias.*I32"),
        (four_bits, r"transformer\.ln_f\.bias.*F4"),
    ):
        write(directory, wrong)
        with pytest.raises(ValueError, match=words):
            load_model(str(directory))


@pytest.mark.parametrize(
    "change", [{"n_layer": 1}, {"n_layer": 3}, {"vocab_size": 91}, {"n_positions": 64}]
)
def test_weights_of_another_config_are_refused(directory, change):
    edit_config(directory, **change)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(str(directory))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(directory, tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save({"transformer.wte.weight": Malicious()}, path)
    with pytest.raises(ValueError, match="run code"):
        load_model(str(directory))
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(str(directory))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {1: torch.zeros(3)}, {"wte.weight": 1.0}, {}]
)
def test_a_pickle_that_is_no_state_dict_is_refused(directory, content):
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(str(directory))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory without weights, and beside it the weights of a tiny model in three formats."""
    directory = tmp_path_factory.mktemp("tiny")
    save_model(GPT(GPTConfig(16, 50, 1, 2, 8)), Tokenizer(), directory / "model")
    (directory / "model" / "tokenizer.json").unlink()  # quicker
    tensors = read(directory / "model")
    (directory / "model" / "model.safetensors").rename(directory / "safetensors")
    for kind in ("zip", "legacy"):
        torch.save(tensors, directory / kind, _use_new_zipfile_serialization=kind == "zip")
    return directory


def assert_refused_as(name, content, directory):
    path = directory / "model" / name
    path.write_bytes(content)
    try:
        with pytest.raises(ValueError, match=name):
            load_model(str(directory / "model"))
    finally:
        path.unlink()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_cut_short_anywhere_are_refused(tiny, kind, data):
    whole = (tiny / kind).read_bytes()
    n = data.draw(st.integers(0, 200) | st.integers(0, len(whole) - 1))
    assert_refused_as(
        "model.safetensors" if kind == "safetensors" else "pytorch_model.bin", whole[:n], tiny
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_header_of_the_weights_is_refused(tiny, data):
    content = bytearray((tiny / "safetensors").read_bytes())
    end = 8 + int.from_bytes(
        content[:8], "little"
    )  # of the header: its length, then that much JSON
    metadata = range(content.index(b'"__metadata__"'), content.index(b"}"))
    at = data.draw(st.integers(0, end - 1).filter(lambda at: at not in metadata))
    content[at] = data.draw(
        st.integers(0, 255).filter(lambda byte: byte != content[at] and byte not in b" \t\n\r")
    )
    assert_refused_as("model.safetensors", bytes(content), tiny)


# weights out


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(64, 50262, 2, 2, 16))


def test_a_saved_directory_has_exactly_the_files_of_a_hugging_face_model(model, tmp_path):
    save_model(model, Tokenizer(), tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    tensors = read(tmp_path / "new" / "folder")
    assert {name: t.shape for name, t in tensors.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_a_saved_config_has_what_llama_cpps_converter_asks_for(model, tmp_path):
    """Its conversion/gpt2.py reads these by name, and fails without n_ctx, which transformers no longer writes."""
    save_model(model, Tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    c = model.config
    expected = {"n_ctx": c.block_size, "n_embd": c.n_embd, "n_head": c.n_head, "n_layer": c.n_layer}
    assert config == config | expected | {"layer_norm_epsilon": 1e-5, "vocab_size": c.vocab_size}
    nano = json.loads((NANO / "config.json").read_text())
    assert nano["n_ctx"] == nano["n_positions"]


@pytest.mark.parametrize("template", ["human_bot", "user_assistant"])
def test_transformers_loads_a_saved_directory_and_talks_as_we_do(model, tmp_path, template):
    tokenizer = Tokenizer(template)
    save_model(model, tokenizer, tmp_path)
    hf, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    ids = tokenizer.render(TALK, add_generation_prompt=True)[0]
    text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.decode(ids)
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True).input_ids == ids
    assert theirs.decode(ids) == text
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)
    generation = GenerationConfig.from_pretrained(tmp_path)
    for settings_ in (generation, hf.generation_config, hf.config):
        assert settings_.eos_token_id == tokenizer.eos_id
        assert settings_.pad_token_id == tokenizer.pad_id
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    ours, reloaded = load_model(str(tmp_path))
    assert ours.config == model.config
    assert reloaded.template == template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_saved_bit_for_bit_in_their_own_dtype(model, tmp_path, dtype):
    model.to(dtype)
    save_model(model, Tokenizer(), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == dtype
    loaded = load_model(str(tmp_path), dtype=dtype)[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


@pytest.fixture
def old_and_new():
    return [GPT(GPTConfig(16, 50, 1, 2, 8)) for _ in range(2)]


@pytest.fixture
def old_directory(old_and_new, tmp_path):
    save_model(old_and_new[0], Tokenizer(), tmp_path / "old")
    return tmp_path / "old"


def which(directory, models):
    """Return the number of the one model that the directory holds."""
    loaded = load_model(str(directory))[0].state_dict()
    matches = [
        all(torch.equal(loaded[name], t) for name, t in m.state_dict().items()) for m in models
    ]
    assert sum(matches) == 1
    return matches.index(True)


CHANGES = {
    "open",
    "serialize_file",
    "rename",
    "replace",
    "unlink",
}  # of files; safetensors has the second


def call_at_change(number, action):
    """Call `action` just before this thread makes change `number`, counted from 0."""
    numbers = count()

    def hook(_frame, event, function):
        if (
            event != "c_call"
            or function.__name__ not in CHANGES
            or isinstance(function.__self__, str)
        ):
            return
        if next(numbers) == number:
            sys.setprofile(None)
            action()

    sys.setprofile(hook)


def save_killed_at_each_change(old, new, out):
    """Copy `old` to out/0, out/1, ... and save `new` over the copies, in processes killed at change 0, 1, ..."""
    model, tokenizer = load_model(new)
    files = tokenizer_files(tokenizer.template)
    tokenizer.files = lambda: files  # made once: it takes a while
    for number in count():
        shutil.copytree(old, f"{out}/{number}")
        if not (child := os.fork()):
            call_at_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save_model(model, tokenizer, f"{out}/{number}")
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return


def assert_old_then_new(found):
    assert found == sorted(found)
    assert found.count(0) >= len(FILES)
    assert found[-1] == 1


def test_a_save_killed_at_any_change_leaves_the_old_checkpoint_or_the_new_one(
    old_directory, old_and_new, tmp_path
):
    save_model(old_and_new[1], Tokenizer(), tmp_path / "new")
    # a process with one thread does the forking: of this one, a fork may wait for ever for a lock of another thread
    paths = [str(old_directory), str(tmp_path / "new"), str(tmp_path / "out")]
    code = "import sys, test_checkpoint; test_checkpoint.save_killed_at_each_change(*sys.argv[1:])"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *paths], env=env, check=True, timeout=120)
    saves = len(list((tmp_path / "out").iterdir()))
    assert_old_then_new(
        [which(tmp_path / "out" / str(number), old_and_new) for number in range(saves)]
    )


def test_a_save_that_fails_at_any_change_leaves_a_whole_checkpoint_and_nothing_else(
    old_directory, old_and_new, tmp_path, monkeypatch
):
    tokenizer = Tokenizer()
    files = tokenizer_files(tokenizer.template)
    monkeypatch.setattr(tokenizer, "files", lambda: files)  # made once: it takes a while

    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    found, failed = [], True
    while failed:
        shutil.copytree(old_directory, tmp_path / "out")
        try:
            call_at_change(len(found), fail)
            save_model(old_and_new[1], tokenizer, tmp_path / "out")
            failed = False
        except OSError as error:
            assert error.errno == errno.EIO
        finally:
            sys.setprofile(None)
        found.append(which(tmp_path / "out", old_and_new))
        assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
        shutil.rmtree(tmp_path / "out")
    assert_old_then_new(found)


def test_a_save_removes_what_a_killed_one_left(old_directory, old_and_new):
    (old_directory / "model.safetensors.part").write_bytes(b"half")
    save_model(old_and_new[1], Tokenizer(), old_directory)
    assert which(old_directory, old_and_new) == 1
    assert {path.name for path in old_directory.iterdir()} == FILES


@pytest.mark.parametrize(
    ("file", "limit", "vocab_size"),
    [("tokenizer.json", 100_000, 60), ("model.safetensors", 3_000_000, 50262)],
)
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_what_was_there(
    old_directory, old_and_new, file, limit, vocab_size
):
    model = GPT(
        GPTConfig(16, vocab_size, 2, 2, 16)
    )  # of another shape, which the old config does not fit
    with pytest.raises(OSError, match=file), largest_file(limit):
        save_model(model, Tokenizer(), old_directory)
    assert which(old_directory, old_and_new) == 0
    assert {path.name for path in old_directory.iterdir()} == FILES


def test_a_file_in_the_place_of_the_directory_is_named(model, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="out"):
        save_model(model, Tokenizer(), tmp_path / "out")


# the machine


def test_auto_takes_the_fastest_device_that_is_there():
    expected = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    assert pick_device("auto") == expected
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["tpu", "", "cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device={name} .*cpu"):
        pick_device(name)


def test_auto_is_float32_off_cuda_and_sixteen_bits_on_it():
    assert pick_dtype("auto", "cpu") == pick_dtype("auto", "mps") == torch.float32
    assert pick_dtype("auto", "cuda:0") in (torch.bfloat16, torch.float16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert pick_dtype(str(dtype).removeprefix("torch."), "cpu") == dtype


@pytest.mark.parametrize("name", ["float64", "int8", "bf16", "nn", ""])
def test_a_dtype_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"dtype={name} .*bfloat16"):
        pick_dtype(name, "cpu")
