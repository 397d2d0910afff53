"""Train a chat model for a reward, with PPO: python train_ppo.py config/ppo_chat.py

The model replies to what people said in a corpus; a reward model (train_reward.py) scores the
replies; good ones become more likely, while the model stays close to what it was. On one device or,
with torchrun, on many. The formulas, with their sources, are in rlhf/ppo.py.
"""

import copy
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import torch
from torch.nn.utils import clip_grad_norm_

from nanochatgpt.checkpoint import default_model, load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import precision
from nanochatgpt.distributed import distribute, init_distributed, seed_for
from nanochatgpt.monitor import Log, StopSignal, Timer, time_left
from nanochatgpt.optimizer import TrainConfig, make_adamw
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.resume import Run
from nanochatgpt.shards import find_shards, open_shard
from rlhf import ppo

MUST_MATCH = ("reward", "dataset", "temperature", "max_new_tokens")  # in a resumed run
NORMALIZE_ON = 256  # replies of the initial model, used to normalize rewards to mean 0, std 1
NO_END = -1.0  # score of a reply that does not end, or goes on with another turn
VALUE_CLIP = 0.2  # clip range of the value update
RUNAWAY = 10  # a run stops if its KL is this many times the target


@dataclass
class Config(TrainConfig):  # TrainConfig: the knobs shared by all training scripts
    init_from: str = default_model()  # the chat model to start from, or resume
    reward: str = "out/reward"  # a reward model, or a toy: length:N is 1 for N tokens
    out_dir: str = "out/ppo"
    # the rollout
    rollouts: int = 64  # replies per iteration, over all processes together
    max_new_tokens: int = 48  # tokens in a reply, at most
    max_prompt: int = 256  # tokens in a prompt, at most
    temperature: float = 0.7  # of the distribution that is drawn from and trained
    # the update
    max_iters: int = 200  # iterations: a rollout and an update each
    epochs: int = 4  # passes over the replies of an iteration
    batch_size: int = 16  # replies in a minibatch, over all processes together
    learning_rate: float = 1e-5  # at the start; decays linearly to 0
    clip: float = 0.2  # PPO clip range: ratios are clipped to [1 - clip, 1 + clip]
    value_coef: float = 0.1  # weight of the value loss
    lam: float = 0.95  # lambda of generalized advantage estimation: 1 trusts returns, 0 the values
    # staying close to the initial model
    kl_coef: float = 0.15  # cost of a nat of KL, in standard deviations of reward, at first
    kl_target: float = 6.0  # nats per reply that kl_coef is adapted to
    kl_horizon: int = 10_000  # replies over which kl_coef is adapted
    # evaluation
    eval_interval: int = 20
    eval_replies: int = 200  # replies to held-out prompts in an evaluation

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        at_least(1, self, "rollouts", "max_new_tokens", "max_prompt", "epochs", "eval_replies")
        at_least(0, self, "value_coef", "lam", "kl_coef")
        at_least(0.01, self, "temperature", "clip", "kl_target")
        if self.rollouts % self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} must divide rollouts={self.rollouts}")


