"""What a run says of itself: when it goes wrong, and how fast its device could be."""

import math

import pytest
import torch

from nanochatgpt.device import peak_flops
from nanochatgpt.monitor import LIMITS, DivergenceCheck

CUDA = torch.device("cuda")


def watch(name, values, first=1, trouble=None):
    """Let a run's values, one a step, be checked; return the DivergenceCheck that saw them."""
    trouble = trouble or DivergenceCheck()
    for it, value in enumerate(values, first):
        trouble.check(name, value, it)
    return trouble


# --- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_trouble_from_the_first_step_on(name, value):
    with pytest.raises(
        ValueError, match=f"^the {name} is {value} at iter 1: the run diverges. Lower learning_rate"
    ):
        watch(name, [value])


@pytest.mark.parametrize(
    ("name", "usual", "just_too_high"),
    [("loss", 3.0, 7.0), ("validation loss", 3.0, 7.0), ("gradient norm", 1.5, 250)],
)
def test_trouble_is_a_value_of_so_many_times_the_usual_and_so_much_more(name, usual, just_too_high):
    trouble = watch(name, [usual] * 10 + [0.999 * just_too_high])
    with pytest.raises(
        ValueError, match=f"^the {name} is {just_too_high:.4g} at iter 12, {usual:g} before: "
    ):
        trouble.check(name, just_too_high, 12)


def test_nothing_is_usual_before_the_tenth_value():
    watch("loss", [3.0] * 9 + [1000.0])
    with pytest.raises(ValueError, match="the loss is 1000 at iter 11, 3 before"):
        watch("loss", [3.0] * 10 + [1000.0])


def test_a_value_that_is_given_as_the_usual_counts_from_the_first_on():
    trouble = DivergenceCheck()
    trouble.check("validation loss", 10.8, 0, math.inf)
    trouble.check("validation loss", 22.5, 5, 10.8)
    with pytest.raises(ValueError, match=r"the validation loss is 22.7 at iter 10, 10.8 before"):
        trouble.check("validation loss", 22.7, 10, 10.8)


def test_the_usual_is_the_median_so_that_a_few_high_values_do_not_raise_it():
    trouble = watch("loss", [3.0] * 16 + [6.9] * 4)
    with pytest.raises(ValueError, match=", 3 before"):
        trouble.check("loss", 7.1, 21)


def test_the_usual_follows_the_run_and_forgets_what_was_a_hundred_values_ago():
    falling = [10.0] * 50 + [1.0] * 100
    with pytest.raises(ValueError, match=r"the loss is 3.5 at iter 151, 1 before"):
        watch("loss", [*falling, 3.5])
    watch("loss", [10.0] * 52 + [1.0] * 48 + [3.5])  # half of the last hundred are still high


def test_a_loss_near_zero_may_be_many_times_itself():
    watch("loss", [0.001] * 50 + [0.9])
    watch("gradient norm", [0.01] * 50 + [99.0])


def test_a_noisy_run_that_learns_is_no_trouble():
    torch.manual_seed(0)
    noise = torch.randn(1000).mul(0.2).exp()
    watch("loss", [(11 * 0.995**i + 2) * noise[i].item() for i in range(1000)])
    watch("gradient norm", (noise**5).tolist())


def test_each_quantity_is_judged_by_its_own_past():
    trouble = watch("loss", [3.0] * 20)
    watch("gradient norm", [90.0] * 20, trouble=trouble)
    watch("loss", [3.0], first=21, trouble=trouble)


def test_a_value_that_was_trouble_does_not_become_the_usual():
    trouble = watch("loss", [3.0] * 10)
    for _ in range(200):
        with pytest.raises(ValueError, match=", 3 before"):
            trouble.check("loss", 100.0, 11)


# --- the device's peak ------------------------------------------------------------------------------------------------


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
    ],
)
def test_a_devices_peak_is_found_by_its_name(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA) == peak_flops("cuda:1") == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA L40", "NVIDIA T400 4GB", "Quadro P4000", "NVIDIA GeForce GTX 1080", ""]
)
def test_a_device_that_is_not_in_the_table_has_no_peak(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA) is None


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_without_tensor_cores_has_no_peak(device):
    assert peak_flops(device) is None
