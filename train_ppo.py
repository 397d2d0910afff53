"""Train a chat model for a reward, with PPO: python train_ppo.py config/ppo_chat.py

The model replies to what people said in a corpus; a reward model (train_reward.py) scores the
replies; good ones become more likely, while the model stays close to what it was. On one device or,
with torchrun, on many. The formulas, with their sources, are in rlhf/ppo.py.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from evaluation.metrics import repeated_4grams
from nanochatgpt.checkpoint import default_model, load_model, save_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.distributed import distribute, init_distributed, precision, seed_for
from nanochatgpt.monitor import Log, StopSignal, Timer, time_left
from nanochatgpt.optimizer import TrainConfig, check_train_config, make_adamw
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
    reward: str = "out/reward"  # a reward model; or a toy with maximum 1: share:WORD, length:N
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
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of generalized advantage estimation: 1 trusts returns, 0 the values
    # staying close to the initial model
    kl_coef: float = 0.15  # cost of a nat of KL, in standard deviations of reward; adapted
    kl_target: float = 6.0  # nats per reply that kl_coef is adapted to
    kl_horizon: int = 10_000  # replies over which kl_coef is adapted
    # evaluation
    eval_interval: int = 20
    eval_replies: int = 200  # replies to held-out prompts in an evaluation


def check(config):
    """Raise ValueError for a knob that is out of range."""
    check_train_config(config)
    at_least(1, config, "rollouts", "max_new_tokens", "max_prompt", "epochs", "eval_replies")
    at_least(0, config, "kl_coef", "value_coef", "gamma", "lam")
    for name in ("temperature", "clip", "kl_target"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)} is not above 0")
    if config.rollouts % config.batch_size:
        size = f"batch_size={config.batch_size}"
        raise ValueError(f"rollouts={config.rollouts} is not a multiple of {size}")


def draw_prompts(shards, tokenizer, n, config, *seed):
    """Return the ids of n prompts, a function of the seed. Every conversation gives one before any
    gives a second."""
    seed = seed_for(config.seed, *seed)
    room = config.max_prompt
    prompts = []
    while len(prompts) < n:
        missing = n - len(prompts)
        more, _ = sample_prompts(shards, tokenizer, missing, room, seed + len(prompts))
        if not more:
            raise ValueError(f"no prompt in {config.dataset} fits max_prompt={room}: raise it")
        prompts += more
    return prompts


def check_kl(kl, it, config):
    """Raise ValueError if the KL is far beyond its target."""
    if not kl < RUNAWAY * config.kl_target:  # also for NaN
        text = f"the KL is {kl:.1f} nats at iter {it}, its target {config.kl_target}"
        raise ValueError(f"{text}: training diverges. Lower learning_rate or raise kl_coef")


def main(config):
    check(config)

    # 1. the processes, the precision
    distributed = init_distributed(config, "rollouts", "batch_size")
    rank = distributed.rank
    world_size = distributed.world_size
    device = distributed.device
    dtype, autocast, scaler = precision(config.dtype, device)

    # 2. the policy and the reference, a frozen copy; fail before downloading weights without data
    shards = {}
    for split in ("train", "val"):
        shard_paths = find_shards(config.data_dir, config.dataset, split)
        shards[split] = [open_shard(path) for path, _ in shard_paths]
    training_run = Run("train_ppo", config, distributed, MUST_MATCH)
    state = training_run.load()
    new = state is None
    reference_dir = Path(config.out_dir) / "reference"  # where a resumed run finds it
    source = config.init_from if new else str(reference_dir)
    with distributed.rank_zero_first():
        initial, tokenizer = load_model(source, device)
        if new and distributed.master:
            save_model(initial, tokenizer, reference_dir)
    policy = copy.deepcopy(initial)
    n_vocab = tokenizer.n_vocab
    raw_model = ppo.ActorCritic(policy, n_vocab, config.temperature).to(device)
    reference = ppo.ActorCritic(initial.eval(), n_vocab, config.temperature).to(device)
    reference.requires_grad_(False)
    longest = config.max_prompt + config.max_new_tokens
    if longest > policy.config.block_size:
        context = f"the model's context, {policy.config.block_size}"
        raise ValueError(f"max_prompt + max_new_tokens = {longest} exceeds {context}: lower them")

    # 3. the reward. Scores are rewards in standard deviations from the initial model's mean
    reward = ppo.make_reward(config.reward, tokenizer, device, autocast)
    run_state = {"name": config.init_from, "best_score": -math.inf, "mean": 0.0, "std": 1.0}
    run_state |= {"kl_coef": config.kl_coef, "kl_coef_at_first": config.kl_coef}
    if not new:
        run_state = {name: state[name] for name in run_state}
        raw_model.load_state_dict(state.pop("model"))
    if config.kl_coef != run_state["kl_coef_at_first"]:  # a new value replaces the adapted one
        run_state |= {"kl_coef": config.kl_coef, "kl_coef_at_first": config.kl_coef}

    def play(model, prompts, seed):
        """Return a Rollout with rewards and scores."""
        rollout = ppo.roll_out(model, tokenizer, prompts, config, seed)
        rollout.rewards = reward(rollout)
        score = (rollout.rewards - run_state["mean"]) / run_state["std"]
        rollout.score = score.masked_fill(~rollout.ended, NO_END)
        return rollout

    if new:
        reward_stats = torch.zeros(2, dtype=torch.float64)
        if distributed.master:  # one process draws: on another GPU a token may differ
            prompts = draw_prompts(shards["train"], tokenizer, NORMALIZE_ON, config, 0)
            rewards = play(initial, prompts, config.seed).rewards
            reward_stats[:] = torch.stack([rewards.mean(), rewards.std()])
        mean, std = distributed.sum(reward_stats).tolist()
        run_state |= {"mean": mean, "std": max(std, 1e-3)}

    # 4. the model on many devices, the optimizer, the log
    model = distribute(raw_model, raw_model, distributed)
    optimizer = make_adamw(raw_model, config.learning_rate, weight_decay=0.0, eps=1e-5)
    first_iter = 0 if new else state["iter"]
    training_run.restore(state or {"iter": 0}, tokenizer, raw_model, optimizer, scaler)
    batch_size = config.batch_size // world_size  # rows of this process in a minibatch
    stop = StopSignal()
    if distributed.master:
        log = Log(config, first_iter)
        print(f"{policy.num_parameters():,} parameters on {device}, {dtype}")
        reward_text = f"{run_state['mean']:.4f}, standard deviation {run_state['std']:.4f}"
        print(f"the mean reward of {run_state['name']} is {reward_text}")

    def evaluate():
        """Return the metrics of replies to held-out prompts."""
        prompts = draw_prompts(shards["val"], tokenizer, config.eval_replies, config, 1)
        rollout = play(policy, prompts, config.seed)
        logprobs, _ = raw_model.evaluate(rollout, batch_size, autocast)
        ref_logprobs, _ = reference.evaluate(rollout, batch_size, autocast)
        means = rollout.means(logprobs - ref_logprobs).tolist()
        metrics = {f"val_{name}": mean for name, mean in zip(ppo.MEANS, means, strict=True)}
        metrics["val_gain"] = (metrics["val_reward"] - run_state["mean"]) / run_state["std"]
        texts = [tokenizer.decode(ids) for ids in rollout.replies]
        return metrics | {"val_repeated_4grams": repeated_4grams(texts)}

    # 5. the loop; this process plays `share` of the replies
    share = config.rollouts // world_size
    first = rank * share
    for it in range(first_iter, config.max_iters + 1):
        # evaluate on rank 0; save the best policy in out_dir, the latest in out_dir/last
        if it % config.eval_interval == 0 or it == config.max_iters:
            if distributed.master:
                metrics = evaluate()
                check_kl(metrics["val_kl"], it, config)
                log(iter=it, **metrics)
                print(f"iter {it}: {summary(metrics)}")
                if metrics["val_score"] > run_state["best_score"]:
                    run_state["best_score"] = metrics["val_score"]
                    save_model(policy, tokenizer, config.out_dir)
            training_run.save(policy, raw_model, iter=it, **run_state)
        if it == config.max_iters:
            break
        if distributed.sum(torch.tensor(int(stop.asked))):
            training_run.save(policy, raw_model, iter=it, **run_state)
            training_run.print_stopped(it)
            break
        timer = Timer(it)

        # 5.1 rollout: replies and their scores
        prompts = draw_prompts(shards["train"], tokenizer, config.rollouts, config, it, 3)
        seed = seed_for(config.seed, it, 2) + first
        rollout = play(policy, prompts[first : first + share], seed)
        mask = rollout.mask  # (B, R)

        # 5.2 log-probabilities and values before the update, (B, R) each, and the KL
        old_logprobs, old_values = raw_model.evaluate(rollout, batch_size, autocast)
        ref_logprobs, _ = reference.evaluate(rollout, batch_size, autocast)
        means = rollout.means(old_logprobs - ref_logprobs)  # over the replies of this process
        means = distributed.sum(means) / world_size
        metrics = dict(zip(ppo.MEANS, means.tolist(), strict=True))
        kl = metrics["kl"]
        check_kl(kl, it, config)

        # 5.3 advantages
        kl_coef = run_state["kl_coef"]
        rewards = ppo.token_rewards(rollout.score, old_logprobs, ref_logprobs, mask, kl_coef)
        gamma = config.gamma
        lam = config.lam
        advantages, returns = ppo.advantages_and_returns(rewards, old_values, mask, gamma, lam)
        advantages = ppo.whiten(advantages, mask, distributed)

        # 5.4 the learning rate decays linearly; it is lower if the KL is beyond twice its target
        lr = config.learning_rate * (1 - it / config.max_iters)
        lr *= min(1.0, 2 * config.kl_target / max(kl, 1e-9))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ==== 5.5 the update ======================================================================
        sums = torch.zeros(4, dtype=torch.float64)
        n_tokens = 0
        for epoch in range(config.epochs):
            order = torch.arange(share)
            if epoch:
                generator = torch.Generator().manual_seed(seed + epoch)
                order = torch.randperm(share, generator=generator)
            for rows in order.split(batch_size):
                # the N reply tokens of this minibatch, (N,) each
                tokens = mask[rows]  # (b, R)
                mb_logprobs = old_logprobs[rows][tokens].to(device)
                mb_advantages = advantages[rows][tokens].to(device)
                mb_values = old_values[rows][tokens].to(device)
                mb_returns = returns[rows][tokens].to(device)

                # the loss: the mean over the tokens of all processes
                total = distributed.sum(tokens.sum()).item()
                with autocast:
                    logprobs, entropy, values = model(*rollout.minibatch(rows, device))
                ratio = (logprobs - mb_logprobs).exp()
                policy_loss = ppo.policy_losses(ratio, mb_advantages, config.clip)
                value_loss = ppo.value_losses(values, mb_values, mb_returns, VALUE_CLIP)
                loss = (policy_loss + config.value_coef * value_loss).sum() / total
                scaler.scale(loss * world_size).backward()  # DDP averages; we want the sum

                # clip the gradient, update the weights
                scaler.unscale_(optimizer)
                clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                # sums over tokens, for the log
                clipped = ((ratio - 1).abs() > config.clip).float()
                parts = (policy_loss, value_loss, entropy, clipped)  # (N,) each
                sums += torch.stack([x.detach().sum() for x in parts]).cpu()
                n_tokens += total
        run_state["kl_coef"] = ppo.adapted_kl_coef(kl_coef, kl, config)
        # ==========================================================================================

        # 5.6 the log; the explained variance is that of rank 0's replies
        means = distributed.sum(sums) / n_tokens
        policy_loss, value_loss, entropy, clipped = means.tolist()
        errors = (returns - old_values)[mask].double()
        unexplained = errors.var() / returns[mask].double().var()
        metrics |= {"kl_coef": kl_coef, "entropy": entropy, "clip_fraction": clipped}
        metrics |= {"policy_loss": policy_loss, "value_loss": value_loss, "lr": lr}
        metrics["explained_variance"] = 1 - unexplained.item()
        if distributed.master:
            seconds = timer.seconds_per_step(it + 1)
            log(iter=it + 1, **metrics, seconds=seconds)
            left = time_left(seconds * (config.max_iters - it - 1))
            print(f"iter {it + 1}/{config.max_iters}: {summary(metrics)}; {left} left")
            print(f"  {sample_reply(rollout, tokenizer)}")

    if it == config.max_iters and distributed.master:
        text = f"best held-out score {run_state['best_score']:+.2f}, weights in "
        text += f"{config.out_dir}; chat with them: python chat.py --init_from={config.out_dir}"
        print(text)
    distributed.leave()


def summary(metrics):
    """Return metrics as text."""
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())


def sample_reply(rollout, tokenizer):
    """Return the first message and reply of a rollout on one line, to watch the policy learn."""
    messages = tokenizer.parse(rollout.prompts[0])
    texts = [message["content"] for message in messages[-1:]]  # none if the bot speaks first
    texts.append(tokenizer.decode(rollout.replies[0]))
    return " -> ".join(" ".join(text.split())[-200:] for text in texts)


if __name__ == "__main__":
    run(main, Config)
