"""The model is Hugging Face's GPT-2: names, logits, losses, gradients and dropout are compared with
transformers, those
of rows that hold several conversations with each by itself."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from model import GPT, PRESETS, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.fast import HeadLoss, speed_up
from nanochatgpt.tokenizer import Tokenizer

ODD = {"n_layer": 3, "n_head": 5, "n_embd": 80, "vocab_size": 50262, "n_positions": 96}
SMALL = ODD | {"vocab_size": 300}


@pytest.fixture
def hf_model(hf_gpt2):
    """A transformers model in which every weight matters: biases and LayerNorms too are away from 0
    and 1."""

    def make(**shape):
        model = hf_gpt2(**shape)
        # their own matrix products, not the kernel that we call
        model.set_attn_implementation("eager")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        return model

    return make


@pytest.fixture
def disk(tmp_path):
    """A folder that is emptied after the test: pytest would keep gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def ours(hf, dropout=0.0, attention_dropout=0.0):
    c = hf.config
    shape = (c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    model = GPT(GPTConfig(*shape, dropout, attention_dropout, c.activation_function))
    model.load_state_dict(hf.state_dict())
    return model.eval()


@pytest.fixture(params=["plain", "fast"])
def ours_either_way(request):
    """`ours`, as model.py is written, and with the drop-ins of fast.py."""
    if request.param == "plain":
        return ours
    return lambda *args: speed_up(ours(*args))


def batch(vocab_size, rows=2, T=20, seed=1):
    return torch.randint(vocab_size, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(ODD, id="odd"),
        pytest.param(PRESETS["gpt2"], id="gpt2", marks=pytest.mark.slow),
        pytest.param(PRESETS["distilgpt2"], id="distilgpt2", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_transformers_from_their_directory_and_in_their_hands(hf_model, disk, shape):
    hf = hf_model(**{"n_positions": 1024} | shape)
    idx = batch(hf.config.vocab_size)
    idx[0, 0] = hf.config.vocab_size - 1
    with torch.no_grad():
        expected = hf(idx).logits
        hf.save_pretrained(disk / "theirs")
        del hf
        model, _ = load_model(str(disk / "theirs"))
        logits, loss = model.eval()(idx)
        assert loss is None
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

        save_model(model, Tokenizer(), disk / "ours")
        del model
        hf = AutoModelForCausalLM.from_pretrained(disk / "ours")
        torch.testing.assert_close(hf(idx).logits, expected, atol=1e-4, rtol=0)


def test_logits_equal_transformers_over_the_whole_context(hf_model):
    hf = hf_model(**SMALL)
    idx = batch(300, T=96)
    with torch.no_grad():
        torch.testing.assert_close(ours(hf)(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


def test_a_state_dict_passes_both_ways_without_renaming(hf_model):
    hf, model = hf_model(**SMALL), GPT(GPTConfig(96, 300, 3, 5, 80))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in hf.named_parameters()}
    hf.load_state_dict(model.state_dict())
    idx = batch(300)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_loss_and_every_gradient_equal_transformers(hf_model, ours_either_way, activation):
    hf = hf_model(**ODD, activation_function=activation)
    model = ours_either_way(hf)
    idx = batch(50262)
    labels = idx.masked_fill(torch.rand(idx.shape) < 0.4, -100)
    theirs = hf(idx, labels=labels).loss  # they compare position t with label t + 1
    theirs.backward()
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(idx, targets)[1]
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    gradients = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_loss_is_the_mean_cross_entropy_over_supervised_positions(hf_model, ours_either_way):
    model = ours_either_way(hf_model(**SMALL))
    idx, targets = batch(300), batch(300, seed=2)
    targets[0] = -100
    targets[1, ::3] = -100
    targets[1, 1] = 0
    every = model(idx)[0]
    loss = model(idx, targets)[1]
    expected = F.cross_entropy(every.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    "documents", [None, torch.tensor([0, 7, 20, 40])], ids=["whole rows", "packed"]
)
def test_a_batch_without_supervised_positions_has_loss_zero_and_zero_gradients(
    hf_model, ours_either_way, documents
):
    model = ours_either_way(hf_model(**SMALL))
    loss = model(batch(300), torch.full((2, 20), -100), documents=documents)[1]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# rows of several conversations

# two rows without padding; a single token between two longer conversations; padding behind the last
ROWS = [[13, 27], [40], [9, 1, 12], [17, 5]]
DOCUMENTS = torch.tensor(
    [0, 13, 40, 40, 80, 80, 89, 90, 102, 120, 137, 142, 160, 160, 160], dtype=torch.int32
)


def packed():
    """Return idx and targets (4, 40) of conversations as long as ROWS says, and each by itself,
    [(idx, targets)]."""
    idx, targets = batch(300, 4, 40), batch(300, 4, 40, seed=2)
    targets[:, ::3] = -100
    each = []
    for row, lengths in enumerate(ROWS):
        n = sum(lengths)
        each += zip(idx[row, :n].split(lengths), targets[row, :n].split(lengths), strict=True)
        idx[row, n:], targets[row, n:] = 0, -100
    return idx, targets, each


def assert_gradients_close(model, others, **tolerance):
    for (name, p), other in zip(model.named_parameters(), others, strict=True):
        torch.testing.assert_close(
            p.grad, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_loss_and_every_gradient_of_packed_rows_are_those_of_the_conversations_one_by_one(
    hf_model, ours_either_way
):
    hf = hf_model(**SMALL)
    model = ours_either_way(hf)
    idx, targets, each = packed()
    losses = [
        F.cross_entropy(hf(x[None]).logits[0], y, ignore_index=-100, reduction="sum")
        for x, y in each
    ]
    theirs = sum(losses) / (targets != -100).sum()
    theirs.backward()
    logits, loss = model(idx, targets, documents=DOCUMENTS)
    loss.backward()
    assert logits is None
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert_gradients_close(model, [p.grad for p in hf.parameters()], atol=1e-5, rtol=1e-4)


def test_the_logits_of_packed_rows_are_those_of_the_conversations_one_by_one(
    hf_model, ours_either_way
):
    hf = hf_model(**SMALL)
    idx, _, each = packed()
    with torch.no_grad():
        logits = ours_either_way(hf)(idx, documents=DOCUMENTS)[0]
        expected = [hf(x[None]).logits[0] for x, _ in each]
    parts = []
    for row, lengths in zip(logits, ROWS, strict=True):
        parts += row[: sum(lengths)].split(lengths)
    for ours_, theirs in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, atol=1e-4, rtol=0)


def test_one_document_a_row_is_what_rows_are_without_documents(hf_model, ours_either_way):
    model = ours_either_way(hf_model(**SMALL))
    idx = batch(300, 2, 40)
    documents = torch.tensor([0, 40, 80], dtype=torch.int32)
    torch.testing.assert_close(model(idx, documents=documents)[0], model(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropouts", [(0, 0), (0.3, 0), (0, 0.3)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "packed"])
def test_gradient_checkpointing_leaves_every_bit_of_the_gradients(
    hf_model, ours_either_way, documents, dropouts
):
    model = ours_either_way(hf_model(**SMALL), *dropouts).train()
    idx, targets, _ = packed()
    gradients, flops = [], []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(7)
        with FlopCounterMode(display=False) as counter:
            loss = model(idx, targets, documents=documents)[1]
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        flops.append(counter.get_total_flops())
    assert flops[1] > 1.2 * flops[0]
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


# the head's loss


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(HeadLoss, "ROWS", 64)
    monkeypatch.setattr(HeadLoss, "CPU_ROWS", 24)


def head(N, V=300, C=32):
    """Return x, weight and targets of a head."""
    torch.manual_seed(3)
    weight = (torch.randn(V, C) * 0.3).requires_grad_()
    return torch.randn(N, C, requires_grad=True), weight, torch.randint(V, (N,))


@pytest.mark.parametrize("N", [0, 1, 64, 150])
@pytest.mark.parametrize(
    ("autocast", "tolerance"), [(False, 1e-6), (True, 1e-2)], ids=["float32", "bfloat16"]
)
def test_the_heads_loss_and_gradients_are_those_of_linear_and_cross_entropy(
    in_parts, N, autocast, tolerance
):
    x, weight, targets = head(N)
    exact = F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = HeadLoss.apply(x, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)
    for ours_, theirs in zip(
        *(torch.autograd.grad(t / 7, (x, weight)) for t in (loss, exact)), strict=True
    ):
        assert (ours_.dtype, ours_.shape) == (theirs.dtype, theirs.shape)
        assert (ours_ - theirs).norm() <= tolerance * theirs.norm()


def test_gradients_of_the_heads_loss_are_added_to_those_there_are(in_parts):
    x, weight, targets = head(150)
    for _ in range(2):
        HeadLoss.apply(x, weight, targets).backward()
    once = torch.autograd.grad(
        F.cross_entropy(F.linear(x, weight), targets, reduction="sum"), (x, weight)
    )
    for p, gradient in zip((x, weight), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient, atol=1e-5, rtol=1e-5)


def test_the_heads_gradients_cost_two_more_products_and_none_where_none_are_asked_for(
    hf_model, in_parts
):
    model = speed_up(ours(hf_model(**SMALL)))
    targets = batch(300, seed=2)
    product = 2 * targets.numel() * 300 * 80
    for training, products in ((True, 3), (False, 1)):
        with torch.set_grad_enabled(training):
            x = model.hidden(batch(300))
            with FlopCounterMode(display=False) as counter:
                model.loss(x, targets)
        assert counter.get_total_flops() == products * product


def test_a_second_backward_pass_through_the_heads_loss_fails(in_parts):
    loss = HeadLoss.apply(*head(150))
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="dx"):
        loss.backward()


# dropout


def test_dropout_falls_where_it_falls_in_transformers(hf_gpt2):
    hf = hf_gpt2(**SMALL, embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3, initializer_range=0.1)
    model, idx = ours(hf, 0.3, 0.3), batch(300)
    results = []
    for m in (hf, model):
        m.train()
        torch.manual_seed(7)
        out = m(idx)
        results.append(out.logits if m is hf else out[0])
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)
    assert not torch.allclose(results[1], model.eval()(idx)[0], atol=1e-2)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_is_active_in_training_only(hf_model, name):
    hf, idx = hf_model(**SMALL), batch(300)
    model = ours(hf, **{name: 0.5})
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model(idx)[0], ours(hf)(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_initial_weights_have_gpt2s_statistics():
    torch.manual_seed(0)
    n_layer = 4
    for name, p in GPT(GPTConfig(256, 2000, n_layer, 4, 128)).named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20, name


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_presets_have_as_many_parameters_as_the_published_models(preset, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(**PRESETS[preset])).num_parameters() == parameters


def test_training_gpt2_takes_855_megaflop_a_token():
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS["gpt2"]))
    # by hand: per layer 12 C^2 weights and 13 C biases and LayerNorms, then ln_f and the head;
    # attention 12 L C T
    weights = 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + 50257 * 768
    assert model.flops_per_token(1024) == 6 * weights + 12 * 12 * 768 * 1024
    assert round(model.flops_per_token(1024) / 1e6) == 855
    assert (
        model.flops_per_token(1024) - model.flops_per_token(1024, supervised=0.25)
        == 6 * 0.75 * 50257 * 768
    )


def test_growing_the_vocabulary_keeps_the_old_logits_and_the_tie(hf_model):
    model = ours(hf_model(**SMALL))
    idx = batch(300)
    before = model(idx)[0]
    mean = model.transformer.wte.weight.mean(0)
    model.grow_vocab(305)
    after = model(torch.cat([idx, torch.full((2, 1), 304)], dim=1))[0]
    assert after.shape == (2, 21, 305)
    torch.testing.assert_close(after[:, :20, :300], before)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.requires_grad
    assert model.config.vocab_size == 305
    for new in model.transformer.wte.weight[300:]:
        torch.testing.assert_close(new, mean)


def test_more_tokens_than_positions_are_refused(hf_model):
    model = ours(hf_model(**SMALL))
    assert model(batch(300, T=96))[0].shape == (2, 96, 300)
    with pytest.raises(ValueError, match=r"97.*96"):
        model(batch(300, T=97))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"n_embd=80.*n_head=3"):
        GPT(GPTConfig(n_embd=80, n_head=3))


def test_the_loss_is_float32_whatever_the_weights_are(hf_model):
    assert ours(hf_model(**SMALL)).bfloat16()(batch(300), batch(300))[1].dtype == torch.float32


def test_bfloat16_autocast_stays_close_to_float32(hf_gpt2):
    model = ours(hf_gpt2(**SMALL, initializer_range=0.1))
    idx, targets = batch(300), batch(300, seed=2)
    exact = model(idx, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    for gradients in zip(
        *(torch.autograd.grad(x, list(model.parameters())) for x in (exact, loss)), strict=True
    ):
        assert gradients[1].dtype == torch.float32
        assert F.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.99


def test_generate_is_the_loop_of_transformers_generate(hf_model):
    hf = hf_model(**SMALL)
    model = ours(hf)
    prompt = batch(300, T=7)
    expected = hf.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)


def test_generate_samples_from_the_top_k_in_proportion_to_their_probability(hf_model):
    model = ours(hf_model(**SMALL | {"n_layer": 1, "n_head": 1, "n_embd": 8}))
    prompt = batch(300, rows=1, T=5)
    logits = model(prompt)[0][0, -1].detach()
    top, ids = logits.topk(4)
    torch.manual_seed(0)
    drawn = model.generate(prompt.expand(20_000, -1), 1, temperature=0.7, top_k=4)[:, -1]
    shares = torch.stack([(drawn == i).double().mean() for i in ids])
    assert shares.sum() == 1
    torch.testing.assert_close(shares, (top / 0.7).softmax(-1).double(), atol=0.015, rtol=0)


def test_generate_goes_on_beyond_the_context(hf_model):
    model = ours(hf_model(**SMALL))
    text = model.generate(batch(300, rows=1, T=95), 4, temperature=0)
    assert text.shape == (1, 99)
    assert text[0, -1] == model(text[:, -97:-1])[0][0, -1].argmax()
