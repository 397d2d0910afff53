"""
What train.py, train_reward.py and train_ppo.py have in common: the processes, the precision, the run to go on with, the
optimizer and its learning rate.
"""

import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nanochatgpt.atomic import replacing
from nanochatgpt.checkpoint import load_tensors, save_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import keep_freed_memory, pick_device, pick_dtype

WHOLE = StateDictOptions(
    full_state_dict=True, cpu_offload=True
)  # a checkpoint knows nothing of shards


@dataclass
class World:
    """The processes that train together, one alone or as many as torchrun started, and this one's place among them."""

    rank: int
    size: int
    device: str
    store: dist.Store | None

    @property
    def master(self):
        """Whether this process prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def one_by_one(self):
        """The first process alone does what follows, then the others: it fetches the weights, they find them."""
        if self.size > 1 and not self.master:
            dist.barrier()
        yield
        if self.size > 1 and self.master:
            dist.barrier()

    def sum(self, tensor):
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self):
        """End the process group."""
        if self.size > 1:
            dist.barrier()
            # gloo's thread lets go of the last tensors, and needs the GIL for it: taking the group down with the GIL in
            # hand, as DistributedDataParallel does where it is freed, would wait for that thread for ever
            time.sleep(0.1)
            dist.destroy_process_group()


def join(config, *divided):
    """Return the World of this process, and set the machine up for training. Raises ValueError for a device that is
    not there, or one of the `divided` knobs that the processes cannot share equally."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, store = pick_device(config.device), None
    device_type = torch.device(device).type
    if device_type == "cpu":
        keep_freed_memory()
    for name in divided:
        if getattr(config, name) % size:
            raise ValueError(
                f"{name}={getattr(config, name)} is not a multiple of the {size} processes"
            )
    if size > 1:
        if device_type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        hour = timedelta(hours=1)  # the first process may fetch gigabytes
        store, *_ = next(dist.rendezvous("env://", timeout=hour))
        # torchrun keeps the store over its restarts: a new start must not find addresses of the dead (pytorch 135712)
        restart = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=restart, rank=rank, world_size=size, timeout=hour)
    torch.backends.cuda.matmul.fp32_precision = (
        "tf32"  # where float32 is multiplied on a GPU at all
    )
    torch.manual_seed(config.seed)
    return World(rank, size, device, store)


def precision(name, device):
    """Return (dtype, autocast, scaler) of a `dtype` knob: weights stay float32, autocast computes in less, and float16
    needs its gradients scaled. Raises ValueError for float16 where it cannot train."""
    device_type, dtype = torch.device(device).type, pick_dtype(name, device)
    if name == "auto" and device_type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        dtype = (
            torch.bfloat16
        )  # 1.7 times the tokens/s of float32 where the CPU multiplies bfloat16 (BENCHMARKS.md)
    if dtype == torch.float16 and device_type != "cuda":
        raise ValueError(
            f"dtype=float16 trains on CUDA only; on {device_type} take bfloat16 or float32"
        )
    autocast = (
        torch.autocast(device_type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    )
    return dtype, autocast, torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)


def run_to_resume(config, world, script, same=()):
    """Return what the run of `script` in `out_dir` last saved, None for a new one.

    Raises ValueError where a new one would meet another there, where what is there is no run or another script's, or
    where one of the knobs in `same` was another; FileNotFoundError where there is none to resume.
    """
    state = Path(config.out_dir) / "last" / "state.pt"
    resume = config.init_from == "resume"
    if world.size > 1 and world.store.check(
        ["begun"]
    ):  # by this very job, which torchrun --max_restarts started again
        resume = state.exists()
    if not resume and state.exists():
        raise ValueError(
            f"{state.parent} holds a run: --init_from=resume goes on with it; a new one needs another --out_dir"
        )
    if world.size > 1:
        dist.barrier()  # all have looked
        world.store.set("begun", "1")
    if not resume:
        return None
    if not state.exists():
        raise FileNotFoundError(
            f"no {state} to resume from: start with another --init_from, the name of a model"
        )
    found = load_tensors(state)
    if not (
        isinstance(found, dict)
        and {"script", "knobs", "iter", "template", "config", "model"} <= found.keys()
    ):
        raise ValueError(
            f"{state} is not the state of a run: start a new one, with another --out_dir"
        )
    if (of := found["script"]) != script:
        raise ValueError(
            f"{state.parent} is a run of {of}.py: resume it by that, or set another --out_dir"
        )
    for name in same:
        if getattr(config, name) != (was := found["knobs"][name]):
            raise ValueError(
                f"{name}={getattr(config, name)}, but the run in {config.out_dir} is for {was}"
            )
    return found


