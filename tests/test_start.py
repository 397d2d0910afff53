"""The start of the model in the box: its heads copy before any training."""

import runpy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model

START = "assets/nano/start.py"
SHAPES = [(2, 3, 96), (4, 6, 192), (3, 4, 256)]  # layers, heads, width
set_induction_heads = runpy.run_path(str(ROOT / START))["set_induction_heads"]


def new_model(shape, copying=True):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 50257, *shape)).eval()
    if copying:
        set_induction_heads(model)
    return model


def attention(model, layer, idx):
    """Return the attention weights (nh, T, T) of one layer, computed from its q and k."""
    inputs = []
    block = model.transformer.h[layer]
    handle = block.ln_1.register_forward_hook(lambda module, args, x: inputs.append(x[0]))
    with torch.no_grad():
        model.hidden(idx)
    handle.remove()
    qkv = inputs[0] @ block.attn.c_attn.weight + block.attn.c_attn.bias
    q, k, _ = qkv.view(idx.size(1), 3, model.config.n_head, -1).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
    future = torch.ones(scores.shape[1:]).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_of_layer_0_look_at_the_token_before(shape):
    model = new_model(shape)
    weights = attention(model, 0, torch.randint(0, 50257, (1, 200)))
    before = weights[: model.config.n_head // 3].diagonal(-1, 1, 2)  # (heads, 199)
    assert before.mean() > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_of_layer_1_look_at_what_followed_the_same_token(shape):
    model = new_model(shape)
    half = torch.randperm(50257)[:60]
    weights = attention(model, 1, half.repeat(2)[None])
    n = 2 * (model.config.n_head // 3)
    followed = weights[:n, 60:, 1:60].diagonal(0, 1, 2)  # token 60 + i looks at i + 1
    average = weights[:n, 60:].sum(-1).mean() / 90
    assert followed.mean() > 5 * average


@pytest.mark.parametrize("shape", SHAPES)
def test_an_untrained_model_expects_a_repetition(shape):
    """The second time, random tokens surprise it less than they surprise random weights."""
    half = torch.randint(0, 50257, (2, 60))
    idx = half.repeat(1, 2)
    losses = []
    for copying in (True, False):
        with torch.no_grad():
            logits, _ = new_model(shape, copying)(idx)
        losses.append(F.cross_entropy(logits[:, 60:-1].flatten(0, 1), idx[:, 61:].flatten()).item())
    assert losses[0] < losses[1] - 0.8


def test_all_other_weights_are_gpt2s_initialisation():
    plain = new_model((4, 6, 192), copying=False).state_dict()
    ours = new_model((4, 6, 192)).state_dict()
    changed = {name for name in plain if not plain[name].equal(ours[name])}
    expected = {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    for layer in (0, 1):
        expected |= {f"transformer.h.{layer}.attn.{part}.weight" for part in ("c_attn", "c_proj")}
    assert changed == expected


def test_the_script_writes_the_shape_of_nano(as_main, tmp_path):
    done = as_main(START, f"--out_dir={tmp_path}/start")
    assert done.returncode == 0, done.stderr
    model, _ = load_model(tmp_path / "start")
    nano, _ = load_model("nano")
    assert model.config == nano.config
    torch.manual_seed(1337)
    expected = GPT(model.config)
    set_induction_heads(expected)
    for name, weight in expected.state_dict().items():
        assert weight.equal(model.state_dict()[name]), name
