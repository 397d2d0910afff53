"""Drop-ins for GPT.loss and GPT.packed_attention: faster, with the same results up to rounding.

`speed_up(model)` installs both. Without it everything works, in more time and memory.
"""

import math
import types

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanochatgpt.device import is_cuda, move


def speed_up(model):
    """Give a GPT the faster loss and packed attention below; return it."""
    model.loss = types.MethodType(fast_loss, model)
    model.packed_attention = types.MethodType(fast_packed_attention, model)
    return model


def compiled(model):
    """Return torch.compile's version of the model, but for the loss, whose shapes change from batch
    to batch."""
    model.loss = torch.compiler.disable(model.loss)
    return torch.compile(model)


# --- head and loss in one pass --------------------------------------------------------------------


def fast_loss(model, x, targets):
    """GPT.loss in 0.64 of the time (two cores, bfloat16 autocast, 1,024 supervised tokens). With
    targets on the CPU and x on a GPU, nothing waits for the GPU."""
    targets = targets.flatten()
    supervised = (targets != -100).nonzero()[:, 0]  # (N,)
    x = x.flatten(0, 1)[move(supervised, x.device)]  # (N, C)
    targets = move(targets[supervised], x.device)
    return HeadLoss.apply(x, model.lm_head.weight, targets) / max(1, len(supervised))


class HeadLoss(torch.autograd.Function):
    """The head and the summed cross-entropy, computing the gradients along the way:
    HeadLoss.apply(x (N, C), weight (V, C), targets (N,)) -> () float32, in nats. The logits
    (N, V) are the largest tensor of a training step. Here they exist for a few rows at a time, and
    their gradient overwrites them."""

    ROWS = 4096  # rows of 16-bit logits at a time, 0.4 GB
    CPU_ROWS = 64  # rows of float32 probabilities at a time on a CPU, so that they stay in cache

    @staticmethod
    def forward(ctx, x, weight, targets):
        device = x.device.type
        V = len(weight)
        autocast = torch.is_autocast_enabled(device)
        w = weight.to(torch.get_autocast_dtype(device) if autocast else x.dtype)  # (V, C)
        if is_cuda(x.device):
            w = F.pad(w, (0, 0, 0, -V % 64))  # tensor cores want round sizes
        softmax_rows = HeadLoss.CPU_ROWS if device == "cpu" else HeadLoss.ROWS
        loss = torch.zeros((), device=x.device)
        training = ctx.needs_input_grad[0]
        if training:
            ctx.dx = torch.empty_like(x)
            ctx.dw = torch.zeros_like(weight)

        for start in range(0, len(x), HeadLoss.ROWS):
            rows = slice(start, start + HeadLoss.ROWS)
            h = x[rows].to(w.dtype)  # (n, C)
            logits = h @ w.T  # (n, V)
            logits[:, V:] = -math.inf  # the padding

            # the loss; then the logits become their gradient, softmax minus one-hot target
            parts = logits.split(softmax_rows)
            part_targets = targets[rows, None].split(softmax_rows)
            for part, target in zip(parts, part_targets, strict=True):
                logprobs = part.log_softmax(-1, dtype=torch.float32)
                loss -= logprobs.gather(1, target).sum()
                if training:
                    minus_one = torch.full_like(logprobs[:, :1], -1)
                    part.copy_(logprobs.exp_().scatter_add_(1, target, minus_one))

            if training:
                ctx.dx[rows] = logits @ w
                # sum thousands of rows in float32, where the device can: float16 would overflow
                wide = is_cuda(x.device) and w.dtype != torch.float32
                out_dtype = {"out_dtype": torch.float32} if wide else {}
                ctx.dw += torch.mm(logits.T, h, **out_dtype)[:V]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx = ctx.dx
        dw = ctx.dw
        del ctx.dx, ctx.dw  # scaled in place, so a second backward pass must fail
        return dx.mul_(grad), dw.mul_(grad), None


# --- packed attention without a mask --------------------------------------------------------------


def fast_packed_attention(model, documents, document_ids):
    """packed_attention that computes one document after the other, where the device can. On a CPU
    at T = 1024 this takes half the time of the mask, with its dropout a sixth; torch.compile would
    recompile it for each batch. On a GPU FlashAttention does it, in 16 bits."""
    if is_cuda(documents.device) and _flash_can(model, documents.device):
        from torch.nn.attention.varlen import varlen_attn  # here, to spare a chat on a CPU 70 MB

        def attend(layer, q, k, v, dropout):
            B, nh, T, hs = q.shape
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, nh, hs)
            y = varlen_attn(q, k, v, documents, documents, T, T, window_size=(-1, 0))
            return y.view(B, T, nh, hs).transpose(1, 2)

        return attend

    if documents.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = [n for n in documents.diff().tolist() if n]  # without the empty ones

        def attend(layer, q, k, v, dropout):
            B, nh, T, hs = q.shape
            # all rows end to end (1, nh, B * T, hs), cut into documents; float32 takes 0.75 of the
            # time of bfloat16 here
            shape = (1, nh, B * T, hs)
            q, k, v = (x.transpose(0, 1).reshape(shape).float() for x in (q, k, v))
            parts = []
            with torch.autocast("cpu", enabled=False):
                for qkv in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
                    part = F.scaled_dot_product_attention(*qkv, dropout_p=dropout, is_causal=True)
                    parts.append(part)
            return torch.cat(parts, 2).view(nh, B, T, hs).transpose(0, 1)

        return attend

    return type(model).packed_attention(documents, document_ids)


def _flash_can(model, device):
    """Return whether FlashAttention takes this model as it runs now: 16 bits, no dropout of
    attention weights, heads of a multiple of 8 up to 256, compute capability 8.0, PyTorch 2.11."""
    autocast = torch.is_autocast_enabled("cuda")
    weights = model.transformer.wpe.weight.dtype
    dtype = torch.get_autocast_dtype("cuda") if autocast else weights
    dropout = model.training and model.config.attention_dropout > 0
    hs = model.config.n_embd // model.config.n_head
    fits = dtype != torch.float32 and not dropout and hs % 8 == 0 and hs <= 256
    new_enough = torch.__version__ >= (2, 11)  # varlen_attn takes a window_size
    return fits and new_enough and torch.cuda.get_device_capability(device) >= (8, 0)
