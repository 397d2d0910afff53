"""What only a GPU would run, rehearsed on a CPU: the branches are chosen by hand, and kernels that
exist on CUDA only have a stand-in with the same signature, which computes the plain way."""

import functools
import inspect
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig, packed_attention
from nanochatgpt import device, engine, fast, recording
from nanochatgpt.engine import Engine, Step
from nanochatgpt.fast import HeadLoss, compiled, speed_up
from nanochatgpt.recording import RECORD_AFTER, StepRunner
from nanochatgpt.sampling import Sampling

DOCUMENTS = torch.tensor([0, 5, 5, 32, 50, 64], dtype=torch.int32)  # of two rows of 32 tokens


@pytest.fixture
def gpu(monkeypatch):
    """Take the branches of a GPU."""
    for module in (device, engine, fast, recording):
        monkeypatch.setattr(module, "is_cuda", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())


def small_gpt(**shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 64, "vocab_size": 103, "n_layer": 2} | shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


# --- the head's loss ------------------------------------------------------------------------------


def mm(a, b, *, out_dtype=None):
    """torch.mm, whose out_dtype only CUDA has; it takes 16-bit factors and gives float32."""
    if out_dtype is None:
        return a @ b
    assert a.dtype == b.dtype != torch.float32
    assert out_dtype == torch.float32
    return a.float() @ b.float()


