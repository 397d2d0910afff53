"""PPO's formulas for a language model, with the papers' names.

Schulman et al. 2017 (arXiv 1707.06347); for language models Ziegler et al. 2019 (arXiv 1909.08593),
with the details of Huang et al. 2023 (lm-human-preference-details), but means of reply tokens only.

Shapes: B replies, R tokens in the longest, N tokens in all replies; mask (B, R) is true for these.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochatgpt.generate import generate
from nanochatgpt.sampling import Sampling
from rlhf.reward_model import load_reward_model
from rlhf.scoring import pad, score_texts


@dataclass
class Rollout:
    """Replies of a policy; train_ppo.py fills in what is None."""

    prompts: list  # ids of each
    replies: list  # ids of each, with the end token if the policy chose it
    ended: torch.Tensor  # (B,) bool; false also for a reply that goes on with another turn
    rewards: torch.Tensor = None  # (B,)
    score: torch.Tensor = None  # (B,) normalized rewards
    logprobs: torch.Tensor = None  # (B, R) of the policy, in nats
    values: torch.Tensor = None  # (B, R) of the value head
    kl: torch.Tensor = None  # (B, R) from the initial model, an estimate in nats

    def __post_init__(self):
        pairs = zip(self.prompts, self.replies, strict=True)
        self.texts = [prompt + reply for prompt, reply in pairs]
        lengths = torch.tensor([len(reply) for reply in self.replies])  # (B,)
        self.mask = torch.arange(max(lengths)) < lengths[:, None]  # (B, R)

    def minibatch(self, rows, device):
        """Return idx (b, T), prompts with replies, and the mask (b, T) of the positions that
        predict a reply token: from the end of the prompt to the token before the last."""
        idx, stops = pad([self.texts[b] for b in rows])
        starts = stops - self.mask[rows].sum(1)  # (b,) where the replies begin
        following = torch.arange(1, idx.size(1) + 1)  # (T,) the position after each
        predicts = (following >= starts[:, None]) & (following < stops[:, None])
        return idx.to(device), predicts.to(device)


def roll_out(policy, tokenizer, prompts, config, seed):
    """Return the Rollout of a policy; prompt i has the seed `seed + i`."""
    # no top_k, top_p or penalties: the log-probabilities we train must be those of sampling
    sampling = Sampling(config.max_new_tokens, config.temperature)
    end = (tokenizer.eos_id,)
    replies = generate(policy, prompts, sampling, seed=seed, stop_ids=end, tokenizer=tokenizer)

    ended = []
    for ids in replies:
        text = tokenizer.decode(ids)
        speaks_for_human = any(marker in text for marker in tokenizer.stop_strings)
        speaks_for_human |= any(stop in ids for stop in tokenizer.stop_ids)

        # the policy chose the end token, which generate leaves out
        complete = len(ids) < config.max_new_tokens
        ended.append(complete and not speaks_for_human)
        if complete:
            ids.append(tokenizer.eos_id)
    return Rollout(prompts, replies, torch.tensor(ended))


def make_reward(name, tokenizer, device, autocast):
    """Return the function from a Rollout to its rewards (B,): the scores of a reward model, or with
    length:N a toy, which is 1 for N tokens and 1/N less for each token more or fewer."""
    toy = re.fullmatch(r"length:([1-9]\d*)", name)
    model = None if toy else load_reward_model(name, tokenizer, device)

    def length_reward(rollout):
        rewards = []
        for reply in rollout.replies:
            n = len(reply) - (reply[-1] == tokenizer.eos_id)
            rewards.append(1 - abs(n / int(toy[1]) - 1))
        return torch.tensor(rewards)

    def learned_reward(rollout):
        with autocast:
            return score_texts(model, tokenizer, rollout.texts)  # float32

    return length_reward if toy else learned_reward


class ActorCritic(nn.Module):
    """A policy with a value head, which predicts the rewards to come; at first it predicts 0."""

    def __init__(self, policy, n_vocab, temperature):
        super().__init__()
        self.policy = policy
        self.n_vocab = n_vocab
        self.temperature = temperature
        self.value = nn.Linear(policy.config.n_embd, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, idx, predicts):
        """Return (logprobs, values), (N,) float32 each, of the N reply tokens of a minibatch.
        logprobs: in nats, of the distribution that roll_out draws from."""
        hidden = self.policy.hidden(idx)[predicts].float()  # (N, C)
        tokens = idx.roll(-1, 1)[predicts]  # (N,) the token after each position

        # in float32: GPT-2's logits are around -100, where 16 bits have steps of a half
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.policy.lm_head(hidden)[:, : self.n_vocab]  # (N, n_vocab)
            values = self.value(hidden)[:, 0]
        nll = F.cross_entropy(logits / self.temperature, tokens, reduction="none")
        return -nll, values

    @torch.no_grad()
    def evaluate(self, rollout, batch_size, autocast):
        """Return (logprobs, values) of a Rollout, (B, R) each, on the CPU, 0 outside the mask."""
        device = self.value.weight.device
        parts = []
        # the minibatches of the update's first epoch, so that its first ratios are exactly 1
        for rows in torch.arange(len(rollout.replies)).split(batch_size):
            with autocast:
                part = self(*rollout.minibatch(rows, device))
            parts.append(torch.stack(part).cpu())  # (2, N)

        padded = torch.zeros(2, *rollout.mask.shape)  # (2, B, R)
        padded[:, rollout.mask] = torch.cat(parts, 1)
        return padded


def reply_means(rollout, distributed):
    """Return {reward, score, kl in nats, length in tokens, ended}: means over all processes."""
    columns = {
        "reward": rollout.rewards,
        "score": rollout.score,
        "kl": rollout.kl.sum(1),
        "length": rollout.mask.sum(1),
        "ended": rollout.ended,
    }
    means = {}
    for name, column in columns.items():
        mean = distributed.sum(column.double().mean())
        means[name] = mean.item() / distributed.world_size
    return means


def token_rewards(rollout, kl_coef):
    """Return the reward of each token (B, R): minus its KL's cost; at the last, plus the score."""
    rewards = -kl_coef * rollout.kl
    last = rollout.mask.sum(1) - 1  # (B,)
    rewards[torch.arange(len(last)), last] += rollout.score
    return rewards


