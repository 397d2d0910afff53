"""The README's pictures are of what they say: their numbers agree with a plain count; mistakes end in a line."""

import functools
import json
import re

import pytest
import torch
from conftest import assert_refused, small_talk, write_shards
from test_plot import png_size

from evaluation import figures
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.generate import generate
from nanochatgpt.sampling import ChatSampling, options_of
from nanochatgpt.shards import open_shard, sample_prompts
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward import scores
from rlhf.reward_model import RewardModel


@pytest.fixture
def here(monkeypatch, tmp_path, in_process):
    """Run figures.py in this process, in a folder with data/talk: here("attention", "--row=1")."""
    write_shards(tmp_path / "data" / "talk", small_talk(30, seed=1), small_talk(30, seed=2))
    monkeypatch.chdir(tmp_path)
    return functools.partial(in_process, figures.main, "figures.py")


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=1, n_head=2, n_embd=32))
    save_model(model, Tokenizer(), tmp_path / "tiny")
    return "tiny"


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_attention_is_the_models_own_within_one_conversation(here, tmp_path, tiny):
    """Drawn from a packed row; the same head's, of the conversation alone, by transformers."""
    from transformers import GPT2LMHeadModel

    knobs = [
        "--init_from=tiny",
        "--dataset=talk",
        "--tokens=200",
        "--row=0",
        "--conversation=1",
        "--layer=0",
    ]
    result = result_of(here("attention", *knobs, "--head=1", "--png=a.png"))
    assert png_size(tmp_path / "a.png")[0] > 500
    config = figures.Attention(tiny, "data", "talk", 200, 0, 1, 0, 1, "a.png")
    _, weights, x, starts, *_ = figures.row_attention(config)
    assert result["begin"] == starts and len(starts) > 2
    first, last = starts[1:3]
    hf = GPT2LMHeadModel.from_pretrained("tiny", attn_implementation="eager")
    with torch.inference_mode():
        alone = hf(x[None, first:last], output_attentions=True).attentions[0][0, 1]
    torch.testing.assert_close(weights[first:last, first:last], alone, atol=1e-5, rtol=0)
    assert weights[first:last, :first].count_nonzero() == 0
    assert result["reply"] in Tokenizer().decode(x[first:last].tolist()).replace("\n", r"\n")


def test_repetition_is_counted_over_the_beginnings_of_the_same_replies(here, tmp_path, tiny):
    knobs = [
        "--init_from=tiny",
        "--dataset=talk",
        "--prompts=3",
        "--max_new_tokens=45",
        "--temperature=0.1",
    ]
    result = result_of(here("repetition", *knobs, "--dtype=float32", "--device=cpu", "--png=r.png"))
    assert png_size(tmp_path / "r.png")[0] > 500
    assert result.pop("lengths") == [20, 40]
    assert list(result) == list(figures.PENALTIES)
    # a model of random weights that takes the likeliest token says one again and again, unless it costs
    assert result["none"][1] > result["frequency_penalty 0.7"][1]
    tokenizer = Tokenizer()
    prompts, _ = sample_prompts([open_shard("data/talk/val.bin")], tokenizer, 3, 256 - 45, 0)
    never = dict.fromkeys(tokenizer.stop_ids, -100.0)
    options = {
        "temperature": 0.1,
        "top_k": 50,
        "top_p": 0.8,
        "max_new_tokens": 45,
        "logit_bias": never,
        "seed": 0,
    }
    replies = generate(load_model(tiny)[0], prompts, tokenizer=tokenizer, **options)
    again = there = 0
    for ids in replies:
        words = re.findall(r"\w+|[^\w\s]", tokenizer.decode(ids[:40]).lower())
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        again += sum(gram in grams[:i] for i, gram in enumerate(grams))
        there += len(grams)
    assert result["none"][1] == pytest.approx(again / there)


def test_the_best_of_n_is_what_the_benchmark_measures(here, tmp_path, tiny):
    torch.manual_seed(0)
    save_model(RewardModel(load_model(tiny)[0].config), Tokenizer(), tmp_path / "reward")
    knobs = [
        "--init_from=tiny",
        "--reward=reward",
        "--dataset=talk",
        "--prompts=2",
        "--most=4",
        "--n=2",
        "--dtype=float32",
    ]
    result = result_of(here("best_of", *knobs, "--max_new_tokens=8", "--device=cpu", "--png=b.png"))
    assert png_size(tmp_path / "b.png")[0] > 500
    tokenizer, (model, _) = Tokenizer(), load_model(tiny)
    prompts, _ = sample_prompts([open_shard("data/talk/val.bin")], tokenizer, 2, 256 - 8, 0)
    options = options_of(ChatSampling(max_new_tokens=8)) | {"stop_ids": tokenizer.stop_ids}
    options |= {"stop_strings": tokenizer.stop_strings, "tokenizer": tokenizer}
    drawn = [
        generate(model, [prompt] * 4, seed=4 * n, **options) for n, prompt in enumerate(prompts, 1)
    ]
    reward_model = load_model("reward", model_class=RewardModel)[0].eval()
    found = [
        scores(reward_model, [[*prompt, *ids] for ids in each])
        for prompt, each in zip(prompts, drawn, strict=True)
    ]
    expected = {str(n): torch.stack(found)[:, :n].max(1).values.mean().item() for n in (1, 2, 4)}
    assert result["rewards"] == pytest.approx(expected, abs=1e-3)


def test_mistakes_end_in_a_line(here, tiny):
    assert_refused(here("atention"), "atention is none of attention, repetition, best_of")
    assert_refused(here("attention", "--init_from=tiny", "--layer=0"), "no data/recall/val*.bin")
    attention = ("attention", "--init_from=tiny", "--dataset=talk", "--tokens=200")
    assert_refused(here(*attention, "--layer=1"), "layer=1, head=1: there are 1 layers of 2 heads")
    assert_refused(here(*attention, "--layer=0", "--conversation=99"), "conversation=99: there are")
    assert_refused(
        here("repetition", "--init_from=tiny", "--dataset=talk", "--max_new_tokens=255"), "lower it"
    )
    assert here("--help").stdout.startswith("Draw what the README shows")


def test_without_matplotlib_it_says_how_to_get_it(here, tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert_refused(here("attention"), "pip install matplotlib")