def test_mm_has_an_out_dtype():
    arguments = {a.name: str(a.type) for a in torch.ops.aten.mm.dtype._schema.arguments}
    assert arguments == {"self": "Tensor", "mat2": "Tensor", "out_dtype": "int"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_heads_loss_with_a_padded_vocabulary_and_wide_sums(gpu, monkeypatch, dtype):
    torch.manual_seed(1)
    x = torch.randn(90, 24, requires_grad=True)
    weight = torch.randn(103, 24, requires_grad=True)
    targets = torch.randint(0, 103, (90,))
    expected = F.cross_entropy((x.to(dtype) @ weight.to(dtype).T).float(), targets, reduction="sum")
    gradients = torch.autograd.grad(expected, (x, weight))
    monkeypatch.setattr(HeadLoss, "ROWS", 40)
    sums = []
    monkeypatch.setattr(fast.torch, "mm", lambda *args, **out: sums.append(out) or mm(*args, **out))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = HeadLoss.apply(x, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert sums == 3 * [{} if dtype == torch.float32 else {"out_dtype": torch.float32}]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for ours, theirs in zip(torch.autograd.grad(loss, (x, weight)), gradients, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


# --- attention ------------------------------------------------------------------------------------


def varlen(call):
    """varlen_attn of these arguments, document by document; on a GPU FlashAttention computes it."""
    q, k, v, ends = call["query"], call["key"], call["value"], call["cu_seq_q"]
    assert q.dim() == 3 and q.shape == k.shape == v.shape
    assert q.dtype in (torch.float16, torch.bfloat16) and q.stride(-1) == 1
    assert ends.dtype == torch.int32 and ends is call["cu_seq_k"]
    assert max(ends.diff()) <= call["max_q"] == call["max_k"]
    assert call["window_size"] == (-1, 0)  # causal
    parts = []
    for start, stop in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        document = [x[start:stop].transpose(0, 1) for x in (q, k, v)]  # (nh, n, hs) each
        parts.append(F.scaled_dot_product_attention(*document, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def flash(gpu, monkeypatch):
    """A GPU of compute capability 8.0, with `varlen` counting its calls."""
    if torch.__version__ < (2, 11):
        pytest.skip("varlen_attn takes no window_size: packed rows need a mask")
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)
    calls = []

    def stand_in(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        return varlen(calls[-1])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_take_flash_attention_with_dropout_elsewhere(
    flash, monkeypatch, dtype, checkpointing
):
    monkeypatch.setattr(fast.torch, "mm", mm)
    model = small_gpt(n_head=2, n_embd=32, dropout=0.1).to(dtype).train()
    model.gradient_checkpointing = checkpointing
    idx, targets = torch.randint(0, 103, (2, 2, 32))
    results = []
    for attention in (packed_attention, None):
        speed_up(model)
        if attention:
            model.packed_attention = attention
        torch.manual_seed(3)
        loss = model(idx, targets, DOCUMENTS)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(flash) == 2 * (1 + checkpointing)  # layers, and once more when recomputed
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused.float(), plain.float(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    ("shape", "training", "dtype", "capability", "version", "expected"),
    [
        ({}, True, torch.bfloat16, (8, 0), "2.13.0", True),
        ({}, True, torch.float16, (9, 0), "2.11.0", True),
        ({}, True, torch.float32, (9, 0), "2.13.0", False),
        ({"attention_dropout": 0.1}, True, torch.bfloat16, (9, 0), "2.13.0", False),
        ({"attention_dropout": 0.1}, False, torch.bfloat16, (9, 0), "2.13.0", True),
        ({"n_head": 1, "n_embd": 12}, True, torch.bfloat16, (9, 0), "2.13.0", False),
        ({"n_head": 1, "n_embd": 264}, True, torch.bfloat16, (9, 0), "2.13.0", False),
        ({"n_head": 1, "n_embd": 256}, True, torch.bfloat16, (9, 0), "2.13.0", True),
        ({}, True, torch.float16, (7, 5), "2.13.0", False),  # a T4
        ({}, True, torch.bfloat16, (8, 0), "2.10.0", False),  # without window_size
    ],
)
def test_flash_attention_is_chosen_within_its_limits(
    monkeypatch, shape, training, dtype, capability, version, expected
):
    model = small_gpt(**{"n_head": 2, "n_embd": 32} | shape).to(dtype).train(training)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert fast._flash_can(model, "cuda") is expected


def test_under_autocast_the_weights_may_be_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    model = small_gpt(n_head=2, n_embd=32).train()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert fast._flash_can(model, "cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert not fast._flash_can(model, "cuda")


# --- torch.compile --------------------------------------------------------------------------------


def test_compile_makes_one_graph_for_a_shape_and_none_for_a_batch(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    model = compiled(speed_up(small_gpt(n_head=2, n_embd=32, dropout=0.1).train()))
    for number in range(5):
        idx, targets = torch.randint(0, 103, (2, 2, 32))
        targets[torch.rand(2, 32) < 0.1 * number] = -100  # any number of supervised tokens
        ends = torch.cat([torch.tensor([0, 32, 64]), torch.randint(1, 64, (3,))]).sort().values
        loss = model(idx, targets, ends.int())[1]
        loss.backward()
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        model(idx, targets, ends.int())
    assert counter.frame_count == 2


# --- recorded steps -------------------------------------------------------------------------------


class Graph(TorchDispatchMode):
    """Records operations on tensors, and replays them on the very same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                old.copy_(new)


def tensors(result):
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if x is not None]


@pytest.fixture
def graphs(gpu, monkeypatch):
    """The graphs that are recorded, in the place of CUDA's."""
    made = []

    signature = inspect.signature(torch.cuda.graph)

    @contextmanager
    def record(*args, **options):
        call = signature.bind(*args, **options).arguments
        assert call["pool"] == "pool" and call["capture_error_mode"] == "thread_local"
        made.append(call["cuda_graph"])
        with call["cuda_graph"]:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": record,
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_a_recorded_step_is_replayed_with_what_changes_between_steps(graphs, monkeypatch):
    monkeypatch.setattr(recording, "RECORD_AFTER", 3)
    model = small_gpt(n_head=2, n_embd=32, vocab_size=50257).eval()
    replies = []
    for recorded in (False, True):
        rows = Engine(model, rows=2, record=False)
        if recorded:  # as on a GPU: lengths in chunks, of 16 tokens here
            rows.exact_length = False
            rows.chunk = 16
            rows.run_step = StepRunner(Step(model, False), rows.device, True, False)
        tokens = []
        for step in range(70):
            if step == 0:
                rows.add([5, 6, 7], Sampling(max_new_tokens=30, temperature=0))
            if step == 10:  # joins, and goes on alone for a while
                rows.add([9] * 4, Sampling(max_new_tokens=50, temperature=0.7), seed=1)
            if step == 50:  # in the place of the first
                rows.add([8, 3], Sampling(max_new_tokens=20, temperature=0))
            tokens += rows.step() if rows.running else []
        assert Counter(token.row for token in tokens) == {0: 50, 1: 50}
        replies.append([(token.row, token.id) for token in tokens])
    assert replies[0] == replies[1]
    assert graphs and all(graph.calls for graph in graphs)


@torch.inference_mode()
def test_a_shape_is_recorded_once_and_only_if_it_keeps_coming(graphs):
    model = small_gpt(n_head=2, n_embd=32).eval()
    runner = StepRunner(Step(model, False), torch.device("cpu"), True, False)
    kv = torch.zeros(2, 2, 1, 2, 16, 16)
    for n in range(RECORD_AFTER - 1):
        runner(torch.tensor([[1], [n % 16]]), kv)
    assert not graphs
    inputs = torch.tensor([[1], [3]])
    expected = Step(model, False)(inputs, kv).clone()
    for _ in range(3):
        torch.testing.assert_close(runner(inputs, kv), expected)
    assert len(graphs) == 1


# --- copies ---------------------------------------------------------------------------------------


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for(gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x.clone())
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **options: calls.append(options) or x)
    x = torch.arange(6)[::2]
    assert torch.equal(device.move(x, "cpu"), x)
    assert calls == ["pinned", {"non_blocking": True}]
