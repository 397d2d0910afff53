"""The pictures of attention and repetition: their numbers agree with a plain count; mistakes end in
a line."""

import re
import sys

import pytest
import torch
from conftest import assert_refused, small_talk, write_shards

from evaluation import attention, repetition
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import run
from nanochatgpt.generate import generate
from nanochatgpt.loader import Loader
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.sampling import Sampling
from nanochatgpt.shards import find_shards, open_shard
from nanochatgpt.tokenizer import Tokenizer


@pytest.fixture
def draw(monkeypatch, tmp_path, in_process):
    """Run a script in a folder with data/talk and a small model: draw(attention, "--row=1")."""
    write_shards(tmp_path / "data" / "talk", small_talk(30, seed=1), small_talk(30, seed=2))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPTConfig(block_size=256, n_layer=1, n_head=2, n_embd=32)
    save_model(GPT(config), Tokenizer(), "tiny")

    def call(script, *knobs):
        knobs = ["--init_from=tiny", "--dataset=talk", *knobs]
        return in_process(lambda: run(script.main, script.Config), script.__name__, *knobs)

    return call


@pytest.fixture
def figure_of(draw, monkeypatch):
    """Return the picture that a script draws, as a matplotlib Figure."""

    def figure_of(script, *knobs):
        figures = []
        monkeypatch.setattr(script, "save", lambda figure, path: figures.append(figure))
        done = draw(script, *knobs)
        assert done.returncode == 0, done.stderr
        return figures[0]

    return figure_of


def test_attention_is_that_of_the_conversation_alone_in_transformers(figure_of):
    from transformers import GPT2LMHeadModel

    figure = figure_of(attention, "--tokens=200", "--row=0", "--layer=0")
    model, tokenizer = load_model("tiny")
    x, _, documents = Loader(find_shards("data", "talk", "val"), 1, 200, 0, tokenizer).batch(0)
    mask, weights = attention.head_attention(model, x, documents, layer=0, head=1)
    start, stop = documents[1:3].tolist()
    hf = GPT2LMHeadModel.from_pretrained("tiny", attn_implementation="eager")
    with torch.inference_mode():
        alone = hf(x[None, 0, start:stop], output_attentions=True).attentions[0][0, 1]
    torch.testing.assert_close(weights[start:stop, start:stop], alone, atol=1e-5, rtol=0)
    assert not weights[start:stop, :start].any() and not mask[start:stop, :start].any()

    # the picture: the mask; then for each token of the last reply, the weights of its conversation
    left, right = figure.axes
    assert (left.images[0].get_array() == mask.numpy()).all()
    picture = torch.tensor(right.images[0].get_array())
    reply = "".join(label.get_text() for label in right.get_yticklabels())
    text = tokenizer.decode(x[0, start:stop].tolist()).replace("\n", r"\n")
    # each position learns the next token: the opener the first, the last token the end
    assert reply.startswith("]:") and "[Bot" + reply == text[-len("[Bot" + reply) :]
    torch.testing.assert_close(picture, alone[-len(picture) :], atol=1e-5, rtol=0)


def test_repetition_is_counted_over_the_beginnings_of_the_same_replies(figure_of):
    knobs = ["--prompts=3", "--max_new_tokens=45", "--temperature=0.1", "--dtype=float32"]
    figure = figure_of(repetition, *knobs, "--device=cpu")
    curves = {line.get_label(): line.get_data() for line in figure.axes[0].lines}
    assert list(curves) == list(repetition.CURVES)
    assert list(curves["none"][0]) == [20, 40]

    # random weights say one token again and again at a low temperature, unless it is penalized
    assert curves["none"][1][1] > curves["frequency_penalty 0.7"][1][1]
    tokenizer = Tokenizer()
    prompts, _ = sample_prompts([open_shard("data/talk/val.bin")], tokenizer, 3, 256 - 45, 0)
    no_end = dict.fromkeys(tokenizer.stop_ids, -100.0)
    sampling = Sampling(max_new_tokens=45, temperature=0.1, top_k=50, top_p=0.8)
    model, _ = load_model("tiny")
    replies = generate(model, prompts, sampling, seed=0, logit_bias=no_end, tokenizer=tokenizer)
    repeated = total = 0
    for ids in replies:
        words = re.findall(r"\w+|[^\w\s]", tokenizer.decode(ids[:40]).lower())
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        repeated += sum(gram in grams[:i] for i, gram in enumerate(grams))
        total += len(grams)
    assert curves["none"][1][1] == pytest.approx(100 * repeated / total)


def test_the_pictures_are_written(draw, tmp_path):
    assert draw(attention, "--tokens=200", "--layer=0", "--row=0", "--png=a.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    knobs = ["--prompts=1", "--max_new_tokens=20", "--svg=new/a.svg"]
    assert draw(repetition, *knobs).returncode == 0
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()


def test_mistakes_end_in_a_line(draw, monkeypatch):
    assert_refused(draw(attention, "--dataset=none", "--layer=0"), "data/none/val*.bin")
    assert_refused(draw(attention, "--layer=1"), "1 layers of 2 heads")
    assert_refused(draw(repetition, "--max_new_tokens=255"), "max_new_tokens")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script in (attention, repetition):
        assert_refused(draw(script, "--init_from=none"), "pip install matplotlib")
