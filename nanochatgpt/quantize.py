"""Linear layers for inference on a CPU: weights in 16 or 8 bits, inputs and outputs in float32.

Decoding reads all weights for each token, so halving the bytes doubles the speed. A row's output
does not depend on the other rows, up to rounding. Layers copy a weight (n_out, n_in) and a bias
(n_out,), both float32, and map inputs (..., n_in) to outputs (..., n_out).
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Conv1D
from nanochatgpt.device import FBGEMM, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, mallopt

if FBGEMM:
    torch.backends.quantized.engine = "fbgemm"
quantized = torch.ops.quantized


class Float16Linear(nn.Module):
    """Weights in float16; products and sums in float32."""

    def __init__(self, weight, bias=None):
        super().__init__()
        bias = None if bias is None else bias.clone()
        self.packed = quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x):
        return quantized.linear_dynamic_fp16(x, self.packed)


class BFloat16Linear(nn.Module):
    """Weights and inputs in bfloat16: the fastest for long prompts if the CPU has AMX."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = weight.bfloat16().contiguous()
        self.bias = None if bias is None else bias.bfloat16()

    def forward(self, x):
        rows = x.bfloat16().flatten(0, -2)  # (rows, n_in)
        if len(rows) > 1:
            y = F.linear(rows, self.weight, self.bias)
        elif self.bias is None:  # for one row, a matrix-vector product takes 0.7 of the time
            y = self.weight.mv(rows[0])[None]
        else:
            y = self.bias.addmv(self.weight, rows[0])[None]
        return y.float().unflatten(0, x.shape[:-1])


class Int8Linear(nn.Module):
    """Weights in int8 with a scale per output; each input row quantized to 8 bits over [min, max].
    Sums of integers are exact, so a row gives the same alone and among others."""

    # without VNNI, FBGEMM accumulates pairs in int16, so use 7-bit inputs to avoid overflow
    REDUCED = not torch.cpu._is_vnni_supported()
    LEVELS = 127 if REDUCED else 255

    def __init__(self, weight, bias=None):
        super().__init__()
        self.bias = None if bias is None else bias.clone()
        largest = torch.linalg.vector_norm(weight, math.inf, 1)  # (n_out,)
        scales = largest.clamp(min=1e-30) / 127  # (n_out,)
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        self.sums = torch.empty(len(weight))  # (n_out,): sums of the rounded weights

        # in parts, since the head's weights are 154 MB in float32
        for start in range(0, len(weight), 4096):
            part = slice(start, start + 4096)
            scale = scales[part]
            rounded[part] = (weight[part] / scale[:, None]).round()
            self.sums[part] = rounded[part].float().sum(1) * scale

        # deprecated, but the fastest for one row
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        scales = scales.double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(rounded, scales, zeros, 0)
        self.packed = quantized.linear_prepack(weight, self.bias)

    def forward(self, x):
        if x.numel() == x.size(-1):  # one row
            return quantized.linear_dynamic(x, self.packed, self.REDUCED)

        # linear_dynamic quantizes all rows over one [min, max]. Do the same row by row:
        # x is about (q - zero) * scale with integers q, so y = (q W - zero sum(W)) * scale + bias.
        low = x.amin(-1, keepdim=True).clamp_(max=0)  # (..., 1)
        high = x.amax(-1, keepdim=True).clamp_(min=0)  # (..., 1)
        scale = (high - low) / self.LEVELS
        scale.clamp_(min=6.1e-5)  # FBGEMM's smallest
        zero = (-low / scale).round()
        q = (x / scale).add_(zero)  # the kernel rounds it
        y = quantized.linear_with_input_q_dq_qweight_dq_output_fp32(q, 1.0, 0, self.packed)
        if self.bias is not None:
            y.sub_(self.bias)  # the kernel has added it
        y.addcmul_(zero, self.sums, value=-1)
        if self.bias is None:
            return y.mul_(scale)
        return torch.addcmul(self.bias, y, scale)


LAYERS = {torch.bfloat16: BFloat16Linear, torch.float16: Float16Linear, torch.int8: Int8Linear}


def pack(model, read, dtype):
    """Load the weights into a GPT or RewardModel on the meta device, its matrices into the layers
    above; return it. read(name) -> tensor reads each weight once."""
    Linear = LAYERS[dtype]
    # return freed memory at once: loading GPT-2 as int8 peaks at 640 MB instead of 660 to 890
    mallopt(M_MMAP_THRESHOLD, 1 << 20)

    def packed(name):
        weight = read(f"{name}.weight").float()
        return Linear(weight.T.contiguous(), read(f"{name}.bias").float())

    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # packing takes one core a layer
        # the head, and the token embedding in at least 16 bits
        embedding = read("transformer.wte.weight").float()
        if hasattr(model, "lm_head"):
            head = threads.submit(Linear, embedding)
        embedding_dtype = torch.float16 if dtype == torch.int8 else dtype
        tensors = {"transformer.wte.weight": embedding.to(embedding_dtype)}
        del embedding

        # the matrices of the blocks
        for name, layer in zip(names, threads.map(packed, names), strict=True):
            model.set_submodule(name, layer)
        if hasattr(model, "lm_head"):
            model.lm_head = head.result()

    # the rest in float32: LayerNorms and positions
    for name in model.state_dict().keys() - tensors.keys() - {"lm_head.weight"}:
        tensors[name] = read(name).to(torch.float32, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)

    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's own defaults again
    mallopt(M_TRIM_THRESHOLD, 64 << 20)
    return model.requires_grad_(False)
