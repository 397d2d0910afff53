"""Weights however other programs stored them: all that transformers can save, wrappers' names,
nanoGPT's checkpoints; and whatever is not a model is refused by what it is."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_refused
from safetensors.torch import load_file, save_file
from test_files import Server
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import chat
import train
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel

IDX = torch.arange(0, 50257, 4000)[None]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


def make_gpt2(**options):
    """A model of transformers with weights large enough that every one of them matters."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def gpt2():
    return make_gpt2()


@torch.no_grad()
def logits_of(model):
    return model(IDX).logits


@torch.no_grad()
def assert_loads(init_from, expected):
    """The model has these logits (1, T, V); return it."""
    model, _ = load_model(str(init_from))
    torch.testing.assert_close(model.eval()(IDX)[0], expected, atol=1e-4, rtol=0)
    return model


def tensors_of(model):
    """The state dict with a copy of each tensor, as safetensors wants them."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(folder, tensors, file="model.safetensors"):
    """Write a directory with config.json and these tensors."""
    folder.mkdir(exist_ok=True)
    GPT2Config(**SHAPE).save_pretrained(folder)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / file)
    return folder


# all that transformers can save


def whole(model, folder):
    model.save_pretrained(folder)


def sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def sharded_bin(model, folder):
    sharded(model, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in folder.glob("model*.safetensors"):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
    weight_map = {n: f"pytorch_{Path(s).stem}.bin" for n, s in index["weight_map"].items()}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    for path in folder.glob("model*"):
        path.unlink()


def pickled(model, folder):
    write(folder, model.state_dict(), "pytorch_model.bin")


def as_class(model_class):
    """Save it as another class of transformers, with or without other heads."""

    def save(model, folder):
        model.save_pretrained(folder)
        model_class.from_pretrained(folder).save_pretrained(folder)

    return pytest.param(save, id=model_class.__name__)


# and what is left when the state dict of a wrapper, or of a part, was saved


def head_alone(model, folder):
    tensors = tensors_of(model)
    del tensors["transformer.wte.weight"]
    write(folder, tensors)


class Lightning(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def wrapped(*wrappers):
    """Save the state dict of these wrappers around the model, the first one innermost."""

    def save(model, folder):
        for wrapper in wrappers:
            model = wrapper(model)
        write(folder, model.state_dict())

    return pytest.param(save, id="-".join(w.__name__ for w in wrappers))


def compiled_blocks(model):
    """Each block compiled by itself, as is usual with FSDP."""
    model = _copy(model)
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(block)
    return model


def _copy(model):
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def value_head(model):
    """As trl's PPO saves it."""
    model = _copy(model)
    model.v_head = nn.Linear(32, 1)
    return model


@pytest.mark.parametrize(
    "save",
    [
        whole,
        sharded,
        sharded_bin,
        pickled,
        as_class(GPT2Model),
        as_class(GPT2DoubleHeadsModel),
        as_class(GPT2ForTokenClassification),
        as_class(GPT2ForQuestionAnswering),
        head_alone,
        wrapped(torch.compile),
        wrapped(nn.DataParallel),
        wrapped(torch.compile, nn.DataParallel),
        wrapped(nn.DataParallel, torch.compile),
        wrapped(Lightning),
        wrapped(torch.compile, nn.DataParallel, Lightning),
        wrapped(compiled_blocks),
        wrapped(compiled_blocks, Lightning, torch.compile),
        wrapped(value_head),
    ],
)
def test_however_a_model_was_saved_it_loads_with_equal_logits(gpt2, tmp_path, save):
    save(gpt2, tmp_path)
    assert_loads(tmp_path, logits_of(gpt2))


