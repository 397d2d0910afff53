"""Train a chat model for reward, by PPO: python train_ppo.py config/ppo_chat.py

Its own replies to what people said in a corpus are scored by a reward model (train_reward.py) and made likelier or less
likely, while it is kept near to what it was. On one device or, under torchrun, on many.

Schulman et al. 2017 (arXiv 1707.06347); for language models Ziegler et al. 2019 (arXiv 1909.08593), whose details Huang
et al. 2023 have written down (lm-human-preference-details). Other than theirs, all means are over reply tokens only.
"""

import copy
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from evaluation.metrics import repeated_4grams
from nanochatgpt.checkpoint import default_model, load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.distributed import join, precision
from nanochatgpt.generate import generate
from nanochatgpt.monitor import Log, StopSignal
from nanochatgpt.optimizer import (
    adamw,
    check_knobs,
    learning_rate,
    optimizer_step,
    restore,
    run_to_resume,
    save_last,
)
from nanochatgpt.shards import find_shards, open_shard, sample_prompts
from rlhf.reward import pad, scored, scores
from rlhf.reward_model import load_reward_model

SAME = ("reward", "dataset", "temperature", "max_new_tokens")  # knobs of a run that is resumed
RUNAWAY = 10  # a run ends where its KL is so many times the target


@dataclass
class Config:
    # where from, where to
    init_from: str = (
        default_model()
    )  # the chat model to start from: a directory, nano, org/name; or resume
    reward: str = "out/reward"  # a reward model; or share:WORD or length:N, of which the best that can be had is 1
    out_dir: str = "out/ppo"  # the weights with the highest held-out score; the latest and the trainer's in its last/
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with train*.bin and val*.bin, whose people are replied to: a,b
    # the rollout
    rollouts: int = 64  # replies in an iteration, over all processes together
    max_new_tokens: int = 48  # tokens in a reply, at most
    max_prompt: int = 256  # tokens before it, at most
    temperature: float = (
        0.7  # of the distribution that is drawn from, and whose probabilities are trained
    )
    no_end: float = -1.0  # the score, in standard deviations, of a reply that does not end or goes on with another turn
    # the update
    max_iters: int = 200  # iterations
    epochs: int = 4  # over the replies of an iteration
    batch_size: int = 16  # replies in a step, over all processes together
    clip: float = (
        0.2  # the ratio of new to old probabilities is rewarded up to 1 + clip and down to 1 - clip
    )
    value_clip: float = 0.2  # how far values move in an iteration
    value_coef: float = 0.1  # weight of the values' loss
    gamma: float = 1.0  # discount of a token later
    lam: float = 0.95  # of generalized advantage estimation: 1 trusts what came, 0 the values
    kl_coef: float = 0.15  # what a nat of KL from the model at the start costs of the score, at first; see kl_target
    kl_target: float = 6.0  # nats a reply, to which kl_coef is adapted
    kl_horizon: int = 10_000  # replies over which kl_coef is adapted
    learning_rate: float = 1e-5  # at its highest
    lr_schedule: str = "linear"  # cosine or linear, down to min_lr at max_iters; or constant
    min_lr: float = 0.0  # learning rate at the end
    warmup_iters: int = 0  # iterations over which the learning rate rises from 0
    weight_decay: float = 0.0  # on matrices, not on biases and LayerNorms
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.999  # decay of the gradient's square's mean
    adam_eps: float = 1e-5  # keeps the step of a tiny gradient small
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # looking on
    normalize_on: int = (
        256  # replies of the model at the start whose rewards get mean 0 and standard deviation 1
    )
    eval_interval: int = 20  # iterations from one evaluation and checkpoint to the next
    eval_replies: int = 200  # replies to held-out people in an evaluation
    log_interval: int = 1  # iterations from one line to the next
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "nanochatgpt"  # project at Weights & Biases
    wandb_run_name: str = ""  # name of the run there
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # what autocast computes in: float32, bfloat16, float16 (CUDA only); auto: what is fastest
    seed: int = 1337  # of the prompts and the replies


