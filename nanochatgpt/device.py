"""Device and dtype selection, memory settings, peak FLOP/s."""

import contextlib
import ctypes
import re

import torch

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # 8- and 16-bit kernels for x86
# options of malloc, from glibc's malloc.h
M_TRIM_THRESHOLD = -1  # free memory at the heap's end that triggers a return to the kernel
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4  # how many blocks may come from mmap
# pattern in the device's name -> dense bf16 or fp16 FLOP/s, from the datasheets
PEAK_FLOPS = {
    r"H200|H100(?! PCIe)": 989e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    r"L4\b": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
    "V100": 125e12,
    r"T4\b": 65e12,
}


def is_cuda(device):
    """Return whether a device is a CUDA one."""
    return torch.device(device).type == "cuda"


def pick_device(name):
    """Return the device of a `device` knob; auto is CUDA, else Apple's MPS, else the CPU. Raises
    ValueError if this machine has no such device."""
    available = []  # the fastest first
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        return available[0]
    if name not in available:
        raise ValueError(f"device={name} is not available; this machine has {', '.join(available)}")
    return name


def pick_dtype(name, device, inference=False):
    """Return the torch dtype of a `dtype` knob. auto is bfloat16 (or float16) on CUDA, else
    float32; for inference on an x86 CPU float16, which is faster and writes the same text."""
    cuda = is_cuda(device)
    packed = inference and FBGEMM and torch.device(device).type == "cpu"  # see quantize.py
    names = ["float32", "bfloat16", "float16"]  # values of the knob besides auto
    if packed:
        names.append("int8")
    # bfloat16 if the GPU computes with it, not if it emulates it
    if name == "auto" and cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        name = "bfloat16"
    elif name == "auto":
        name = "float16" if cuda or packed else "float32"
    if name not in names:
        remark = " (int8 is for inference on an x86 CPU)" if name == "int8" else ""
        raise ValueError(f"dtype={name} is not one of auto, {', '.join(names)}{remark}")
    return getattr(torch, name)


def precision(name, device):
    """Return (dtype, autocast, scaler) for a `dtype` knob: weights stay float32, autocast computes
    in lower precision, float16 needs scaled gradients. Raises ValueError for float16 off CUDA."""
    device_type = torch.device(device).type
    dtype = pick_dtype(name, device)
    if name == "auto" and device_type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        dtype = torch.bfloat16  # 1.7 times the tokens/s of float32 on such a CPU
    if dtype == torch.float16 and device_type != "cuda":
        raise ValueError(f"dtype=float16 trains on CUDA only; on {device_type} use bfloat16")
    # float32 needs no autocast
    autocast = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device_type, dtype)
    return dtype, autocast, torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)


def keep_freed_memory():
    """Make glibc keep freed memory: otherwise every large tensor of a training step gets new pages,
    which the kernel clears first. Saves 40% of a step (GPT-2 124M, 4 x 256 tokens on a CPU)."""
    mallopt(M_MMAP_MAX, 0)  # memory from mmap would go back at once
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes that glibc may keep at the heap's end


def mallopt(option, value):
    """Set an option of malloc, if the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)  # CDLL(None): the C library of this process


def peak_flops(device):
    """Return the peak FLOP/s of a CUDA device's tensor cores, None if PEAK_FLOPS lacks it."""
    if is_cuda(device):
        name = torch.cuda.get_device_name(device)  # "NVIDIA H100 80GB HBM3"
        for pattern, peak in PEAK_FLOPS.items():
            if re.search(pattern, name):
                return peak
    return None


def move(tensor, device):
    """Return the tensor on the device; a GPU copies it in the background."""
    if is_cuda(device) and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # without it, the copy blocks
    return tensor.to(device, non_blocking=True)