def test_a_reward_model_is_told_apart_in_shards_and_behind_prefixes(gpt2, tmp_path):
    whole(gpt2, tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    theirs.config.pad_token_id = 50256
    sharded(theirs, tmp_path / "sharded")
    state = nn.DataParallel(theirs).state_dict()
    for folder in (tmp_path / "sharded", write(tmp_path / "prefixed", state)):
        model, _ = load_model(str(folder), model_class=RewardModel)
        with torch.no_grad():
            score = model.eval()(IDX, torch.tensor([IDX.size(1)]))
            torch.testing.assert_close(score, theirs(IDX).logits[:, 0], atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="reward model"):
            load_model(str(folder))


def test_half_precision_loads_with_the_logits_of_its_rounded_weights(tmp_path):
    model = make_gpt2().half()
    model.save_pretrained(tmp_path)
    assert_loads(tmp_path, logits_of(model.float()))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_head_that_is_not_the_embedding_is_refused(gpt2, tmp_path, file):
    tensors = tensors_of(gpt2)
    tensors["lm_head.weight"][-1, -1] += 0.01
    with pytest.raises(ValueError, match=r"lm_head\.weight.*wte\.weight"):
        load_model(str(write(tmp_path, tensors, file)))


def test_a_tensor_that_is_stored_under_two_names_is_refused(gpt2, tmp_path):
    tensors = tensors_of(gpt2)
    tensors["module.transformer.wpe.weight"] = torch.zeros(64, 32)
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight"):
        load_model(str(write(tmp_path, tensors)))


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.rotary.inv_freq", "h.0.crossattention.c_attn.weight"]
)
def test_an_unknown_tensor_inside_the_transformer_is_refused(gpt2, tmp_path, name):
    with pytest.raises(ValueError, match=name.partition(".h.")[2] or name):
        load_model(str(write(tmp_path, tensors_of(gpt2) | {name: torch.zeros(2)})))


def test_a_model_of_another_architecture_is_refused(tmp_path):
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}
    with pytest.raises(ValueError, match="lacks"):
        load_model(str(write(tmp_path, tensors)))


# shards


def test_a_missing_shard_is_named(gpt2, tmp_path):
    sharded(gpt2, tmp_path)
    missing = sorted(tmp_path.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=missing.name):
        load_model(str(tmp_path))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ""])
def test_an_index_names_only_files_of_its_directory(gpt2, tmp_path, shard):
    whole(gpt2, tmp_path)
    write(tmp_path / "inside", {"a": torch.zeros(1)}, "unused.safetensors")
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": shard}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(str(tmp_path / "inside"))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_damaged_index_is_refused_by_its_name(tmp_path, index):
    folder = write(tmp_path, {"a": torch.zeros(1)}, "unused.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(str(folder))


def test_the_whole_file_comes_before_an_index(gpt2, tmp_path):
    sharded(make_gpt2(activation_function="gelu"), tmp_path)
    whole(gpt2, tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path)
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path)
    for path in tmp_path.glob("model-*"):
        path.unlink()
    assert_loads(tmp_path, logits_of(gpt2))


# on the hub


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Serve a folder as org/name on the hub: publish(folder) -> the server."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)

    def publish(folder):
        for path in folder.iterdir():
            server.bodies[f"/org/name/resolve/main/{path.name}"] = path.read_bytes()
        return server

    yield publish
    server.close()


