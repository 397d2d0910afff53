"""Packed layers are as near to float32 as their rounding allows, and a row gives the same whatever
the other rows are."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from forked import Forked

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.device import FBGEMM
from nanochatgpt.quantize import LAYERS, BFloat16Linear, Float16Linear, Int8Linear
from nanochatgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not FBGEMM, reason="the kernels are for x86")

LINEARS = [Float16Linear, BFloat16Linear, Int8Linear]
DTYPES = [torch.float16, torch.bfloat16, torch.int8]
SHAPES = [(1, 1), (7, 33), (64, 64), (130, 768), (1, 100), (100, 1)]  # (n_out, n_in)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums(x, weight):
    """Return sum |x_i w_i| of each output, in float64: what errors of products are relative to."""
    return x.double().abs() @ weight.double().abs().T


def bound(Linear, x, weight, bias, y):
    """Return how far an output may be from that of float32 weights, for exact results y."""
    total = sums(x, weight)
    added = 0.0 if bias is None else bias.double().abs()
    n_in = weight.size(1)
    x, weight = x.double(), weight.double()
    noise = (n_in + 2) * 2**-24 * (total + added)  # of a sum in float32
    if Linear is Float16Linear:  # 11 bits: half a unit of each weight, which below 2**-14 is 2**-25
        return 2**-11 * total + 2**-25 * x.abs().sum(-1, keepdim=True) + noise
    if Linear is BFloat16Linear:
        # 8 bits, of weights and inputs; of the bias; of the sum, before and after the bias
        inputs = (2**-7 + 2**-16) * total + 2**-8 * added
        return inputs + 2**-8 * (2 * y.abs() + added + 2 * inputs) + noise
    # half a step of each input and of each weight
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    step_x = (high - low) / Int8Linear.LEVELS / 2  # (..., 1)
    step_w = weight.abs().amax(1) / 127 / 2  # (n_out,)
    rounding = step_x * weight.abs().sum(1) + step_w * x.abs().sum(-1, keepdim=True)
    return rounding + n_in * step_x * step_w + noise


@pytest.mark.parametrize("Linear", LINEARS)
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
@pytest.mark.parametrize("batch", [(1,), (5,), (1, 1), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_outputs_are_those_of_float32_up_to_the_rounding_of_each_factor(
    Linear, n_out, n_in, batch, biased
):
    weight, x = numbers(n_out, n_in, seed=1) * 0.1, numbers(*batch, n_in, seed=2)
    bias = numbers(n_out, seed=3) if biased else None
    y = Linear(weight, bias)(x)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == expected.shape
    assert y.dtype == torch.float32
    assert ((y - expected).abs() <= bound(Linear, x, weight, bias, expected)).all()


@pytest.mark.parametrize("Linear", LINEARS)
def test_the_weights_are_copied(Linear):
    weight, bias, x = numbers(7, 33, seed=1), numbers(7, seed=2), numbers(2, 33, seed=3)
    layer = Linear(weight, bias)
    before = layer(x).clone()
    weight.zero_()
    bias.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("Linear", LINEARS)
def test_inputs_that_are_views_give_what_their_copies_give(Linear):
    layer = Linear(numbers(7, 33, seed=1), numbers(7, seed=2))
    x = numbers(3, 33, 4, seed=3).transpose(1, 2)  # (3, 4, 33), not contiguous
    before = x.clone()
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert torch.equal(layer(x[0, :1]), layer(x[0, :1].contiguous()))
    assert torch.equal(x, before)  # and are left as they are


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_float16_is_a_linear_layer_with_the_weights_rounded_to_float16(rows, biased, n_out, n_in):
    weight, x = numbers(n_out, n_in, seed=1) * 0.1, numbers(rows, n_in, seed=2)
    bias = numbers(n_out, seed=3) if biased else None
    expected = F.linear(x.double(), weight.half().double(), None if bias is None else bias.double())
    error = (Float16Linear(weight, bias)(x) - expected).abs()
    assert (error <= 1e-5 * (sums(x, weight) + (0 if bias is None else bias.abs()))).all()


def integer_linear(x, weight, bias):
    """Return what integers give for a row (n_in,): it has 8 bits between its extremes, and so have
    the weights of each output."""
    w_scale = weight.abs().amax(1) / 127  # (n_out,)
    w = (weight / w_scale[:, None]).round().long()
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    scale = (high - low) / Int8Linear.LEVELS
    zero = round(-low / scale)
    levels = torch.tensor([round(v / scale) for v in x.tolist()])
    levels = (levels + zero).clamp(0, Int8Linear.LEVELS) - zero
    y = (levels * w).sum(1).double() * scale * w_scale.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_int8_is_a_sum_of_integers(rows, biased, shift, n_out, n_in):
    weight, x = numbers(n_out, n_in, seed=1) * 0.1, numbers(rows, n_in, seed=2) + shift
    bias = numbers(n_out, seed=3) if biased else None
    y = Int8Linear(weight, bias)(x)
    for row, result in zip(x, y, strict=True):
        error = (result - integer_linear(row, weight, bias)).abs()
        assert (error <= 1e-5 * (sums(row, weight) + (0 if bias is None else bias.abs()))).all()


@pytest.mark.parametrize("Linear", LINEARS)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-5, 1e3])
@pytest.mark.parametrize("neighbours", [1e-3, 1.0, 1e3])
def test_a_row_gives_the_same_alone_and_among_others_whatever_their_size(Linear, scale, neighbours):
    weight, bias = numbers(64, 300, seed=1) * 0.1, numbers(64, seed=2) * scale
    layer = Linear(weight, bias)
    row, others = numbers(1, 300, seed=3) * scale, numbers(7, 300, seed=4) * neighbours * scale
    x = torch.cat([others[:4], row, others[4:]])
    alone = layer(row)[0]
    total = sums(row[0], weight) + bias.abs()
    # bfloat16 rounds outputs: two nearly equal sums may be neighbours, 2**-7 of their size apart
    apart = 2**-7 * alone.abs() if Linear is BFloat16Linear else 0.0
    for among in (layer(x)[4], layer(x.view(2, 4, 300))[1, 0]):
        assert ((among - alone).abs() <= 1e-5 * total + apart).all()


@pytest.mark.parametrize("Linear", LINEARS)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_zeros_and_weights_of_zeros_give_the_bias(Linear, rows):
    weight, bias = numbers(9, 33, seed=1), numbers(9, seed=2).bfloat16().float()
    zeros = torch.zeros(rows, 33)
    assert torch.equal(Linear(weight, bias)(zeros), bias.expand(rows, -1))
    assert torch.equal(Linear(weight)(zeros), torch.zeros(rows, 9))
    x = numbers(rows, 33, seed=3)
    torch.testing.assert_close(
        Linear(torch.zeros(9, 33), bias)(x), bias.expand(rows, -1), rtol=1e-6, atol=1e-6
    )
    weight[4] = 0  # of a single output
    torch.testing.assert_close(
        Linear(weight, bias)(x)[:, 4], bias[4].expand(rows), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("Linear", LINEARS)
def test_a_row_of_zeros_among_others_gives_the_bias(Linear):
    weight, bias = numbers(9, 33, seed=1), numbers(9, seed=2).bfloat16().float()
    x = numbers(3, 33, seed=3)
    x[1] = 0
    y = Linear(weight, bias)(x)
    assert torch.equal(y[1], bias)
    assert y.isfinite().all()


# whole models


@pytest.fixture(scope="module")
def small():
    """A model with weights that are large enough for distributions far from even."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1) if p.dim() == 1 else p.mul_(5)
        for name, p in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return model