# what a reply is, and what it is worth


@dataclass
class Rollout:
    """Replies of the policy. prompts: their ids; replies: ids too, each with its end where it ended by itself."""

    prompts: list
    replies: list
    ended: torch.Tensor  # (B,) bool; not if the reply went on with another turn

    def rows(self):
        return [prompt + reply for prompt, reply in zip(self.prompts, self.replies, strict=True)]


def roll_out(model, tokenizer, prompts, config, seed):
    """Return the Rollout of a policy; prompt i has the seed `seed` + i. Nothing but temperature shapes the draw: the
    probabilities that are trained are those that were drawn from."""
    options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    replies = generate(
        model, prompts, tokenizer=tokenizer, seed=seed, stop_ids=(tokenizer.eos_id,), **options
    )
    whole = [len(ids) < config.max_new_tokens for ids in replies]
    markers = set(tokenizer.stop_ids)
    ended = [
        end
        and not markers & set(ids)
        and not any(o in tokenizer.decode(ids) for o in tokenizer.stop_strings)
        for end, ids in zip(whole, replies, strict=True)
    ]
    replies = [ids + [tokenizer.eos_id] * end for ids, end in zip(replies, whole, strict=True)]
    return Rollout(prompts, replies, torch.tensor(ended))


def make_reward(name, tokenizer, device, autocast):
    """Return reward(rollout) -> (B,) float32, in its own unit.

    name: a reward model's directory or org/name; share:WORD, the share of the reply's tokens that are this word's;
    length:N, 1 for a reply of N tokens and less by 1/N for each one off. Raises ValueError where it is none of these or
    knows other tokens than the policy.
    """
    kind, colon, value = name.partition(":")

    def contents(rollout):
        return [
            [token for token in reply if token != tokenizer.eos_id] for reply in rollout.replies
        ]

    if kind == "share" and value:
        word = {*tokenizer.encode(value), *tokenizer.encode(f" {value}")}
        return lambda r: torch.tensor(
            [sum(t in word for t in ids) / max(1, len(ids)) for ids in contents(r)]
        )
    if kind == "length" and value.isdecimal() and int(value):
        return lambda r: torch.tensor([1 - abs(len(ids) / int(value) - 1) for ids in contents(r)])
    if colon:
        raise ValueError(f"reward={name} is neither a reward model nor share:WORD or length:N")
    model = load_reward_model(name, tokenizer, device)

    def learned(rollout):
        with autocast:
            return scores(
                model, [scored(ids, tokenizer, model.config.block_size) for ids in rollout.rows()]
            )

    return learned


# the policy and its values


class ActorCritic(nn.Module):
    """A policy and, on its last hidden state, the value: the reward that is expected from here on, 0 at the start."""

    def __init__(self, policy, n_vocab, temperature):
        super().__init__()
        self.policy, self.n_vocab, self.temperature = policy, n_vocab, temperature
        self.value = nn.Linear(policy.config.n_embd, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, idx, rows, positions, targets):
        """Return (logprobs, entropy, values), (N,) float32 each, of N tokens of the replies in idx (B, T).

        rows, positions (N,): behind which position of which row each stands; targets (N,): what it is. logprobs and
        entropy are of the distribution that `roll_out` draws from, in nats.
        """
        hidden = self.policy.hidden(idx)[rows, positions].float()  # (N, C)
        # in float32: of GPT-2's logits, around -100, 16 bits leave steps of a half
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.policy.lm_head(hidden)[:, : self.n_vocab] / self.temperature
            values = self.value(hidden)[:, 0]
        logprobs = logits.log_softmax(-1)  # (N, n_vocab)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy, values


def tokens_of(rollout, rows, device):
    """Return (idx, rows, positions, targets) of some rows of a Rollout, as ActorCritic takes them."""
    prompts, replies = [rollout.prompts[b] for b in rows], [rollout.replies[b] for b in rows]
    idx, _ = pad([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)], device)
    lengths = torch.tensor([len(reply) for reply in replies])
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    of = torch.arange(len(rows)).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]) + starts[of]
    targets = torch.tensor([token for reply in replies for token in reply])
    return idx, *(t.to(device) for t in (of, positions, targets))