def main(config):
    # 1. the processes, the precision
    distributed = init_distributed(config, "rollouts", "batch_size")
    world_size = distributed.world_size
    device = distributed.device
    dtype, autocast, scaler = precision(config.dtype, device)
    share = config.rollouts // world_size  # replies of this process in an iteration
    batch_size = config.batch_size // world_size  # replies of this process in a minibatch

    # 2. the policy and the reference, a frozen copy; fail before downloading weights without data
    shards = {}
    for split in ("train", "val"):
        paths = find_shards(config.data_dir, config.dataset, split)
        shards[split] = [open_shard(path) for path, _ in paths]
    training_run = Run("train_ppo", config, distributed, MUST_MATCH)
    state = training_run.load()
    reference_dir = Path(config.out_dir) / "reference"  # where a resumed run finds it
    source = str(reference_dir) if state else config.init_from
    with distributed.rank_zero_first():
        policy, tokenizer = load_model(source, device)
        if state is None and distributed.master:
            save_model(policy, tokenizer, reference_dir)
    raw_model = ppo.ActorCritic(policy, tokenizer.n_vocab, config.temperature).to(device)
    reference = copy.deepcopy(raw_model).requires_grad_(False)
    longest = config.max_prompt + config.max_new_tokens
    if longest > policy.config.block_size:
        context = f"the model's context, {policy.config.block_size}"
        raise ValueError(f"max_prompt + max_new_tokens = {longest} exceeds {context}: lower them")

    def draw_prompts(split, n, *seed):
        """Return the ids of n prompts, a function of the seed; a small corpus repeats its own."""
        seed = seed_for(config.seed, *seed)
        prompts, _ = sample_prompts(shards[split], tokenizer, n, config.max_prompt, seed)
        if not prompts:
            room = f"max_prompt={config.max_prompt}"
            raise ValueError(f"no prompt in {config.dataset} fits {room}: raise it")
        return list(itertools.islice(itertools.cycle(prompts), n))

    # 3. the reward. Scores are rewards in standard deviations from the initial model's mean
    reward = ppo.make_reward(config.reward, tokenizer, device, autocast)
    run_state = {"best_score": -math.inf, "kl_coef": config.kl_coef}
    if state is None:
        prompts = draw_prompts("train", NORMALIZE_ON, 0)
        rollout = ppo.roll_out(policy, tokenizer, prompts, config, config.seed)
        rewards = reward(rollout)  # (NORMALIZE_ON,)
        run_state["mean"] = rewards.mean().item()
        run_state["std"] = rewards.std().item()
        if run_state["std"] < 1e-6:  # equal up to rounding
            run_state["std"] = 1.0
            print(
                f"warning: reward={config.reward} gives all replies of the initial model "
                f"{rewards[0]:.3f}, so there may be nothing to learn",
                file=sys.stderr,
            )
    else:
        for name in ("best_score", "kl_coef", "mean", "std"):
            run_state[name] = state[name]
        raw_model.load_state_dict(state.pop("model"))

    def play(prompts, seed):
        """Return (Rollout, reply_means). Raises ValueError if the KL is far beyond its target."""
        rollout = ppo.roll_out(policy, tokenizer, prompts, config, seed)
        rollout.rewards = reward(rollout)
        score = (rollout.rewards - run_state["mean"]) / run_state["std"]
        rollout.score = score.masked_fill(~rollout.ended, NO_END)
        rollout.logprobs, rollout.values = raw_model.evaluate(rollout, batch_size, autocast)
        ref_logprobs, _ = reference.evaluate(rollout, batch_size, autocast)
        rollout.kl = rollout.logprobs - ref_logprobs

        metrics = ppo.reply_means(rollout, distributed)
        if not metrics["kl"] < RUNAWAY * config.kl_target:  # also for NaN
            text = f"training diverges: KL {metrics['kl']:.1f}, kl_target {config.kl_target}"
            raise ValueError(f"{text}: lower learning_rate or raise kl_coef")
        return rollout, metrics

    # 4. the model on many devices, the optimizer, the log
    model = distribute(raw_model, raw_model, distributed)
    optimizer = make_adamw(raw_model, config.learning_rate, weight_decay=0.0, eps=1e-5)
    state = state or {"iter": 0}
    training_run.restore(state, tokenizer, raw_model, optimizer, scaler)
    stop = StopSignal()
    if distributed.master:
        log = Log(config, state["iter"])
        print(f"{policy.num_parameters():,} parameters on {device}, {dtype}")

    # 5. the loop
    val_prompts = draw_prompts("val", config.eval_replies, 1)
    for it in range(state["iter"], config.max_iters + 1):
        # evaluate; save the best policy in out_dir, the latest in out_dir/last
        if it % config.eval_interval == 0 or it == config.max_iters:
            _, metrics = play(val_prompts, config.seed)
            if distributed.master:
                log(iter=it, **{f"val_{name}": mean for name, mean in metrics.items()})
                print(f"iter {it}: held out: {summary(metrics)}")
            if metrics["score"] > run_state["best_score"]:
                run_state["best_score"] = metrics["score"]
                if distributed.master:
                    save_model(policy, tokenizer, config.out_dir)
            training_run.save(policy, raw_model, iter=it, **run_state)
        if it == config.max_iters:
            break
        if distributed.sum(torch.tensor(int(stop.asked))):
            training_run.save(policy, raw_model, iter=it, **run_state)
            training_run.print_stopped(it)
            break
        timer = Timer(it)

        # 5.1 rollout: this process's replies, their scores, and the KL before the update
        first = distributed.rank * share
        prompts = draw_prompts("train", config.rollouts, it, 3)[first : first + share]
        seed = seed_for(config.seed, it, 2) + first
        rollout, metrics = play(prompts, seed)
        mask = rollout.mask  # (B, R)
        kl = metrics["kl"]

        # 5.2 advantages, (B, R)
        kl_coef = run_state["kl_coef"]
        rewards = ppo.token_rewards(rollout, kl_coef)
        advantages, returns = ppo.advantages_and_returns(rewards, rollout.values, mask, config.lam)
        advantages = ppo.whiten(advantages, mask, distributed)
        targets = torch.stack([rollout.logprobs, rollout.values, advantages, returns])  # (4, B, R)

        # 5.3 the learning rate decays linearly; it is lower if the KL is beyond twice its target
        lr = config.learning_rate * (1 - it / config.max_iters)
        lr *= min(1.0, 2 * config.kl_target / max(kl, 1e-9))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ==== 5.4 the update ======================================================================
        losses = []  # of this process's share of each minibatch
        for epoch in range(config.epochs):
            order = torch.arange(share)
            if epoch:
                generator = torch.Generator().manual_seed(seed + epoch)
                order = torch.randperm(share, generator=generator)
            for rows in order.split(batch_size):
                # the N reply tokens of this minibatch, (N,) each
                tokens = mask[rows]  # (b, R)
                mb_targets = targets[:, rows][:, tokens].to(device)  # (4, N)
                old_logprobs, old_values, mb_advantages, mb_returns = mb_targets

                # the loss: the mean over the tokens of all processes
                total = distributed.sum(tokens.sum()).item()
                with autocast:
                    logprobs, values = model(*rollout.minibatch(rows, device))
                ratio = (logprobs - old_logprobs).exp()
                policy_loss = ppo.policy_losses(ratio, mb_advantages, config.clip)
                value_loss = ppo.value_losses(values, old_values, mb_returns, VALUE_CLIP)
                loss = (policy_loss + config.value_coef * value_loss).sum() / total
                scaler.scale(loss * world_size).backward()  # DDP averages; we want the sum
                losses.append(loss.detach())

                # clip the gradient, update the weights
                scaler.unscale_(optimizer)
                clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
        run_state["kl_coef"] = ppo.adapted_kl_coef(kl_coef, kl, config)
        # ==========================================================================================

        # 5.5 the log, and a reply to watch the policy learn
        loss = distributed.sum(torch.stack(losses).mean()).item()
        metrics |= {"loss": loss, "kl_coef": kl_coef, "lr": lr}
        if distributed.master:
            seconds = timer.seconds_per_step(it + 1)
            log(iter=it + 1, **metrics, seconds=seconds)
            left = time_left(seconds * (config.max_iters - it - 1))
            print(f"iter {it + 1}/{config.max_iters}: {summary(metrics)}; {left} left")
            text = tokenizer.decode(rollout.texts[0])
            print(f"  {' '.join(text.split())[-200:]}")

    if it == config.max_iters and distributed.master:
        best = f"best held-out score {run_state['best_score']:+.2f}, weights in {config.out_dir}"
        print(f"{best}; chat with them: python chat.py --init_from={config.out_dir}")
    distributed.leave()


def summary(metrics):
    """Return metrics as text."""
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())


if __name__ == "__main__":
    run(main, Config)
