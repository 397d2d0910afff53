"""Train a model that scores replies, by what people kept and what not: python train_reward.py config/train_reward.py

On shards of prepare/retry.py; on one device or, under torchrun, on many. It is a GPT-2 with one score behind the last
token, as Chai's gpt2_medium_retry_and_continue_12m_reward_model is.
"""

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from evaluation.metrics import auc, calibration_error
from model import GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.distributed import join, precision
from nanochatgpt.huggingface import NoScore
from nanochatgpt.monitor import DivergenceCheck, Log, StopSignal
from nanochatgpt.optimizer import (
    adamw,
    check_knobs,
    learning_rate,
    optimizer_step,
    restore,
    run_to_resume,
    save_last,
)
from nanochatgpt.shards import check_vocabulary, find_shards, open_shard
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward import pad, scored
from rlhf.reward_model import RewardModel

SAME = (
    "loss",
    "dataset",
    "template",
    "block_size",
)  # knobs of a run that is resumed: else its best is of another kind


@dataclass
class Config:
    # where from, where to
    init_from: str = "gpt2"  # a GPT or a reward model: gpt2[-medium|-large|-xl], nano, org/name, a directory; or resume
    out_dir: str = (
        "out/reward"  # the best weights so far; the latest and the trainer's state in its last/
    )
    data_dir: str = "data"  # where the datasets are
    dataset: str = (
        "retry"  # folders of data_dir with train*.bin and val*.bin of prepare/retry.py: a,b
    )
    template: str = ""  # one of TEMPLATES in tokenizer.py: how conversations are written; the model's own unless given
    loss: str = "labels"  # labels: binary cross-entropy; pairs: Bradley-Terry, of a chosen reply and one that was not
    dropout: float = 0.1  # share of activations dropped in training
    # the batch
    batch_size: int = 16  # replies in a micro-batch, all of about the same length
    block_size: int = 256  # tokens of a reply and what is before it, the last ones
    gradient_accumulation_steps: int = 4  # micro-batches in a step, over all processes together
    # the optimizer: AdamW
    max_iters: int = 1000  # steps
    max_epochs: float = (
        0.0  # if not 0, as many steps as make so many passes over the data, whatever max_iters is
    )
    learning_rate: float = 1e-5  # at its highest
    lr_schedule: str = "cosine"  # cosine or linear, down to min_lr at the last step; or constant
    min_lr: float = 0.0  # learning rate at the end
    warmup_iters: int = 50  # steps over which the learning rate rises from 0
    weight_decay: float = 0.01  # on matrices, not on biases and LayerNorms
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.999  # decay of the gradient's square's mean
    adam_eps: float = 1e-8  # keeps the step of a tiny gradient small
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # looking on
    eval_interval: int = 200  # steps from one evaluation and checkpoint to the next
    eval_iters: int = 1000  # micro-batches in an evaluation, at most
    log_interval: int = 10  # steps from one line to the next
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "nanochatgpt"  # project at Weights & Biases
    wandb_run_name: str = ""  # name of the run there
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # what autocast computes in: float32, bfloat16, float16 (CUDA only); auto: what is fastest
    seed: int = 1337  # of the new score, the order of the data and dropout


