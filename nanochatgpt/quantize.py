"""
Linear layers for inference on a CPU: the weights in 16 or 8 bits, what goes in and comes out in float32.

Decoding reads all weights for each token, so its speed is that of the memory, and half the bytes are twice the speed.
What a row gives does not depend on the rows beside it, up to rounding.

All are made of a weight (n_out, n_in) and a bias (n_out,), float32, which they copy, and take (..., rows, n_in).
"""

import math
import warnings

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
        self.packed = quantized.linear_prepack_fp16(weight, bias if bias is None else bias.clone())

    def forward(self, x):
        return quantized.linear_dynamic_fp16(x, self.packed)


class BFloat16Linear(nn.Module):
    """Weights and what they are multiplied with in bfloat16: for long prompts the fastest where the CPU has AMX."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = weight.bfloat16().contiguous()
        self.bias = None if bias is None else bias.bfloat16()

    def forward(self, x):
        rows = x.bfloat16().flatten(0, -2)  # (rows, n_in)
        if len(rows) > 1:
            y = F.linear(rows, self.weight, self.bias)
        elif self.bias is None:  # a matrix-vector product: 0.7 of F.linear's time for one row
            y = self.weight.mv(rows[0])[None]
        else:
            y = self.bias.addmv(self.weight, rows[0])[None]
        return y.float().unflatten(0, x.shape[:-1])


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each output; each row that goes in is rounded to 8 bits between its extremes.

    Sums are of integers, so they are exact, and a row gives the same alone and among others.
    """

    # FBGEMM adds pairs of products in 16 bits where the CPU lacks VNNI: then a row gets 7 bits, lest they overflow
    REDUCED = not torch.cpu._is_vnni_supported()
    LEVELS = 127 if REDUCED else 255

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = torch.linalg.vector_norm(weight, math.inf, 1).clamp(min=1e-30) / 127  # (n_out,)
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        sums = []
        for part, rows, s in zip(
            rounded.split(4096), weight.split(4096), scale.split(4096), strict=True
        ):
            part.copy_(
                (rows / s[:, None]).round()
            )  # in parts: the head's weights are 154 MB in float32
            sums.append(part.float().sum(1) * s)
        with (
            warnings.catch_warnings()
        ):  # deprecated, but in the pinned version nothing else is as fast for one row
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(
                rounded, scale.double(), torch.zeros_like(scale).long(), 0
            )
        self.bias = bias if bias is None else bias.clone()
        self.packed = quantized.linear_prepack(weight, self.bias)
        self.sums = torch.cat(sums)  # (n_out,)

    def forward(self, x):
        if x.numel() == x.size(-1):
            return quantized.linear_dynamic(x, self.packed, self.REDUCED)
        # linear_dynamic would round all rows between common extremes; this is what it does, row by row
        low, high = (
            x.amin(-1, keepdim=True).clamp_(max=0),
            x.amax(-1, keepdim=True).clamp_(min=0),
        )  # (..., 1) each
        scale = ((high - low) / self.LEVELS).clamp(min=6.1e-5)  # FBGEMM's smallest
        zero = (-low / scale).round()
        y = quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            (x / scale).add_(zero), 1.0, 0, self.packed
        )
        if self.bias is None:
            return y.addcmul_(zero, self.sums, value=-1).mul_(scale)
        y.sub_(self.bias).addcmul_(zero, self.sums, value=-1)
        return torch.addcmul(self.bias, y, scale)


LAYERS = {
    torch.bfloat16: BFloat16Linear,
    torch.float16: Float16Linear,
    torch.int8: Int8Linear,
}


def pack(model, read, dtype):
    """Fill a GPT or RewardModel on the meta device with weights of `dtype`, each linear layer
    packed; return it. read(name) -> tensor gives each weight once, so there is never a second copy.
    """
    Linear = LAYERS[dtype]
    # give freed memory back at once: loading GPT-2 as int8 peaks at 640 MB instead of 660 to 890
    mallopt(M_MMAP_THRESHOLD, 1 << 20)

    # the head and the token embedding
    tensors = {}
    embedding = read("transformer.wte.weight").float()
    if hasattr(model, "lm_head"):
        model.lm_head = Linear(embedding)
    tensors["transformer.wte.weight"] = embedding.to(
        torch.float16 if dtype == torch.int8 else dtype
    )
    del embedding

    # the layers' matrices, then what is left in float32: biases, LayerNorms, positions
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight = read(f"{name}.weight").float()
            bias = read(f"{name}.bias").float()
            model.set_submodule(name, Linear(weight.T.contiguous(), bias))
    for name in model.state_dict().keys() - tensors.keys() - {"lm_head.weight"}:
        tensors[name] = read(name).to(torch.float32, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)

    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's own defaults again
    mallopt(M_TRIM_THRESHOLD, 64 << 20)
    return model.requires_grad_(False)