@pytest.mark.parametrize("save", [whole, sharded, sharded_bin, pickled])
def test_a_model_of_the_hub_loads_however_it_is_stored(gpt2, tmp_path, publish, save):
    folder = tmp_path / "model"
    save(gpt2, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    publish(folder)
    assert_loads("org/name", logits_of(gpt2))
    assert load_model("org/name")[1].notice  # its own chat template has come along


def test_a_model_that_was_cached_without_a_chat_template_file_needs_no_network(
    gpt2, tmp_path, publish
):
    whole(gpt2, tmp_path / "theirs")
    model, tokenizer = load_model(str(tmp_path / "theirs"))
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    server = publish(tmp_path / "model")
    assert_loads("org/name", logits_of(gpt2))
    server.close()
    assert_loads("org/name", logits_of(gpt2))


def test_a_shard_that_the_hub_lacks_is_named(gpt2, tmp_path, publish):
    folder = tmp_path / "model"
    sharded(gpt2, folder)
    missing = sorted(folder.glob("model-*.safetensors"))[-1]
    missing.unlink()
    publish(folder)
    with pytest.raises(FileNotFoundError, match=missing.name):
        load_model("org/name")


def test_a_lora_adapter_on_the_hub_is_refused_by_name(tmp_path, publish):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    publish(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"org/name.*LoRA.*merge_and_unload"):
        load_model("org/name")
    with pytest.raises(FileNotFoundError, match=r"org/other/resolve/main/config\.json"):
        load_model("org/other")


# activations

TANH = ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"]


@pytest.mark.parametrize("name", [*TANH, "gelu", "gelu_python"])
def test_each_name_of_gelu_computes_what_it_computes_in_transformers(tmp_path, name):
    model = make_gpt2(activation_function=name)
    model.save_pretrained(tmp_path / "theirs")
    expected = logits_of(model)
    ours = assert_loads(tmp_path / "theirs", expected)
    # and in training's fast path, in 16-bit inference, and again in transformers
    save_model(ours, Tokenizer(), tmp_path / "ours")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits_of(saved), expected, atol=1e-4, rtol=0)
    packed, _ = load_model(str(tmp_path / "ours"), dtype=torch.float16, inference=True)
    with torch.no_grad():
        torch.testing.assert_close(packed(IDX)[0], expected, atol=0.02, rtol=0)


def test_the_two_forms_of_gelu_differ_by_more_than_these_tests_allow():
    forms = [logits_of(make_gpt2(activation_function=name)) for name in ("gelu_new", "gelu")]
    assert (forms[0] - forms[1]).abs().max() > 1e-3


# nanoGPT's checkpoints


def nanogpt_model(bias=True, vocab_size=50304):
    """A model of transformers that computes what nanoGPT's does."""
    model = make_gpt2(activation_function="gelu", vocab_size=vocab_size)
    if not bias:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
    return model


def write_nanogpt(model, path, bias=True, prefix="", **changes):
    """Write these weights as nanoGPT's train.py does; return the path."""
    state = {}
    for name, tensor in model.state_dict().items():
        if bias or not name.endswith(".bias"):
            linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            state[prefix + name] = tensor.T.contiguous() if linear else tensor
    state[prefix + "lm_head.weight"] = state[prefix + "transformer.wte.weight"]
    c = model.config
    args = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "bias": bias}
    args |= {"block_size": c.n_positions, "vocab_size": c.vocab_size, "dropout": 0.1}
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args | changes,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.2),
        "config": {"out_dir": "out", "dataset": "openwebtext", "learning_rate": 6e-4},
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_a_checkpoint_of_nanogpt_has_its_logits(tmp_path, bias, prefix, vocab_size):
    theirs = nanogpt_model(bias, vocab_size)
    path = write_nanogpt(theirs, tmp_path / "ckpt.pt", bias, prefix)
    model = assert_loads(path, logits_of(theirs))  # the file
    assert model.config.vocab_size == vocab_size
    assert_loads(tmp_path, logits_of(theirs))  # its folder

    # and saved as ours, in transformers
    save_model(model, Tokenizer(), tmp_path / "ours")
    assert_loads(tmp_path / "ours", logits_of(theirs))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits_of(again), logits_of(theirs), atol=1e-4, rtol=0)


def test_a_model_of_nanogpt_can_be_trained_and_chats(tmp_path, in_process, data_dir, monkeypatch):
    """And keeps its form of GELU when the run is resumed."""
    monkeypatch.chdir(tmp_path)
    write_nanogpt(nanogpt_model(), tmp_path / "theirs" / "ckpt.pt", prefix="_orig_mod.")
    knobs = ["--dataset=talk", "--device=cpu", "--out_dir=out/a", "--max_iters=1"]
    knobs += ["--batch_size=2", "--block_size=64", "--eval_iters=1"]
    knobs += ["--gradient_accumulation_steps=1", f"--data_dir={data_dir}"]
    for more in (["--init_from=theirs/ckpt.pt"], ["--init_from=resume", "--max_iters=2"]):
        main = functools.partial(train.run, train.main, train.Config)
        done = in_process(main, "train.py", *knobs, *more)
        assert done.returncode == 0, done.stderr
    for folder in ("out/a", "out/a/last"):
        config = json.loads((Path(folder) / "config.json").read_text())
        assert config["activation_function"] == "gelu"
        assert config["vocab_size"] == 50304


