"""Weights in: wherever and however they are stored. Weights out: whole, or not at all."""

import errno
import json
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import ROOT, largest_file
from forked import Forked
from safetensors.torch import load_file, save_file
from test_huggingface import ADDED, new_directory
from test_tokenizer import EXCHANGE

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import NANO, load_model, save_model
from nanochatgpt.huggingface import tokenizer_files
from nanochatgpt.tokenizer import TEMPLATES, Template, Tokenizer

FILES = {"config.json", "generation_config.json", "model.safetensors"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
IDX = torch.arange(0, 50257, 4000)[None]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(A directory as transformers writes it, of a small model; its logits for IDX.)"""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    directory = tmp_path_factory.mktemp("hf")
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, model(IDX).logits


@pytest.fixture
def directory(theirs, tmp_path):
    return Path(shutil.copytree(theirs[0], tmp_path / "hf"))


@pytest.fixture
def logits(theirs):
    return theirs[1]


def read(directory):
    return load_file(directory / "model.safetensors")


def assert_loads(init_from, expected):
    model, tokenizer = load_model(str(init_from))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDX)[0], expected, atol=1e-4, rtol=0)
    return model, tokenizer


# weights in


def as_base_model(tensors):
    """Without the prefix and with causal masks: as OpenAI's weights are on the hub."""
    base = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for i in range(2):
        base[f"h.{i}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        base[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return base


def with_masks(tensors):
    mask = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
    return tensors | {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)}


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize("stored", [dict, as_base_model, with_masks, with_head])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "old pytorch_model.bin"]
)
def test_weights_load_however_they_were_stored(directory, logits, stored, file):
    tensors = stored(read(directory))
    if file == "model.safetensors":
        save_file(tensors, directory / file)
    else:
        (directory / "model.safetensors").unlink()
        zipped = not file.startswith("old")
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_loads(directory, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_load_in_the_dtype_asked_for_whatever_theirs_is(directory, dtype):
    half = {name: tensor.to(dtype) for name, tensor in read(directory).items()}
    save_file(half, directory / "model.safetensors")
    for wanted in (torch.float32, torch.bfloat16):
        model, _ = load_model(str(directory), dtype=wanted)
        loaded = model.state_dict()
        for name, tensor in half.items():
            assert torch.equal(loaded[name], tensor.to(wanted))


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


def test_a_model_with_locutusques_added_tokens_comes_with_the_template_user_assistant(
    hf_gpt2, tmp_path
):
    from transformers import AutoTokenizer

    new_directory(tmp_path, ADDED)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    hf = hf_gpt2()
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    hf.save_pretrained(tmp_path)
    model, ours = load_model(str(tmp_path))
    assert model.config.vocab_size == 50262
    assert ours.template == "user_assistant"
    ids = [50259, 23748, 220, 50261]
    assert tokenizer("<|USER|> hello <|ASSISTANT|>").input_ids == ids
    assert ours.render([{"role": "user", "content": "hello"}], True)[0] == ids
    idx = torch.tensor([[50257, 50258, 50259, 50260, 50261, 23748]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


def test_a_model_whose_tokenizer_makes_ids_beyond_its_embeddings_is_refused(directory):
    write_files(directory, "user_assistant")
    with pytest.raises(ValueError, match=rf"{directory}: .*50257.*50262"):
        load_model(str(directory))


def write_files(directory, template):
    for name, text in tokenizer_files(template).items():
        (directory / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(str(directory))
    (directory / name).mkdir()
    with pytest.raises(OSError, match=name):
        load_model(str(directory))


# from the hub


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache and an empty one of ours; put(repo, *files) places files in the
    former as huggingface_hub does."""
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
    if name == "pytorch_model.bin":
        torch.save(read(directory), directory / name)
        (directory / "model.safetensors").unlink()
    hf_cache("some-org/some-model", *directory.iterdir())
    assert_loads("some-org/some-model", logits)


def test_a_model_of_the_hub_talks_in_the_template_that_it_was_trained_in(
    hf_cache, directory, monkeypatch
):
    """Though it has no tokens of its own: its files say so."""
    openers = {"system": "\n[Context]:", "user": "\n[Q]:", "assistant": "\n[A]:"}
    monkeypatch.setitem(TEMPLATES, "qa", Template(openers))
    write_files(directory, "qa")
    hf_cache("some-org/some-model", *directory.iterdir())
    assert load_model("some-org/some-model")[1].template == "qa"


def test_a_tokenizer_may_be_in_another_cache_than_the_weights(hf_cache, model, tmp_path):
    save_model(model, Tokenizer("user_assistant"), tmp_path / "new")
    ours = tmp_path / "cache" / "nanochatgpt" / "models" / "some-org" / "some-model"
    ours.mkdir(parents=True)
    (tmp_path / "new" / "tokenizer.json").rename(ours / "tokenizer.json")
    hf_cache("some-org/some-model", *(tmp_path / "new").glob("[cm]*"))
    assert load_model("some-org/some-model")[1].template == "user_assistant"


def test_the_short_names_stand_for_the_published_repositories(hf_cache, directory):
    hf_cache("openai-community/gpt2-medium", directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"openai-community--gpt2-medium.*model\.safetensors"):
        load_model("gpt2-medium")


def test_a_model_of_the_hub_that_is_not_here_is_named_with_the_remedy(hf_cache):
    with pytest.raises(FileNotFoundError, match=r"some-org/some-model.*HF_HUB_OFFLINE"):
        load_model("some-org/some-model")


@pytest.mark.parametrize("init_from", ["gpt3", "random:gpt3", "runs/of/mine", "out/chat"])
def test_an_unknown_name_is_refused_with_the_names_that_there_are(tmp_path, monkeypatch, init_from):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"init_from={init_from}.*gpt2-medium"):
        load_model(init_from)


# weights out


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(64, 50262, 2, 2, 16))


def test_a_saved_directory_has_exactly_the_files_of_a_hugging_face_model(model, tmp_path):
    save_model(model, Tokenizer(), tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    shapes = {name: tensor.shape for name, tensor in read(tmp_path / "new" / "folder").items()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}


def test_a_saved_config_has_what_llama_cpps_converter_asks_for(model, tmp_path):
    """Its conversion/gpt2.py reads these by name, and fails without n_ctx, which transformers no
    longer writes."""
    save_model(model, Tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    c = model.config
    expected = {"n_ctx": c.block_size, "n_embd": c.n_embd, "n_head": c.n_head, "n_layer": c.n_layer}
    assert config == config | expected | {"layer_norm_epsilon": 1e-5, "vocab_size": c.vocab_size}
    nano = json.loads((NANO / "config.json").read_text())
    assert nano["n_ctx"] == nano["n_positions"]


@pytest.mark.parametrize("template", ["human_bot", "user_assistant"])
def test_transformers_loads_a_saved_directory_and_talks_as_we_do(model, tmp_path, template):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = Tokenizer(template)
    save_model(model, tokenizer, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = EXCHANGE[:4]
    ids = tokenizer.render(messages, add_generation_prompt=True)[0]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)
    for config in (GenerationConfig.from_pretrained(tmp_path), hf.generation_config, hf.config):
        assert config.eos_token_id == tokenizer.eos_id
        assert config.pad_token_id == tokenizer.pad_id
    ours, reloaded = load_model(str(tmp_path))
    assert ours.config == model.config
    assert reloaded.template == template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_saved_bit_for_bit_in_their_own_dtype(model, tmp_path, dtype):
    model.to(dtype)
    save_model(model, Tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_model(str(tmp_path), dtype=dtype)[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def tiny_model():
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=8))


@pytest.fixture
def old_and_new(tmp_path):
    """Directories with two checkpoints."""
    for name in ("old", "new"):
        save_model(tiny_model(), Tokenizer(), tmp_path / name)
    return [tmp_path / "old", tmp_path / "new"]


def assert_old_then_new(directories, old_and_new):
    """Each directory is one of the two, whole: the first ones the old, the last the new."""
    versions = []
    for directory in directories:
        whole = []
        for checkpoint in old_and_new:
            pairs = [((directory / name), (checkpoint / name)) for name in FILES]
            whole.append(all(a.read_bytes() == b.read_bytes() for a, b in pairs))
        assert sum(whole) == 1
        versions.append(whole.index(True))
    assert versions == sorted(versions)
    assert versions.count(0) >= len(FILES)
    assert versions[-1] == 1


# what changes files; safetensors has the second
CHANGES = {"open", "serialize_file", "rename", "replace", "unlink"}


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
    """Copy `old` to out/0, out/1, ... and save `new` over the copies, in processes killed at change
    0, 1, ..."""
    model = tiny_model()
    model.load_state_dict(read(Path(new)), strict=False)
    tokenizer_files("human_bot")  # made once: it takes a while
    for number in count():
        shutil.copytree(old, f"{out}/{number}")
        if not (child := os.fork()):
            call_at_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save_model(model, Tokenizer(), f"{out}/{number}")
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return


def test_a_save_killed_at_any_change_leaves_the_old_checkpoint_or_the_new_one(
    old_and_new, tmp_path
):
    # a process with one thread does the forking: a fork of this one may wait for ever for a lock
    # of another thread
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    code += "import test_checkpoint; test_checkpoint.save_killed_at_each_change(*sys.argv[1:])"
    done = Forked(["-c", code, *old_and_new, tmp_path / "out"], tmp_path).wait()
    assert done.returncode == 0, done.stderr
    saves = len(list((tmp_path / "out").iterdir()))
    assert_old_then_new([tmp_path / "out" / str(i) for i in range(saves)], old_and_new)


def test_a_save_that_fails_at_any_change_leaves_a_whole_checkpoint_and_nothing_else(
    old_and_new, tmp_path
):
    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    old, new = old_and_new
    model = tiny_model()
    model.load_state_dict(read(new), strict=False)
    saved = []
    failed = True
    while failed:
        saved.append(tmp_path / "out" / str(len(saved)))
        shutil.copytree(old, saved[-1])
        try:
            call_at_change(len(saved) - 1, fail)
            save_model(model, Tokenizer(), saved[-1])
            failed = False
        except OSError as error:
            assert error.errno == errno.EIO
        finally:
            sys.setprofile(None)
        assert {path.name for path in saved[-1].iterdir()} == FILES
    assert_old_then_new(saved, old_and_new)


def test_a_save_removes_what_a_killed_one_left(old_and_new):
    old, _ = old_and_new
    (old / "model.safetensors.part").write_bytes(b"half")
    save_model(tiny_model(), Tokenizer(), old)
    assert {path.name for path in old.iterdir()} == FILES


@pytest.mark.parametrize(
    ("file", "limit"), [("tokenizer.json", 100_000), ("model.safetensors", 3_000_000)]
)
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_what_was_there(
    model, old_and_new, file, limit
):
    old, _ = old_and_new
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(OSError, match=file), largest_file(limit):
        save_model(model, Tokenizer(), old)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_file_with_the_name_of_the_directory_is_named(model, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="out"):
        save_model(model, Tokenizer(), tmp_path / "out")
