"""A run's log, its divergence check and its end by a signal; the peak FLOP/s of its device."""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import largest_file

from nanochatgpt.device import move, peak_flops, pick_device, pick_dtype
from nanochatgpt.monitor import LIMITS, DivergenceCheck, Log, StopSignal, read_log, time_left


def check_all(name, values, first=1, divergence=None):
    """Check a run's values, one per step; return the DivergenceCheck."""
    divergence = divergence or DivergenceCheck()
    for it, value in enumerate(values, first):
        divergence.check(name, value, it)
    return divergence


# --- the log --------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_the_log_of_its_first_part(tmp_path):
    config = SimpleNamespace(out_dir=str(tmp_path), wandb_log=False)
    log = Log(config, 0)
    log(iter=0, val_loss=3.0)
    log(iter=1, loss=math.nan, lr=0.1)
    log(iter=2, loss=2.0, grad_norm=math.inf)
    log(iter=2, val_loss=2.5)
    log(iter=3, loss=1.0)
    log.file.write('{"iter": 4, "lo')  # killed
    log.file.close()

    # the steps up to 2 are done, the evaluation after them is repeated
    log = Log(config, 2)
    log(iter=2, val_loss=2.25)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert records == [
        {"iter": 0, "val_loss": 3.0},
        {"iter": 1, "loss": None, "lr": 0.1},
        {"iter": 2, "loss": 2.0, "grad_norm": None},
        {"iter": 2, "val_loss": 2.25},
    ]
    assert [record for _, record in read_log(tmp_path / "metrics.jsonl")] == records

    # a new run starts a new log
    Log(config, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_file_that_is_not_a_log_is_refused_and_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("[1]", "null", '{"loss": 1}', '{"iter": "1"}', '{"iter": 1, "loss": "low"}'):
        path.write_text(line)
        with pytest.raises(ValueError, match=r"metrics\.jsonl"):
            Log(SimpleNamespace(out_dir=str(tmp_path), wandb_log=False), 5)
        assert path.read_text() == line


@dataclass
class WandbConfig:
    out_dir: str
    wandb_log: bool = True


def test_a_resumed_run_goes_on_in_the_same_run_at_weights_and_biases(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(id=options.get("id") or f"run{len(calls)}")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    config = WandbConfig(str(tmp_path))
    for first_iter in (0, 5, 9, 0):  # a new run, resumed twice; another new run
        Log(config, first_iter)
    assert [(call.get("id"), call.get("resume")) for call in calls] == [
        (None, None),
        ("run1", "allow"),
        ("run1", "allow"),
        (None, None),
    ]


def test_a_full_disk_names_the_log(tmp_path):
    log = Log(SimpleNamespace(out_dir=str(tmp_path), wandb_log=False), 0)
    log(iter=0, val_loss=3.0)
    with largest_file(40), pytest.raises(OSError) as error:
        for it in range(1, 10):
            log(iter=it, loss=2.0)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    ((_, first), *_) = read_log(tmp_path / "metrics.jsonl")
    assert first == {"iter": 0, "val_loss": 3.0}


def test_time_left_is_hours_minutes_and_seconds():
    assert time_left(754.4) == "0:12:34"


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_diverge_from_the_first_step_on(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value} at iter 1: .*learning_rate"):
        check_all(name, [value])


@pytest.mark.parametrize(
    ("name", "usual", "too_high"),
    [("loss", 3.0, 7.0), ("validation loss", 3.0, 7.0), ("gradient norm", 1.5, 250)],
)
def test_a_value_far_above_the_median_diverges(name, usual, too_high):
    divergence = check_all(name, [usual] * 10 + [0.999 * too_high])
    for it in (12, 13, 14):  # and does not become usual
        with pytest.raises(ValueError, match=f"{name} is {too_high:.4g} at iter {it}, {usual:g} "):
            divergence.check(name, too_high, it)


def test_the_first_ten_values_are_not_compared():
    check_all("loss", [3.0] * 9 + [1000.0])
    with pytest.raises(ValueError, match="1000 at iter 11, 3 before"):
        check_all("loss", [3.0] * 10 + [1000.0])


def test_a_given_usual_value_counts_from_the_first_on():
    divergence = DivergenceCheck()
    divergence.check("validation loss", 10.8, 0, math.inf)
    divergence.check("validation loss", 22.5, 5, 10.8)
    with pytest.raises(ValueError, match=r"22.7 at iter 10, 10.8 before"):
        divergence.check("validation loss", 22.7, 10, 10.8)


def test_the_usual_value_is_the_median_of_the_last_hundred():
    with pytest.raises(ValueError, match=", 3 before"):  # a few high values do not raise it
        check_all("loss", [3.0] * 16 + [6.9] * 4 + [7.1])
    with pytest.raises(ValueError, match=r"3.5 at iter 151, 1 before"):
        check_all("loss", [10.0] * 50 + [1.0] * 100 + [3.5])
    check_all("loss", [10.0] * 52 + [1.0] * 48 + [3.5])  # half of the hundred are still high


def test_a_run_that_learns_does_not_diverge():
    check_all("loss", [0.001] * 50 + [0.9])  # many times a loss near zero is still little
    check_all("gradient norm", [0.01] * 50 + [99.0])
    torch.manual_seed(0)
    noise = torch.randn(1000).mul(0.2).exp()
    check_all("loss", [(11 * 0.995**i + 2) * noise[i].item() for i in range(1000)])
    check_all("gradient norm", (noise**5).tolist())


def test_each_quantity_has_its_own_history():
    divergence = check_all("loss", [3.0] * 20)
    check_all("gradient norm", [90.0] * 20, divergence=divergence)
    check_all("loss", [3.0], first=21, divergence=divergence)


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopSignal()
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        default = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        assert signal.getsignal(number) == default[number]
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


# --- the device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA L40", None),
        ("NVIDIA T400 4GB", None),
        ("Quadro P4000", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_device_depends_on_its_name(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:1") == (teraflops and teraflops * 1e12)
    assert peak_flops("cpu") is peak_flops("mps") is None


def test_auto_is_the_best_device_and_a_missing_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == "cuda"
    assert [pick_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "mps", "meta", "gpu", ""):
        with pytest.raises(ValueError, match=f"device={name} .*cuda:1, cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == "mps"


@pytest.mark.parametrize(
    ("device", "x86", "bf16", "training", "inference"),
    [
        ("cuda:1", True, True, "bfloat16", "bfloat16"),
        ("cuda", True, False, "float16", "float16"),
        ("cpu", True, False, "float32", "float16"),
        ("cpu", False, False, "float32", "float32"),
        ("mps", False, False, "float32", "float32"),
    ],
)
def test_auto_is_the_fastest_dtype(monkeypatch, device, x86, bf16, training, inference):
    monkeypatch.setattr("nanochatgpt.device.FBGEMM", x86)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert pick_dtype("auto", device) == getattr(torch, training)
    assert pick_dtype("auto", device, inference=True) == getattr(torch, inference)


def test_int8_is_for_inference_on_an_x86_cpu(monkeypatch):
    monkeypatch.setattr("nanochatgpt.device.FBGEMM", True)
    assert pick_dtype("int8", "cpu", inference=True) == torch.int8
    for name, device, inference in (
        ("int8", "cuda", True),
        ("int8", "cpu", False),
        ("float64", "cpu", True),
    ):
        with pytest.raises(ValueError, match=f"dtype={name} .*bfloat16"):
            pick_dtype(name, device, inference)


def test_move_leaves_a_tensor_on_its_device_alone():
    tensor = torch.arange(3)
    assert move(tensor, "cpu") is tensor