def test_a_file_comes_before_nanogpts_in_the_same_folder(gpt2, tmp_path):
    write_nanogpt(nanogpt_model(), tmp_path / "ckpt.pt")
    pickled(gpt2, tmp_path)
    assert_loads(tmp_path, logits_of(gpt2))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"vocab_size": 65}, "vocab_size=65"),  # shakespeare_char
        ({"vocab_size": 100277}, "vocab_size=100277"),
        ({"n_layer": None}, "n_layer"),
        ({"n_head": "2"}, "n_head"),
        ({"n_head": 5}, "n_head"),
        ({"block_size": 1024}, "wpe"),
        ({"use_rmsnorm": True}, "use_rmsnorm"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, changes, word):
    write_nanogpt(nanogpt_model(), tmp_path / "ckpt.pt", **changes)
    with pytest.raises(ValueError, match=rf"ckpt\.pt.*{word}"):
        load_model(str(tmp_path))


def test_a_missing_bias_is_zero_only_where_nanogpt_says_so(tmp_path):
    write_nanogpt(nanogpt_model(), tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del checkpoint["model"]["transformer.h.1.mlp.c_fc.bias"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt.*transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        {"model": {}, "model_args": []},
        {"model": {"a": 1}, "model_args": {}},
        {"state_dict": {"a": torch.zeros(1)}},
        {
            "script": "train",
            "iter": 1,
            "config": {},
            "model": {"a": torch.zeros(1)},
        },  # our state.pt
    ],
)
def test_a_pt_file_that_is_not_nanogpts_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    for init_from in (tmp_path, tmp_path / "ckpt.pt"):
        with pytest.raises(ValueError, match=r"ckpt\.pt"):
            load_model(str(init_from))


# what is no model


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def foreign_files(gpt2, folder):
    """Yield (init_from, words of the refusal)."""
    whole(gpt2, folder / "model")
    for name in ("model.safetensors", "config.json"):
        yield folder / "model" / name, ["directory", folder / "model"]
    pickled(gpt2, folder / "bin")
    yield folder / "bin" / "pytorch_model.bin", ["directory", folder / "bin"]
    yield folder / "bin" / "missing.bin", ["missing.bin"]

    gguf = folder / "gguf"
    gguf.mkdir()
    (gguf / "model-q8.gguf").write_bytes(b"GGUF\x03\0\0\0")
    yield gguf, ["GGUF"]
    yield gguf / "model-q8.gguf", ["GGUF"]

    lora = folder / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, lora / "adapter_model.safetensors")
    yield lora, ["LoRA", "merge_and_unload"]
    yield lora / "adapter_model.safetensors", ["LoRA", "merge_and_unload"]

    for name in ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index"):
        other = folder / name.replace(".", "-")
        other.mkdir()
        (other / name).write_bytes(b"\x89HDF")
        shutil.copy(folder / "model" / "config.json", other)
        yield other, [name, "transformers"]

    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        cloned = Path(shutil.copytree(folder / "model", folder / f"lfs-{name}"))
        (cloned / name).write_bytes(POINTER)
        yield cloned, [cloned / name, "git lfs pull"]
    cloned = folder / "lfs-nanogpt"
    cloned.mkdir()
    (cloned / "ckpt.pt").write_bytes(POINTER)
    yield cloned, ["ckpt.pt", "git lfs pull"]
    yield cloned / "ckpt.pt", ["ckpt.pt", "git lfs pull"]


def test_what_is_no_model_is_refused_by_what_it_is_with_the_remedy(gpt2, tmp_path, in_process):
    for init_from, words in foreign_files(gpt2, tmp_path):
        done = in_process(
            lambda: chat.run(chat.main, chat.Config), "chat.py", f"--init_from={init_from}"
        )
        assert_refused(done, *words)
