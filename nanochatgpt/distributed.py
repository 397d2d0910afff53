"""The processes that train together: one alone, or as many as torchrun starts."""

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from nanochatgpt.device import keep_freed_memory, pick_device

FULL_STATE_DICT = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, on the CPU


@dataclass
class Distributed:
    """Rank, world size and device of this process."""

    rank: int  # number of this process, from 0
    world_size: int  # number of processes
    device: str  # such as cuda:1; each process has its own
    store: dist.Store | None  # key-value store shared by the processes; None for one process

    @property
    def master(self):
        """Whether this process prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def rank_zero_first(self):
        """Run the block on rank 0 first, then on the others, so that only one process downloads."""
        if self.world_size > 1 and not self.master:  # wait for rank 0
            dist.barrier()
        yield
        if self.world_size > 1 and self.master:  # let the others go on
            dist.barrier()

    def sum(self, tensor):
        """Sum a tensor over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self):
        """End the process group."""
        if self.world_size > 1:
            dist.barrier()
            # Gloo's thread needs the GIL to release the last tensors. Destroying the group while we
            # hold the GIL, as DistributedDataParallel's destructor may, would deadlock with it.
            time.sleep(0.1)
            dist.destroy_process_group()


def init_distributed(config, *divisible):
    """Return the Distributed of this process, and set up the machine for training. Raises
    ValueError for a device that does not exist, or if one of the `divisible` knobs is not a
    multiple of the number of processes."""
    rank = int(os.environ.get("RANK", 0))  # torchrun sets these variables
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    device_type = torch.device(device).type
    store = None
    if device_type == "cpu":
        keep_freed_memory()
    for name in divisible:  # each process takes an equal part of a batch
        value = getattr(config, name)
        if value % world_size:
            raise ValueError(f"{name}={value} is not a multiple of the {world_size} processes")
    if world_size > 1:  # connect to the other processes
        if device_type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        hour = timedelta(hours=1)  # rank 0 may download gigabytes
        store, *_ = next(dist.rendezvous("env://", timeout=hour))
        # torchrun keeps the store when it restarts the processes; a prefix keeps a new start from
        # finding the addresses of dead ones (pytorch 135712)
        restart = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend, store=restart, rank=rank, world_size=world_size, timeout=hour
        )
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # for float32 products on a GPU
    torch.manual_seed(config.seed)  # every process initialises the same weights
    return Distributed(rank, world_size, device, store)


def seed_for(*numbers):
    """Return a random seed that is a function of these numbers, such as (seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --- one model on many devices --------------------------------------------------------------------


def distribute(model, raw_model, distributed, sharded=False):
    """Return the model to call: raw_model sharded over the devices (FSDP), or `model` (raw_model or
    its compiled version) with one copy per device (DDP), or unchanged for one process."""
    if sharded:
        for block in raw_model.transformer.h:
            fully_shard(block)  # gathers the weights of one block at a time
        fully_shard(raw_model)  # the rest: embeddings, final LayerNorm
    elif distributed.world_size > 1:
        return DistributedDataParallel(model)  # device_ids would move the targets to the GPU
    return model


def synced_last(model, batches):
    """Yield the micro-batches; processes exchange gradients only in the last backward pass."""
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        elif hasattr(model, "set_requires_gradient_sync"):  # FSDP
            model.set_requires_gradient_sync(last)
        yield batch


def gathered(raw_model, sharded):
    """Return the model, a sharded one as a whole on rank 0's CPU. All processes must call it."""
    if not sharded:
        return raw_model
    weights = get_model_state_dict(raw_model, options=FULL_STATE_DICT)
    with torch.device("meta"):
        model = GPT(raw_model.config)  # no memory for weights yet
    if dist.get_rank() == 0:
        model.load_state_dict(weights, assign=True)  # takes the tensors without a copy
        model.tie_weights()
    return model
