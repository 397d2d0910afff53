"""Devices and dtypes: what auto picks, and what is refused."""

import pytest
import torch

from nanochatgpt.device import FBGEMM, pick_device, pick_dtype


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_picks_the_fastest_device_of_the_machine(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == expected
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["tpu", "", "cuda", "cuda:1"])
def test_a_device_that_the_machine_lacks_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device={name} .*cpu"):
        pick_device(name)


def test_auto_is_float32_off_cuda_and_sixteen_bits_on_it():
    assert pick_dtype("auto", "cpu") == pick_dtype("auto", "mps") == torch.float32
    assert pick_dtype("auto", "cuda:0") in (torch.bfloat16, torch.float16)


@pytest.mark.skipif(not FBGEMM, reason="the kernels are for x86")
def test_on_an_x86_cpu_inference_is_in_float16_and_may_be_in_int8():
    assert pick_dtype("auto", "cpu", inference=True) == torch.float16
    assert pick_dtype("int8", "cpu", inference=True) == torch.int8
    for device, inference in (("cpu", False), ("cuda", True), ("cuda", False), ("mps", True)):
        with pytest.raises(ValueError, match="dtype=int8"):
            pick_dtype("int8", device, inference=inference)


@pytest.mark.parametrize("inference", [True, False])
def test_a_dtype_that_is_named_is_taken_and_no_other(inference):
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(name, "cpu", inference) == getattr(torch, name)
    for name in ("float64", "int4", "bf16", "nn", ""):
        with pytest.raises(ValueError, match=f"dtype={name} .*bfloat16"):
            pick_dtype(name, "cpu", inference)
