"""Heads that copy, set by hand: what they attend to, and what an untrained model with them predicts."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused
from nanochatgpt.induction import set_induction_heads

from model import GPT, GPTConfig

SHAPES = [(2, 3, 96), (4, 4, 192), (4, 6, 192), (3, 4, 256)]


def new_model(shape, induction=True):
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 50257, *shape)).eval()
    if induction:
        set_induction_heads(model)
    return model


def attention(model, layer, idx):
    """Return the attention weights (nh, T, T) of one layer, computed from its own q and k."""
    seen = {}
    block = model.transformer.h[layer]
    handle = block.ln_1.register_forward_hook(lambda module, args, output: seen.update(x=output))
    with torch.no_grad():
        model(idx)
    handle.remove()
    c_attn = block.attn.c_attn
    q, k, _ = (
        (seen["x"][0] @ c_attn.weight + c_attn.bias)
        .view(idx.size(1), 3, model.config.n_head, -1)
        .unbind(1)
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_heads_look_at_the_position_before(shape):
    model = new_model(shape)
    weights = attention(model, 0, torch.randint(0, 50257, (1, 200)))
    before = weights[: model.config.n_head // 3].diagonal(-1, 1, 2)  # (heads, 199)
    assert before.mean() > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_heads_above_look_at_what_followed_the_same_token(shape):
    model = new_model(shape)
    half = torch.randperm(50257)[:60]
    weights = attention(model, 1, half.repeat(2)[None])
    n = 2 * (model.config.n_head // 3)
    followed = weights[:n, 60:, 1:60].diagonal(
        0, 1, 2
    )  # of the token at 60 + i, what stands at i + 1
    elsewhere = weights[:n, 60:].sum(-1).mean() / 90
    assert followed.mean() > 5 * elsewhere


@pytest.mark.parametrize("shape", SHAPES)
def test_an_untrained_model_expects_what_it_has_seen_to_come_again(shape):
    """The second time, random tokens are less of a surprise than to GPT-2's initialisation, which has no idea."""
    half = torch.randint(0, 50257, (4, 60))
    idx, losses = half.repeat(1, 2), {}
    for induction in (False, True):
        with torch.no_grad():
            logits = new_model(shape, induction)(idx)[0]
        losses[induction] = F.cross_entropy(
            logits[:, 60:-1].flatten(0, 1), idx[:, 61:].flatten()
        ).item()
    assert losses[True] < losses[False] - 0.8


def test_what_is_left_of_the_model_is_gpt2s_initialisation():
    plain, ours = new_model((4, 6, 192), induction=False), new_model((4, 6, 192))
    changed = {
        name
        for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True)
        if not a.equal(b)
    }
    attn = {
        f"transformer.h.{layer}.attn.{part}.weight"
        for layer in (0, 1)
        for part in ("c_attn", "c_proj")
    }
    assert changed == {"transformer.wte.weight", "transformer.wpe.weight", *attn}


@pytest.mark.parametrize("shape", [(1, 4, 192), (4, 2, 192), (4, 4, 100)])
def test_a_shape_without_room_is_refused(shape):
    with pytest.raises(ValueError, match="induction_heads"):
        new_model(shape)


def test_training_from_scratch_can_begin_with_them(script, data_dir):
    tiny = [
        "--init_from=scratch",
        "--dataset=talk",
        "--n_layer=2",
        "--n_head=4",
        "--n_embd=32",
        "--block_size=128",
    ]
    tiny += ["--max_iters=2", "--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1"]
    done = script("train.py", *tiny, "--induction_heads=true", "--out_dir=with")
    assert done.returncode == 0, done.stderr
    assert_refused(
        script("train.py", *tiny, "--induction_heads=true", "--n_layer=1", "--out_dir=no"),
        "induction_heads",
    )
