"""The model in the box is what its card says, and a newcomer talks to it without a knob."""

import json

import pytest
import torch
from conftest import ROOT, records

from evaluate import Config, EvalSet, evaluate
from nanochatgpt.checkpoint import NANO, default_model, load_model
from nanochatgpt.generate import generate
from nanochatgpt.sampling import Sampling
from nanochatgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", dtype=torch.float16, inference=True)


def test_its_weights_are_small_and_in_16_bits():
    assert (NANO / "model.safetensors").stat().st_size <= 25_000_000
    assert json.loads((NANO / "config.json").read_text())["dtype"] == "float16"


def test_transformers_loads_it_and_says_the_same(nano):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    hf_tokenizer = AutoTokenizer.from_pretrained(NANO)
    chat = [{"role": "user", "content": "Hello! How are you?"}]
    ids = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == Tokenizer().render(chat, add_generation_prompt=True)[0]
    expected = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)
    model, tokenizer = load_model("nano")
    greedy = Sampling(max_new_tokens=30, temperature=0)
    [reply] = generate(model, [ids], greedy, stop_ids=tokenizer.stop_ids)
    assert [*ids, *reply, tokenizer.eos_id] == expected[0].tolist()


def test_it_remembers_ends_and_keeps_to_its_turn(nano):
    """The metrics of its card, from a quarter of the probes."""
    config = Config(dataset="", probes=25)
    metrics, _ = evaluate(config, *nano, EvalSet(config, nano[1], 512))
    floors = json.loads((NANO / "evaluation.json").read_text())["nano"]
    for name in ("recall_1", "recall_3", "recall_6", "persona"):
        assert metrics[name] > floors[name] - 0.15, name
    assert metrics["ended"] > 0.97
    assert metrics["speaks_for_human"] == 0


def test_a_newcomer_talks_to_it_until_they_have_their_own(as_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = as_main("chat.py", input="Hello! My name is Nora.\nWhat is my name?\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("Bot: ") and "Nora" in second
    done = as_main("sample.py", "--max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time")
    assert default_model() == "nano"
    (tmp_path / "out" / "chat").mkdir(parents=True)
    (tmp_path / "out" / "chat" / "model.safetensors").touch()
    assert default_model() == "out/chat"


def test_training_starts_from_it(as_main, data_dir, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    quick = ["--dataset=talk", "--max_iters=1", "--eval_iters=1", "--block_size=64"]
    done = as_main("train.py", ROOT / "config" / "demo.py", *quick, "--out_dir=out/mine")
    assert done.returncode == 0, done.stderr
    first = records("out/mine")[0]
    assert first["val_loss"] < 10.3  # random weights begin at 10.8