@pytest.fixture(scope="module")
def directory(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_model(small, Tokenizer(), folder)
    return str(folder)


IDX = torch.randint(0, 50257, (3, 30), generator=torch.Generator().manual_seed(5))

# Standard error of a logit relative to the size of the logits: each factor of a product is rounded
# to a number of steps, and a model of two layers adds up the errors of nine products in a row.
NEAR = {torch.float16: 2**-11 * 2, torch.bfloat16: 2**-8 * 4, torch.int8: 2**-7 * 4}


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_packed_model_has_the_logits_of_float32_up_to_rounding(small, directory, dtype):
    model, _ = load_model(directory, dtype=dtype, inference=True)
    expected = small(IDX)[0]
    logits = model.eval()(IDX)[0]
    assert logits.dtype == torch.float32
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < NEAR[dtype]  # 0 would be float32 itself


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_has_the_same_shape_and_nothing_to_train_or_save(
    small, directory, tmp_path, dtype
):
    model, tokenizer = load_model(directory, dtype=dtype, inference=True)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    assert model.config == small.config
    n_parameters = sum(p.numel() for p in small.parameters())
    assert model.num_parameters() == small.num_parameters() == n_parameters
    assert tokenizer.encode("hello") == Tokenizer().encode("hello")
    packed = [module for module in model.modules() if isinstance(module, LAYERS[dtype])]
    assert len(packed) == 2 * 4 + 1  # of each block, and the head
    with pytest.raises(ValueError, match="packed"):
        save_model(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@torch.inference_mode()
def test_what_becomes_of_the_file_does_not_reach_the_model(directory, tmp_path, dtype):
    folder = shutil.copytree(directory, tmp_path / "copy")
    model = load_model(str(folder), dtype=dtype, inference=True)[0].eval()
    before = model(IDX)[0].clone()
    with open(folder / "model.safetensors", "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(model(IDX)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_inference_or_in_float32_the_model_is_plain_and_can_be_trained_and_saved(
    small, directory, tmp_path, dtype
):
    model, tokenizer = load_model(directory, dtype=dtype, inference=dtype == torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, tensor in small.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name
    save_model(model, tokenizer, tmp_path / "again")
    again, _ = load_model(str(tmp_path / "again"), dtype=dtype)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


PEAK = """
import ctypes
import re
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from nanochatgpt import huggingface
from nanochatgpt.checkpoint import load_model

def peak():  # not ru_maxrss: that begins with the memory of the process which started this one
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

huggingface.read_tokenizer = lambda directory: SimpleNamespace(n_vocab=1)  # takes memory too
# what is freed goes back at once: how much glibc's heap would keep differs from run to run
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
tiny, directory = sys.argv[1:]
for dtype in (torch.float32, torch.int8):  # in this order: after packing, glibc keeps what is freed
    load_model(tiny, dtype=dtype, inference=True)  # loads the kernels: some 100 MB
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    load_model(directory, dtype=dtype, inference=True)
    print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_loading_never_holds_a_second_copy_of_the_weights(tmp_path):
    save_model(GPT(GPTConfig(64, 512, 1, 2, 64)), Tokenizer(), tmp_path / "tiny")
    # 28M parameters, and no tensor has more than a tenth of them
    save_model(GPT(GPTConfig(1024, 4000, 8, 8, 512)), Tokenizer(), tmp_path / "deep")
    size = (tmp_path / "deep" / "model.safetensors").stat().st_size
    done = Forked(["-c", PEAK, tmp_path / "tiny", tmp_path / "deep"], ROOT).wait()
    assert done.returncode == 0, done.stderr
    float32, int8 = (int(line) / size for line in done.stdout.split())
    # a quarter, half of the embedding, and three of the largest tensor in passing; with the float32
    # weights it is 1.25
    assert 0.25 < int8 < 0.75
    # the weights, and a tensor in passing; with the whole file as well it is 2
    assert 1.0 < float32 < 1.25
