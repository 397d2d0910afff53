"""
Where to compute, and in which precision; what there is of speed and memory.
"""

import contextlib
import ctypes
import re
import sys
from pathlib import Path

import torch

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # the 8- and 16-bit kernels for x86
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
# pattern in the device's name -> dense bf16 or fp16 FLOP/s, accumulated in fp32, from the makers' datasheets
PEAK_FLOPS = {
    r"H200|H100(?! PCIe)": 989e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    r"L4\b": 121e12,
}
PEAK_FLOPS |= {
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
    "V100": 125e12,
    r"T4\b": 65e12,
}


def pick_device(name):
    """Return the device of a `device` knob; 'auto' is CUDA, else Apple's MPS, else the CPU. Raises ValueError for one
    that this machine has not."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, there in available.items() if there)
    with contextlib.suppress(RuntimeError):  # of torch.device, for a name that is none
        device = torch.device(name)
        if available.get(device.type) and (
            device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
        ):
            return name if device.type == "cuda" else device.type
    there = ", ".join(device for device, there in available.items() if there)
    raise ValueError(f"device={name} is not there; this machine has {there}")


def pick_dtype(name, device, inference=False):
    """Return the torch dtype of a `dtype` knob. 'auto' is bfloat16 (or float16) on CUDA, else float32; for inference
    on an x86 CPU float16, which is faster there and whose text is float32's. int8 is for inference on such a CPU."""
    device = torch.device(device).type
    if name == "auto":
        in_hardware = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        half = device == "cuda" or (inference and device == "cpu" and FBGEMM)
        name = "bfloat16" if in_hardware else "float16" if half else "float32"
    if name == "int8" and inference:
        if device != "cpu" or not FBGEMM:
            raise ValueError(f"dtype=int8 needs an x86 CPU, not {device}; take dtype=auto")
    elif name not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"dtype={name} is not one of auto, float32, bfloat16, float16" + inference * ", int8"
        )
    return getattr(torch, name)


def keep_freed_memory():
    """Have glibc keep the memory that is freed, for training on a CPU: else every large tensor of a step is made of new
    pages, which the kernel clears first. 0.6 of the time of a step (GPT-2 124M, 4 x 256 tokens), in as much memory."""
    mallopt(M_MMAP_MAX, 0)  # nothing comes by mmap, which would go back at once
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def mallopt(option, value):
    """Set an option of malloc, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)


def peak_flops(device):
    """Return the FLOP/s of a CUDA device's tensor cores, None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)


def peak_memory(device):
    """Return the most memory in use so far, in MB: on CUDA what PyTorch had allocated, else the process's own."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if Path(
        "/proc/self/status"
    ).exists():  # getrusage would count the process that we were forked from
        return (
            int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
            * 1024
            / 1e6
        )
    import resource  # here, since there is none on Windows

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e6
    )


def move(tensor, device):
    """Return the tensor on the device. A copy from the CPU to a GPU does not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
