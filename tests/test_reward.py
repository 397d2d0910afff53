"""The reward model is Hugging Face's GPT2ForSequenceClassification: the scores agree, both ways."""

import json

import pytest
import torch
from conftest import assert_refused
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.huggingface import tokenizer_files
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer
from rlhf.reward_model import RewardModel
from rlhf.scoring import score_texts

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, n_positions=64, num_labels=1, pad_token_id=END_OF_TEXT)
    return GPT2ForSequenceClassification(config).eval()


@pytest.fixture
def ours():
    torch.manual_seed(1)
    return RewardModel(GPTConfig(64, **SHAPE)).eval()


def padded_batch():
    """Return rows, padded on the right as Chai's model was trained, and their lengths."""
    lengths = torch.tensor([20, 1, 13, 7])
    idx = torch.randint(END_OF_TEXT, (4, 20), generator=torch.Generator().manual_seed(2))
    return idx.masked_fill(torch.arange(20) >= lengths[:, None], END_OF_TEXT), lengths


@torch.no_grad()
def assert_same_scores(ours, theirs):
    idx, lengths = padded_batch()
    expected = theirs(idx, attention_mask=(idx != END_OF_TEXT).long()).logits[:, 0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours(idx, lengths), expected, atol=1e-4, rtol=0)


def test_theirs_loads_as_ours(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_files("human_bot")["tokenizer.json"])
    assert_same_scores(load_model(str(tmp_path), model_class=RewardModel)[0].eval(), theirs)


def test_long_texts_lose_their_beginning_as_theirs_do(ours, tmp_path):
    """Chai's model takes texts that are cut on the left to 256 tokens and padded on the right."""
    save_model(ours, Tokenizer(), tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        tmp_path, truncation_side="left", padding_side="right"
    )
    texts = [
        f"[Human]: what is {n} times two?\n[Bot]: " + "it is a number. " * n for n in (1, 9, 0, 4)
    ]
    batch = tokenizer(texts, max_length=16, truncation=True, padding=True, return_tensors="pt")
    rows = [Tokenizer().encode(text) for text in texts]
    assert min(map(len, rows)) < 16 < sorted(map(len, rows))[-2]
    ours.shorten(16)
    with torch.no_grad():
        expected = theirs(**batch).logits[:, 0]
    torch.testing.assert_close(score_texts(ours, Tokenizer(), rows), expected, atol=1e-4, rtol=0)


def test_ours_loads_as_theirs_and_comes_back(ours, tmp_path):
    save_model(ours, Tokenizer(), tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert (theirs.config.num_labels, theirs.config.pad_token_id) == (1, END_OF_TEXT)
    assert_same_scores(ours, theirs)
    assert_same_scores(load_model(str(tmp_path), model_class=RewardModel)[0].eval(), theirs)


def test_a_score_does_not_depend_on_what_a_row_is_padded_with(ours):
    idx, lengths = padded_batch()
    with torch.no_grad():
        assert torch.equal(
            ours(idx.masked_fill(idx == END_OF_TEXT, 7), lengths), ours(idx, lengths)
        )


def test_its_parameters_are_counted(ours):
    assert ours.num_parameters() == sum(p.numel() for p in ours.parameters())


def test_a_packed_reward_model_has_the_scores_of_float32_up_to_rounding(ours, tmp_path):
    save_model(ours, Tokenizer(), tmp_path)
    packed, _ = load_model(
        str(tmp_path), dtype=torch.float16, inference=True, model_class=RewardModel
    )
    idx, lengths = padded_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            packed.eval()(idx, lengths), ours(idx, lengths), atol=2e-3, rtol=0
        )


def test_a_model_of_the_other_kind_is_refused(ours, tmp_path, as_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(ours, Tokenizer(), "reward")
    save_model(GPT(GPTConfig(64, **SHAPE)), Tokenizer(), "chat")
    with pytest.raises(ValueError, match="reward model"):
        load_model("chat", model_class=RewardModel)
    assert_refused(as_main("chat.py", "--init_from=reward", input="hi"), "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