def advantages_and_returns(rewards, values, mask, lam):
    """Return generalized advantage estimates (Schulman et al. 2016, arXiv 1506.02438) and the
    targets of the values, (B, R) each; the discount is 1, the value after the last token 0."""
    values = values * mask
    next_values = F.pad(values[:, 1:], (0, 1))  # (B, R)
    advantages = (rewards + next_values - values) * mask  # at first those of lam = 0
    for t in reversed(range(values.size(1) - 1)):
        advantages[:, t] += lam * advantages[:, t + 1]
    return advantages, advantages + values


def whiten(x, mask, distributed):
    """Return x with mean 0 and variance 1 over the reply tokens of all processes; 0 elsewhere."""
    x = x.double() * mask
    n = distributed.sum(mask.sum())
    mean = distributed.sum(x.sum()) / n
    variance = distributed.sum(x.square().sum()) / n - mean.square()
    white = (x - mean) * (variance + 1e-8).rsqrt()
    return (white * mask).float()


def policy_losses(ratio, advantages, clip):
    """Return the losses (N,) of the clipped objective. ratio: (N,), new over old probabilities."""
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_losses(values, old_values, returns, clip):
    """Return half the squared errors (N,) of the values, or of values clipped to a distance of
    `clip` from the old ones, whichever is larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = (values - returns).square()
    clipped_error = (clipped - returns).square()
    return 0.5 * torch.maximum(error, clipped_error)


def adapted_kl_coef(kl_coef, kl, config):
    """Return the next KL coefficient: higher for a KL above target (Ziegler et al. 2019, 2.2)."""
    error = kl / config.kl_target - 1  # relative
    error = min(max(error, -0.2), 0.2)
    return kl_coef * (1 + error * config.rollouts / config.kl_horizon)