class Replies:
    """The replies of a split, in batches of about equal length: a pure function of the seed and the batch's number.

    n_batches: in an epoch. labels: (n,) bool, which were kept; lengths: (n,), the tokens of each that are scored.
    """

    SORTED = (
        64  # batches' worth of replies that are sorted by length, before the batches are shuffled
    )

    def __init__(self, paths, batch_size, block_size, seed, tokenizer, pairs):
        """pairs: a chosen reply and the rejected one next to it stay together. Raises ValueError where a shard is in
        another template than the tokenizer's, has a reply without tokens, or no pairs."""
        self.batch_size, self.block_size, self.seed, self.tokenizer = (
            batch_size,
            block_size,
            seed,
            tokenizer,
        )
        self.shards = [open_shard(path) for path in paths]
        labels = []
        for shard in self.shards:
            if shard.template != tokenizer.template:
                which = (
                    f"template {shard.template}" if shard.template else "plain text without labels"
                )
                raise ValueError(
                    f"{shard.path} is {which}: make it by prepare/retry.py --template={tokenizer.template}"
                )
            if (np.diff(shard.offsets) == 0).any():
                raise ValueError(
                    f"{shard.path} has a reply without tokens: make it by prepare/retry.py"
                )
            last = shard.offsets[1:] - 1  # of a reply that was kept it is supervised
            labels.append((shard.bits[last // 8] >> (last % 8)) & 1 == 1)
            if pairs and not (
                len(labels[-1]) % 2 == 0 and labels[-1][::2].all() and not labels[-1][1::2].any()
            ):
                raise ValueError(
                    f"{shard.path} has not a chosen and a rejected reply in turn: train by --loss=labels"
                )
        self.labels = np.concatenate(labels)
        if self.labels.all() or not self.labels.any():
            raise ValueError(
                f"{paths[0]} has replies of one kind only, kept or not: prepare it again with both"
            )
        self.of = np.concatenate(
            [[n] * len(kept) for n, kept in enumerate(labels)]
        )  # the shard of each reply
        starts = np.concatenate([shard.offsets[:-1] for shard in self.shards])
        stops = np.concatenate([shard.offsets[1:] for shard in self.shards])
        self.spans = np.stack([starts, stops], 1)
        self.lengths = np.minimum(
            stops - starts, block_size
        )  # one less where it ends in an end: only to sort by
        self.unit = 2 if pairs else 1
        self.n_batches = -(-len(self.labels) // batch_size)

    def __len__(self):
        return len(self.labels)

    def ids(self, i):
        """Return what is scored of reply i. Raises ValueError for a token beyond the tokenizer's vocabulary."""
        shard, (start, stop) = self.shards[self.of[i]], self.spans[i]
        ids = shard.tokens[max(start, stop - self.block_size - 1) : stop].astype(np.int64)
        check_vocabulary(shard, ids.max(), self.tokenizer)
        return scored(ids, self.tokenizer, self.block_size)

    def numbers(self, number):
        """Return the numbers of the replies in batch `number` (0, 1, ...)."""
        epoch, b = divmod(number, self.n_batches)
        if getattr(self, "_epoch", None) != epoch:
            draw, units = np.random.default_rng((self.seed, epoch)), self.batch_size // self.unit
            order = draw.permutation(len(self) // self.unit)
            longest = self.lengths.reshape(-1, self.unit).max(1)
            pools = np.split(order, range(self.SORTED * units, len(order), self.SORTED * units))
            order = np.concatenate(
                [pool[np.argsort(longest[pool], kind="stable")] for pool in pools]
            )
            batches = np.split(order, range(units, len(order), units))
            self._epoch, self._batches = epoch, [batches[n] for n in draw.permutation(len(batches))]
        return (self._batches[b][:, None] * self.unit + np.arange(self.unit)).flatten()

    def batch(self, number, device):
        """Return (idx (B, T) int64, lengths (B,) int64, labels (B,) float32) of batch `number`."""
        numbers = self.numbers(number)
        labels = torch.tensor(self.labels[numbers], dtype=torch.float32, device=device)
        return *pad([self.ids(i) for i in numbers], device), labels


def losses(scores, labels, loss):
    """Return the losses of replies (B,) or of pairs (B / 2,), in nats, from their scores (B,) and labels (B,).

    labels: binary cross-entropy. pairs: -log of the probability that the chosen one is better, sigmoid of the
    difference (Bradley and Terry 1952); the chosen reply of each pair comes first.
    """
    if loss == "pairs":
        return -F.logsigmoid(scores[::2] - scores[1::2])
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def figures(scores, labels, loss):
    """Return {val_loss, accuracy, auc, ece} of scores (n,) and labels (n,), tensors.

    labels: accuracy is the share of replies on the right side of 0, and ece the calibration error of sigmoid(score).
    pairs: the share of pairs whose chosen reply has the higher score, half of those with equal ones; ece that of the
    probability of the pairs' order.
    """
    found = {"val_loss": losses(scores, labels, loss).mean().item(), "auc": auc(scores, labels)}
    if loss == "pairs":
        margin = scores[::2] - scores[1::2]
        right = in_order(margin)
        p, y = margin.abs().sigmoid(), right  # of the likelier order
    else:
        right = ((scores > 0) == labels.bool()).float()
        p, y = scores.sigmoid(), labels
    return found | {"accuracy": right.mean().item(), "ece": calibration_error(p, y)}


def in_order(margin):
    """Return 1 where the chosen reply has more, 0 where it has less, else a half: of differences (B,)."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def check(config):
    """Raise ValueError for a knob that is out of range."""
    check_knobs(config)
    at_least(1, config, "block_size", "gradient_accumulation_steps", "eval_iters")
    if config.loss not in ("labels", "pairs"):
        raise ValueError(f"loss={config.loss} is not one of labels, pairs")
    if config.loss == "pairs" and config.batch_size % 2:
        raise ValueError(f"batch_size={config.batch_size} has half a pair: take an even number")


def main(config):
    check(config)
    last = Path(config.out_dir) / "last"

    # 1. the processes and the precision
    world = join(config, "gradient_accumulation_steps")
    device = world.device
    dtype, autocast, scaler = precision(config.dtype, device)

    # that there are shards is known before weights are fetched
    shards = {
        split: find_shards(config.data_dir, config.dataset, split) for split in ("train", "val")
    }

    # 2. the model: a GPT's head gives way to a score that has yet to be learned
    state = run_to_resume(config, world, "train_reward", SAME)
    if state is not None:
        tokenizer = Tokenizer(state["template"])
        raw_model = RewardModel(GPTConfig(**state["config"] | {"dropout": config.dropout}))
        raw_model.load_state_dict(state.pop("model"))
    else:
        with world.one_by_one():
            try:
                raw_model, tokenizer = load_model(
                    config.init_from, dropout=config.dropout, model_class=RewardModel
                )
            except NoScore:
                gpt, tokenizer = load_model(config.init_from, dropout=config.dropout)
                gpt.grow_vocab(Tokenizer(config.template or tokenizer.template).n_vocab)
                raw_model = RewardModel(gpt.config)
                raw_model.transformer = gpt.transformer
        tokenizer = Tokenizer(config.template or tokenizer.template)
        if tokenizer.n_vocab > (n := raw_model.config.vocab_size):
            raise ValueError(
                f"{config.init_from} knows {n} tokens, template {tokenizer.template} has {tokenizer.n_vocab}"
            )
        if config.block_size > (n := raw_model.config.block_size):
            raise ValueError(
                f"block_size={config.block_size}, but the model's context is {n}: lower it"
            )
        raw_model.shorten(config.block_size)  # what it was not trained for cannot be asked of it
    raw_model.to(device)

    # 3. the data
    data, pairs = {}, config.loss == "pairs"
    for split in ("train", "val"):
        paths = [path for path, _ in shards[split]]
        data[split] = Replies(
            paths, config.batch_size, config.block_size, config.seed, tokenizer, pairs
        )
    train, val = data["train"], data["val"]
    if config.max_epochs:
        steps = config.max_epochs * train.n_batches / config.gradient_accumulation_steps
        config.max_iters = max(1, round(steps))
    state = state or {"iter": 0, "best_val_loss": math.inf, "best_measure": 0.0}
    if state["iter"] > config.max_iters:
        raise ValueError(
            f"{last} is at iter {state['iter']}, beyond the last, {config.max_iters}: train for longer"
        )
    model = DistributedDataParallel(raw_model) if world.size > 1 else raw_model

    # 4. the optimizer
    optimizer = adamw(raw_model, config)
    restore(raw_model, optimizer, scaler, state)

    # 5. what a model is to be measured by: one that knows how often replies are kept, and one that sees their length
    evaluated = np.unique(
        np.concatenate([val.numbers(n) for n in range(min(config.eval_iters, val.n_batches))])
    )
    labels = torch.tensor(val.labels[evaluated], dtype=torch.float32)
    if labels.min() == labels.max():
        raise ValueError(
            f"the first {config.eval_iters} batches of val are all of one label: raise eval_iters"
        )
    share = train.labels.mean().item()
    guess = torch.full_like(labels, 0.0 if pairs else math.log(share / (1 - share)))
    reply_lengths = [
        len(ids) - tokenizer.last_reply(ids) for ids in (val.ids(i).tolist() for i in evaluated)
    ]
    measure = "accuracy" if pairs else "auc"  # between pairs no score is comparable
    reply_lengths = torch.tensor(reply_lengths, dtype=torch.float32)
    by_length = (
        in_order(reply_lengths[::2] - reply_lengths[1::2]).mean().item()
        if pairs
        else auc(reply_lengths, labels)
    )
    # the longer or the shorter reply, whichever is better
    baselines = {"constant_loss": losses(guess, labels, config.loss).mean().item()}
    baselines[f"length_{measure}"] = max(by_length, 1 - by_length)

    @torch.no_grad()
    def evaluate():
        """Return the figures over the batches of an evaluation."""
        raw_model.eval()
        scores = torch.zeros(len(val), dtype=torch.float64)
        for number in range(world.rank, min(config.eval_iters, val.n_batches), world.size):
            idx, lengths, _ = val.batch(number, device)
            with autocast:
                scores[val.numbers(number)] = raw_model(idx, lengths).cpu().double()
        raw_model.train()
        scores = world.sum(scores)[evaluated].float()
        if not scores.isfinite().all():
            raise ValueError(
                "scores are no numbers: the run diverges. Lower learning_rate, or raise warmup_iters"
            )
        return figures(scores, labels, config.loss)

    def save(it):
        """Write last/."""
        best = {name: state[name] for name in ("best_val_loss", "best_measure")}
        common = (raw_model, optimizer, scaler)
        save_last(
            world, config, "train_reward", raw_model, tokenizer, *common, same=SAME, iter=it, **best
        )

    # 6. the log
    stop, trouble = StopSignal(), DivergenceCheck()
    if world.master:
        log = Log(config, first_iter=state["iter"])
        print(
            f"{raw_model.num_parameters():,} parameters on {device}, {str(dtype).removeprefix('torch.')}"
        )
        for split, part in data.items():
            print(
                f"{split}: {len(part):,} replies, {part.labels.mean():.1%} kept, {part.lengths.mean():.0f} tokens each"
            )
        if len(evaluated) < 100:
            print(f"{len(evaluated)} replies in an evaluation say little: figures will jump")
        steps_per_epoch = train.n_batches / config.gradient_accumulation_steps
        print(
            f"{config.max_iters:,} steps are {round(config.max_iters / steps_per_epoch, 2):,g} epochs"
        )

    # 7. the loop
    clock, clock_iter = time.perf_counter(), state["iter"]
    for it in range(state["iter"], config.max_iters + 1):
        if it % config.eval_interval == 0 or it == config.max_iters:
            found = evaluate()
            trouble.check("validation loss", found["val_loss"], it, state["best_val_loss"])
            if world.master:
                log(iter=it, **found, **baselines)
                beside = {
                    name.partition("_")[2]: f" (length {v:.3f})" for name, v in baselines.items()
                }
                print(
                    f"iter {it}: val loss {found['val_loss']:.4f} (constant {baselines['constant_loss']:.4f}), "
                    f"accuracy {found['accuracy']:.3f}{beside.get('accuracy', '')}, "
                    f"AUC {found['auc']:.3f}{beside.get('auc', '')}, ECE {found['ece']:.3f}"
                )
                if found["val_loss"] < state["best_val_loss"]:
                    save_model(raw_model, tokenizer, config.out_dir)
            if found["val_loss"] < state["best_val_loss"]:
                state["best_val_loss"], state["best_measure"] = found["val_loss"], found[measure]
            save(it)
            clock, clock_iter = time.perf_counter(), it
        if it == config.max_iters:
            if world.master:
                conclude(config, state, measure, baselines)
            break

        torch.manual_seed(
            int(np.random.SeedSequence((config.seed, it, world.rank)).generate_state(1)[0])
        )
        # the loss is the sum over the replies of all micro-batches and processes, over their number
        steps = range(world.rank, config.gradient_accumulation_steps, world.size)
        batches = [
            train.batch(it * config.gradient_accumulation_steps + step, device) for step in steps
        ]
        n = sum(len(labels) // train.unit for *_, labels in batches)
        total, stopping = world.sum(torch.tensor([n, int(stop.asked)])).tolist()
        if stopping:
            save(it)
            if world.master:
                print(
                    f"stopped at iter {it}, saved to {last}; go on with the same command and --init_from=resume"
                )
            break
        loss_sum = torch.zeros((), device=device)
        for i, (idx, lengths, labels_here) in enumerate(batches):
            if world.size > 1:
                model.require_backward_grad_sync = (
                    i == len(batches) - 1
                )  # gradients meet once a step
            with autocast:
                scores = model(idx, lengths)
            loss = losses(scores, labels_here, config.loss).sum() / total
            loss_sum += loss.detach()
            scaler.scale(loss * world.size).backward()  # the processes' mean is taken
        norm = optimizer_step(
            raw_model, optimizer, scaler, learning_rate(config, it), config.grad_clip
        )

        if (it + 1) % config.log_interval == 0:
            loss = world.sum(loss_sum).item()
            seconds = (time.perf_counter() - clock) / (it + 1 - clock_iter)
            clock, clock_iter = time.perf_counter(), it + 1
            if world.master:
                lr, rate = learning_rate(config, it), total * train.unit / seconds
                log(iter=it + 1, loss=loss, lr=lr, grad_norm=norm.item(), replies_per_s=rate)
                left = timedelta(seconds=round(seconds * (config.max_iters - it - 1)))
                speed = f"{rate:,.0f} replies/s, {left} left"
                print(f"iter {it + 1}/{config.max_iters}: loss {loss:.4f}, lr {lr:.2e}, {speed}")
            trouble.check("loss", loss, it + 1)
            if (
                not scaler.is_enabled()
            ):  # which skips a step whose gradients are too large for float16
                trouble.check("gradient norm", norm.item(), it + 1)
    world.leave()


def conclude(config, state, measure, baselines):
    """Say what came of it, and whether that is more than a constant knows, and than the length of a reply says."""
    best, by_length, loss = (
        state["best_measure"],
        baselines[f"length_{measure}"],
        state["best_val_loss"],
    )
    print(
        f"the best validation loss is {loss:.4f}, {measure} {best:.3f}; its weights are in {config.out_dir}"
    )
    worse = (
        f"NO BETTER THAN LENGTH: how long a reply is tells as much, {measure} {by_length:.3f}"
        * (best <= by_length)
    )
    if loss >= baselines["constant_loss"]:
        worse = f"NO BETTER THAN A CONSTANT, whose loss is {baselines['constant_loss']:.4f}"
    if worse:
        print(
            f"{worse}. More data, more epochs or another learning rate are needed before it can choose replies"
        )
    else:
        print(f"choose replies by it: python chat.py --best_of=8 --reward={config.out_dir}")


if __name__ == "__main__":
    run(main, Config)
