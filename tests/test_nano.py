"""The model in the box: that it is what its card says, and that a newcomer talks to it without a knob."""

import json

import pytest
import torch
from conftest import ROOT

import evaluate
from evaluate import Config, Material
from nanochatgpt.checkpoint import NANO, default_model, load_model
from nanochatgpt.generate import generate
from nanochatgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", dtype=torch.float16, inference=True)


def test_its_weights_are_small_and_in_16_bits():
    assert (NANO / "model.safetensors").stat().st_size <= 25_000_000
    assert json.loads((NANO / "config.json").read_text())["dtype"] == "float16"


def test_transformers_loads_it_and_says_the_same(nano):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, hf_tokenizer = (
        AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32),
        AutoTokenizer.from_pretrained(NANO),
    )
    chat = [{"role": "user", "content": "Hello! How are you?"}]
    ids = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == Tokenizer().render(chat, add_generation_prompt=True)[0]
    expected = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[
        0, len(ids) :
    ].tolist()
    model, tokenizer = load_model("nano")
    got = generate(model, [ids], temperature=0, max_new_tokens=30, stop_ids=tokenizer.stop_ids)[0]
    assert got == expected[: len(got)] and expected[len(got) :][:1] == [tokenizer.eos_id]


def test_it_remembers_ends_and_keeps_to_its_turn(nano):
    """The card's figures, from half of its probes."""
    config = Config(dataset="", probes=50)
    figures, _ = evaluate.evaluate(config, *nano, Material(config, nano[1], 512))
    floors = json.loads((NANO / "evaluation.json").read_text())["nano"]
    for name in ("recall_1", "recall_3", "recall_6", "persona"):
        assert figures[name] > floors[name] - 0.15, name
    assert figures["ended"] > 0.97
    assert figures["speaks_for_human"] == 0


def test_a_newcomer_is_answered_by_it_until_there_is_a_model_of_their_own(
    script, tmp_path, monkeypatch
):
    done = script("chat.py", input="Hello! My name is Nora.\nWhat is my name?\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("Bot: ") and "Nora" in second
    done = script("sample.py", "--max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time")
    monkeypatch.chdir(tmp_path)
    assert default_model() == "nano"
    (tmp_path / "out" / "chat").mkdir(parents=True)
    (tmp_path / "out" / "chat" / "model.safetensors").touch()
    assert default_model() == "out/chat"


def test_training_starts_from_it(script, data_dir):
    quick = [
        "--dataset=talk",
        "--max_iters=2",
        "--eval_iters=1",
        "--block_size=64",
        "--out_dir=out/mine",
    ]
    done = script("train.py", ROOT / "config" / "demo.py", *quick)
    assert done.returncode == 0, done.stderr
    first = json.loads(
        (data_dir.parent / "out" / "mine" / "metrics.jsonl").read_text().splitlines()[0]
    )
    assert first["val_loss"] < 10.3  # random weights begin at 10.8