# PPO's pieces; all of (B, R), R tokens in the longest reply, mask (B, R) bool where there are any


def whiten(x, mask, world=None):
    """Return x with mean 0 and variance 1 over the reply tokens, of all processes together; 0 elsewhere."""
    x = x.double() * mask
    sums = torch.stack([x.sum(), x.square().sum(), mask.sum()])
    total, squares, n = world.sum(sums) if world else sums
    mean = total / n
    return ((x - mean) * (squares / n - mean.square() + 1e-8).rsqrt() * mask).float()


def token_rewards(score, logprobs, ref_logprobs, mask, kl_coef):
    """Return what each token is rewarded with, (B, R): less its share of the KL from the reference, and with the last
    one of a reply its score (B,)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += score
    return rewards


def advantages_and_returns(rewards, values, mask, gamma, lam):
    """Return generalized advantage estimates (Schulman et al. 2016, arXiv 1506.02438) and what the values are to be.

    Nothing comes after a reply's last token.
    """
    following, advantage, found = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.size(1))):
        here = mask[:, t].float()
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = (delta + gamma * lam * advantage) * here
        following = values[:, t] * here
        found.append(advantage)
    found = torch.stack(found[::-1], 1)
    return found, (found + values) * mask


def policy_losses(logprobs, old_logprobs, advantages, clip):
    """Return (the clipped objective's losses, ratios of new to old probabilities), (N,) each."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values, old_values, returns, clip):
    """Return half the squared errors (N,) of values that may move by `clip`."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def adapted_kl_coef(kl_coef, kl, config):
    """Return the KL coefficient after an iteration with this much KL: up where it was above its target, and down
    below (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.rollouts / config.kl_horizon)


def check_kl(kl, it, config):
    """Raise ValueError where the KL is no number or far beyond its target."""
    if not kl < RUNAWAY * config.kl_target:
        raise ValueError(
            f"the KL is {kl:.1f} nats at iter {it}, its target {config.kl_target}: it runs away. Lower learning_rate, "
            "or raise kl_coef; the checkpoints are from before"
        )


def check(config):
    """Raise ValueError for a knob that is out of range."""
    check_knobs(config)
    at_least(1, config, "rollouts", "max_new_tokens", "max_prompt", "epochs")
    at_least(0, config, "kl_coef")
    for name in ("temperature", "kl_target", "clip", "value_clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not above 0")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)} is not from 0 to 1")
    if not math.isfinite(config.no_end):
        raise ValueError(f"no_end={config.no_end} is not finite")
    at_least(2, config, "normalize_on", "eval_replies")
    if config.rollouts % config.batch_size:
        raise ValueError(
            f"rollouts={config.rollouts} is not a multiple of batch_size={config.batch_size}"
        )
    if config.kl_horizon < config.rollouts:
        raise ValueError(
            f"kl_horizon={config.kl_horizon} is less than an iteration's rollouts={config.rollouts}"
        )