def save_last(
    world,
    config,
    script,
    written,
    tokenizer,
    model,
    optimizer,
    scaler,
    /,
    same=(),
    weights=None,
    **state,
):
    """Write out_dir/last/: the model to be `written` for others, and in one file all that a resumed run needs, so that
    both agree: tensors and plain values. weights: the model to resume with, `model` unless it is sharded.

    All processes have to call it; the first one writes.
    """
    optimizer_state = moments(model, optimizer)
    if not world.master:
        return
    last = Path(config.out_dir) / "last"
    save_model(written, tokenizer, last)
    state |= {"script": script, "knobs": {name: getattr(config, name) for name in same}}
    state |= {"template": tokenizer.template, "config": asdict(written.config)}
    state |= {
        "model": (weights or model).state_dict(),
        "optimizer": optimizer_state,
        "scaler": scaler.state_dict(),
    }
    with replacing(last / "state.pt") as path:
        torch.save(state, path)


def restore(model, optimizer, scaler, state):
    """Take the optimizer's moments and the scaler out of what `save_last` wrote; the knobs stay those of this call."""
    if saved := state.pop("optimizer", None):
        groups = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(model, optimizer, groups | {"state": saved}, options=WHOLE)
    if saved := state.pop("scaler", None):
        scaler.load_state_dict(saved)


def check_knobs(config):
    """Raise ValueError where one of the knobs that training scripts share is out of range."""
    if config.lr_schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"lr_schedule={config.lr_schedule} is not one of cosine, linear, constant")
    at_least(1, config, "batch_size", "eval_interval", "log_interval")
    at_least(
        0,
        config,
        "max_iters",
        "warmup_iters",
        "learning_rate",
        "min_lr",
        "weight_decay",
        "grad_clip",
    )
    at_least(0, config, "adam_eps", "seed")
    if not 0 <= getattr(config, "dropout", 0) < 1:
        raise ValueError(f"dropout={config.dropout} is not from 0 to below 1")
    if (
        not 0 <= getattr(config, "max_epochs", 0) < 2**20
    ):  # and so the time that is left can be told
        raise ValueError(f"max_epochs={config.max_epochs} is not from 0 to a million")


def learning_rate(config, it):
    """Return the learning rate of step `it`: a linear rise over the warmup, then the schedule's fall to min_lr."""
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    done = (it - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)  # 0 to 1
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        config.lr_schedule
    ]
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def adamw(model, config, spared=None):
    """Return AdamW over the model's parameters: weight decay on matrices and embeddings only, but not on `spared`."""
    params = list(model.parameters())
    groups = [
        {
            "params": [p for p in params if p.dim() >= 2 and p is not spared],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in params if p.dim() < 2 or p is spared], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True
    )


def moments(model, optimizer):
    """Return the optimizer's state by the names of the parameters, {} before the first step; to the first process, but
    all have to ask."""
    if not optimizer.state:
        return {}  # asking for it would make a step
    return get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})


def optimizer_step(model, optimizer, scaler, lr, grad_clip):
    """Take a step at a learning rate, and clear the gradients; return their norm before it was clipped."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
