"""AdamW, the learning-rate schedule, and the knobs that all three training scripts share."""

import math
from dataclasses import dataclass, field

import torch

from nanochatgpt.configurator import at_least


@dataclass
class TrainConfig:
    init_from: str = "gpt2"  # resume, nano, gpt2[-medium|...], distilgpt2, org/name, a directory
    out_dir: str = "out/chat"  # best weights; last/ holds the latest weights and the training state
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with train*.bin and val*.bin: a,b
    batch_size: int = 8  # rows in a micro-batch
    max_iters: int = 1000  # training steps
    learning_rate: float = 5e-5  # after warmup
    grad_clip: float = 1.0  # clip the gradient's norm to this (0 = off)
    eval_interval: int = 200  # evaluate and save every N steps
    wandb_log: bool = False  # log to Weights & Biases; WANDB_PROJECT and WANDB_NAME name the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # autocast to float32, bfloat16 or float16 (CUDA only); auto = the fastest
    seed: int = 1337  # for initialisation, data order, dropout and sampling
    given: frozenset = field(default=frozenset(), repr=False, kw_only=True)  # knobs the user set

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        at_least(1, self, "batch_size", "eval_interval")
        at_least(0, self, "max_iters", "learning_rate", "grad_clip", "seed")


SCHEDULES = {  # fraction of the training done -> fraction of the learning rate left
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def check_schedule(config):
    """Raise ValueError if one of the knobs of `learning_rate` and `make_adamw` is out of range."""
    if config.lr_schedule not in SCHEDULES:
        raise ValueError(f"lr_schedule={config.lr_schedule} is not one of {', '.join(SCHEDULES)}")
    at_least(0, config, "min_lr", "warmup_iters", "weight_decay")


def learning_rate(config, it):
    """Return the learning rate of step `it`: linear warmup, then the schedule down to min_lr."""
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    done = (it - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)  # 0 to 1
    left = SCHEDULES[config.lr_schedule](done)
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def make_adamw(model, learning_rate, weight_decay, beta2=0.999, eps=1e-8):
    """Return AdamW with weight decay on matrices and embeddings, not on biases and LayerNorms."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    not_decayed = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), eps=eps, fused=True)