def main(config):
    check(config)
    last, reference_dir = Path(config.out_dir) / "last", Path(config.out_dir) / "reference"

    # 1. the processes and the precision
    world = join(config, "rollouts", "batch_size")
    device = world.device
    dtype, autocast, scaler = precision(config.dtype, device)

    # that there are shards is known before weights are fetched
    paths = {
        split: find_shards(config.data_dir, config.dataset, split) for split in ("train", "val")
    }

    # 2. the policy, the model that it has to stay near to, and what it is paid by
    state = run_to_resume(config, world, "train_ppo", SAME)
    if state is None:
        state = {
            "iter": 0,
            "kl_coef": config.kl_coef,
            "best_score": -math.inf,
            "name": config.init_from,
        }
        state["kl_coef_at_first"] = config.kl_coef
    if config.kl_coef != state["kl_coef_at_first"]:
        state["kl_coef"] = state["kl_coef_at_first"] = config.kl_coef
    new = "model" not in state
    with world.one_by_one():
        original, tokenizer = load_model(config.init_from if new else str(reference_dir), device)
        if tokenizer.n_vocab > (n := original.config.vocab_size):
            raise ValueError(
                f"{state['name']} knows {n} tokens, its tokenizer makes {tokenizer.n_vocab}"
            )
        if new and world.master:
            save_model(original, tokenizer, reference_dir)
    raw_model = ActorCritic(copy.deepcopy(original), tokenizer.n_vocab, config.temperature).to(
        device
    )
    reference = (
        ActorCritic(original.eval(), tokenizer.n_vocab, config.temperature)
        .to(device)
        .requires_grad_(False)
    )
    policy = raw_model.policy
    reward = make_reward(config.reward, tokenizer, device, autocast)
    if (longest := config.max_prompt + config.max_new_tokens) > (n := policy.config.block_size):
        raise ValueError(
            f"max_prompt and max_new_tokens are {longest} together, but the model's context is {n}"
        )
    shards = {split: [open_shard(path) for path, _ in paths[split]] for split in paths}

    def prompts(split, n, *seed):
        """Return n prompts of a split, a function of the seed: the turns of different people, as far as there are."""
        found, seed = [], int(np.random.SeedSequence((config.seed, *seed)).generate_state(1)[0])
        while len(found) < n:
            more, _ = sample_prompts(
                shards[split], tokenizer, n - len(found), config.max_prompt, seed + len(found)
            )
            if not more:
                at_most = f"a prompt of at most {config.max_prompt} tokens"
                raise ValueError(
                    f"no reply in {config.dataset}'s {split} has {at_most}: raise max_prompt"
                )
            found += more
        return found

    def play(model, prompts, seed):
        """Return the Rollout of a model, its rewards (B,) and scores (B,): the rewards in standard deviations from what
        the model at the start gets, and `no_end` where a reply has not ended."""
        rollout = roll_out(model, tokenizer, prompts, config, seed)
        rewards = reward(rollout).float()
        score = (rewards - state["mean"]) / state["std"]
        return rollout, rewards, score.masked_fill(~rollout.ended, config.no_end)

    # 3. the unit of rewards: what the model at the start gets
    if world.master:
        print(
            f"{policy.num_parameters():,} parameters on {device}, {str(dtype).removeprefix('torch.')}"
        )
    if new:
        state |= {"mean": 0.0, "std": 1.0}
        unit = torch.zeros(2, dtype=torch.float64)
        if (
            world.master
        ):  # a token that came out otherwise on another GPU would give it another unit
            _, first, _ = play(original, prompts("train", config.normalize_on, 0), config.seed)
            unit[0], unit[1] = first.mean(), first.std()
        state["mean"], std = world.sum(unit).tolist()
        state["std"] = max(std, 1e-3)
    else:
        raw_model.load_state_dict(state.pop("model"))
    if world.master:
        print(
            f"the reward of {state['name']}: {state['mean']:.4f}, standard deviation {state['std']:.4f}"
        )
    if state["iter"] > config.max_iters:
        raise ValueError(
            f"{last} is at iter {state['iter']}, beyond max_iters={config.max_iters}: raise it"
        )
    model = DistributedDataParallel(raw_model) if world.size > 1 else raw_model
    optimizer = adamw(raw_model, config)
    restore(raw_model, optimizer, scaler, state)

    def in_parts(rows):
        """Return the rows of an iteration in the parts that steps are made on."""
        return rows.split(config.batch_size // world.size)

    @torch.no_grad()
    def measure(rollout):
        """Return (logprobs, the reference's, values, mask), (B, R) each, on the CPU.

        In the very parts of the first epoch: the same numbers come out there to the bit.
        """
        lengths = torch.tensor([len(reply) for reply in rollout.replies])
        mask = torch.arange(max(lengths)) < lengths[:, None]  # (B, R)
        found = torch.zeros(3, *mask.shape)
        for rows in in_parts(torch.arange(len(lengths))):
            tokens = tokens_of(rollout, rows.tolist(), device)
            with autocast:
                logprobs, _, values = raw_model(*tokens)
                ref_logprobs, *_ = reference(*tokens)
            part = torch.zeros(3, len(rows), mask.size(1))
            part[:, mask[rows]] = torch.stack([logprobs, ref_logprobs, values]).cpu()
            found[:, rows] = part
        return *found, mask

    def evaluate():
        """Return figures of replies to held-out people."""
        rollout, rewards, score = play(policy, prompts("val", config.eval_replies, 1), config.seed)
        logprobs, ref_logprobs, _, mask = measure(rollout)
        return {
            "val_reward": rewards.mean().item(),
            "val_gain": (rewards.mean().item() - state["mean"]) / state["std"],
            "val_score": score.mean().item(),
            "val_kl": ((logprobs - ref_logprobs) * mask).sum(1).mean().item(),
            "val_length": mask.sum(1).float().mean().item(),
            "val_ended": rollout.ended.float().mean().item(),
            "val_repeated_4grams": repeated_4grams(
                [tokenizer.decode(ids) for ids in rollout.replies]
            ),
        }

    def save(it):
        """Write last/."""
        kept = {
            name: state[name]
            for name in ("kl_coef", "kl_coef_at_first", "best_score", "mean", "std", "name")
        }
        common = (raw_model, optimizer, scaler)
        save_last(
            world, config, "train_ppo", policy, tokenizer, *common, same=SAME, iter=it, **kept
        )

    stop = StopSignal()
    if world.master:
        log = Log(config, first_iter=state["iter"])

    for it in range(state["iter"], config.max_iters + 1):
        if it % config.eval_interval == 0 or it == config.max_iters:
            if world.master:  # the others wait where they next meet
                found = evaluate()
                check_kl(found["val_kl"], it, config)  # before anything is saved over
                log(iter=it, **found)
                print(
                    f"iter {it}: held-out score {found['val_score']:+.2f}, reward {found['val_reward']:.4f} "
                    f"({found['val_gain']:+.2f} standard deviations), KL {found['val_kl']:.2f}, length "
                    f"{found['val_length']:.1f}, ended {found['val_ended']:.0%}, repeated 4-grams "
                    f"{found['val_repeated_4grams']:.2%}"
                )
                if found["val_score"] > state["best_score"]:
                    state["best_score"] = found["val_score"]
                    save_model(policy, tokenizer, config.out_dir)
            save(it)
        if it == config.max_iters:
            if world.master:
                print(
                    f"the best held-out score is {state['best_score']:+.2f}, its weights are in "
                    f"{config.out_dir}; talk to them: python chat.py --init_from={config.out_dir}"
                )
            break
        if world.sum(torch.tensor(int(stop.asked))):
            save(it)
            if world.master:
                print(
                    f"stopped at iter {it}, saved to {last}; go on with the same command and --init_from=resume"
                )
            break
        clock = time.perf_counter()

        # 4. rollout: this process's share of the iteration's prompts, replies, and what they are worth
        share = config.rollouts // world.size
        mine = slice(world.rank * share, (world.rank + 1) * share)
        seed = int(np.random.SeedSequence((config.seed, it, 2)).generate_state(1)[0])
        rollout, rewards, score = play(
            policy, prompts("train", config.rollouts, it, 3)[mine], seed + mine.start
        )

        # 5. advantages
        old_logprobs, ref_logprobs, old_values, mask = measure(rollout)
        kl = (old_logprobs - ref_logprobs) * mask
        sums = [rewards.sum(), score.sum(), kl.sum(), mask.sum(), rollout.ended.sum()]
        sums = world.sum(torch.stack([x.double() for x in sums])) / config.rollouts
        mean_reward, mean_score, mean_kl, length, ended = sums.tolist()
        check_kl(mean_kl, it, config)
        rewards = token_rewards(score, old_logprobs, ref_logprobs, mask, state["kl_coef"])
        advantages, returns = advantages_and_returns(
            rewards, old_values, mask, config.gamma, config.lam
        )
        advantages = whiten(advantages, mask, world)

        # 6. the update; where the KL is beyond twice its target, at a lower rate
        lr = learning_rate(config, it) * min(1.0, 2 * config.kl_target / max(mean_kl, 1e-9))
        token_sums = torch.zeros(
            5, dtype=torch.float64
        )  # of tokens: policy loss, value loss, entropy, clipped; all
        for epoch in range(config.epochs):
            order = torch.arange(share)
            if epoch:
                draw = torch.Generator().manual_seed(seed + epoch)
                order = torch.randperm(share, generator=draw)
            for rows in in_parts(order):
                here = mask[rows]  # (b, R)
                parts = (
                    x[rows][here].to(device)
                    for x in (old_logprobs, advantages, old_values, returns)
                )
                logprobs_before, advantage, values_before, return_ = parts  # (N,) each
                total = world.sum(here.sum().double()).item()
                with autocast:
                    logprobs, entropy, values = model(*tokens_of(rollout, rows.tolist(), device))
                policy_loss, ratio = policy_losses(
                    logprobs, logprobs_before, advantage, config.clip
                )
                value_loss = value_losses(values, values_before, return_, config.value_clip)
                loss = (policy_loss + config.value_coef * value_loss).sum() / total
                scaler.scale(loss * world.size).backward()  # the processes' mean is taken
                optimizer_step(raw_model, optimizer, scaler, lr, config.grad_clip)
                clipped = (ratio - 1).abs() > config.clip
                parts = [policy_loss, value_loss, entropy, clipped, torch.ones_like(ratio)]
                token_sums += torch.stack([x.detach().sum().cpu().double() for x in parts])
        kl_coef = state["kl_coef"]
        state["kl_coef"] = adapted_kl_coef(kl_coef, mean_kl, config)

        # 7. the log
        if (it + 1) % config.log_interval == 0:
            policy_loss, value_loss, entropy, clipped, n = world.sum(token_sums).tolist()
            spread, error = returns[mask].double(), (returns - old_values)[mask].double()
            moments_of = [x for t in (spread, error) for x in (t.sum(), t.square().sum())]
            s, ss, e, ee, m = world.sum(torch.stack([*moments_of, mask.sum().double()])).tolist()
            explained = 1 - (ee / m - (e / m) ** 2) / max(ss / m - (s / m) ** 2, 1e-12)
            if world.master:
                seconds = time.perf_counter() - clock
                log(
                    iter=it + 1,
                    reward=mean_reward,
                    score=mean_score,
                    kl=mean_kl,
                    kl_coef=kl_coef,
                    entropy=entropy / n,
                    clip_fraction=clipped / n,
                    explained_variance=explained,
                    policy_loss=policy_loss / n,
                    value_loss=value_loss / n,
                    length=length,
                    ended=ended,
                    lr=lr,
                    seconds=seconds,
                )
                left = timedelta(seconds=round(seconds * (config.max_iters - it - 1)))
                print(
                    f"iter {it + 1}/{config.max_iters}: reward {mean_reward:.4f} (score {mean_score:+.2f}), KL "
                    f"{mean_kl:.2f} x {kl_coef:.3f}, entropy {entropy / n:.2f}, clipped {clipped / n:.1%}, explained "
                    f"{explained:.2f}, length {length:.1f}, ended {ended:.0%}, {left} left"
                )
                print(f"  {sample(rollout, tokenizer)}")
    world.leave()


def sample(rollout, tokenizer):
    """Return what a person said last and what was replied, on one line, for the person who watches it learn."""
    texts = [message["content"] for message in tokenizer.parse(rollout.prompts[0])[-1:]]
    texts.append(tokenizer.decode(rollout.replies[0]))
    return " -> ".join(" ".join(text.split())[-200:] for text in texts)


if __name__ == "__main__":
    run(main, Config)
