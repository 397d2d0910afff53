"""
PPO's formulas for a language model, with the papers' names.

Schulman et al. 2017 (arXiv 1707.06347); for language models Ziegler et al. 2019 (arXiv 1909.08593),
whose details Huang et al. 2023 wrote down (lm-human-preference-details). Unlike theirs, all means
are over reply tokens only.

Shapes: B replies, R tokens in the longest, N tokens in all replies; mask (B, R) is true for these.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from nanochatgpt.generate import generate
from nanochatgpt.sampling import Sampling
from rlhf.reward_model import load_reward_model
from rlhf.scoring import pad, score_texts, scored_ids

MEANS = ("reward", "score", "kl", "length", "ended")  # what Rollout.means returns, per reply


@dataclass
class Rollout:
    """Replies of a policy, and their rewards."""

    prompts: list  # ids of each
    replies: list  # ids of each, with the end token if the policy chose it
    ended: torch.Tensor  # (B,) bool; false also for a reply that goes on with another turn
    rewards: torch.Tensor = None  # (B,)
    score: torch.Tensor = None  # (B,) normalized rewards

    @property
    def mask(self):
        lengths = torch.tensor(list(map(len, self.replies)))
        return torch.arange(max(lengths)) < lengths[:, None]  # (B, R)

    def means(self, kl):
        """Return the means over the replies, (5,) float64, that MEANS names. kl: (B, R) nats."""
        columns = (self.rewards, self.score, kl.sum(1), self.mask.sum(1), self.ended)  # (B,) each
        return torch.stack([column.double().mean() for column in columns])

    def minibatch(self, rows, device):
        """Return what ActorCritic takes for these rows: idx (b, T), and of their N reply tokens the
        row in idx, the position before the token, and the token, (N,) each."""
        texts = []
        tokens = []
        for row, b in enumerate(rows.tolist()):
            prompt = self.prompts[b]
            reply = self.replies[b]
            texts.append(prompt + reply)
            for position, token in enumerate(reply, len(prompt) - 1):
                tokens.append((row, position, token))
        idx, _ = pad(texts, device)
        return idx, *torch.tensor(tokens, device=device).T


def roll_out(policy, tokenizer, prompts, config, seed):
    """Return the Rollout of a policy; prompt i has the seed `seed + i`. Only temperature shapes the
    distribution, so that the log-probabilities that are trained are of what was drawn."""
    sampling = Sampling(config.max_new_tokens, config.temperature)
    end = (tokenizer.eos_id,)
    replies = generate(policy, prompts, sampling, seed=seed, stop_ids=end, tokenizer=tokenizer)
    ended = []
    for ids in replies:
        # a reply with a turn marker speaks for the human
        text = tokenizer.decode(ids)
        markers = set(ids) & set(tokenizer.stop_ids)
        markers |= {marker for marker in tokenizer.stop_strings if marker in text}
        complete = len(ids) < config.max_new_tokens
        ended.append(complete and not markers)
        if complete:
            ids.append(tokenizer.eos_id)
    return Rollout(prompts, replies, torch.tensor(ended))


def make_reward(name, tokenizer, device, autocast):
    """Return the function from a Rollout to its rewards (B,): a reward model's scores, or a toy."""
    if ":" in name:
        return toy_reward(name, tokenizer)
    model = load_reward_model(name, tokenizer, device)

    def reward(rollout):
        texts = []
        for prompt, reply in zip(rollout.prompts, rollout.replies, strict=True):
            texts.append(scored_ids(prompt + reply, tokenizer, model.config.block_size))
        with autocast:
            return score_texts(model, texts)  # float32

    return reward


def toy_reward(name, tokenizer):
    """Return a reward with a known best, 1. share:WORD is the share of a reply's tokens that are
    this word; length:N is 1 for N tokens and 1/N less for each token more or fewer."""
    kind, _, value = name.partition(":")
    share = kind == "share" and value != ""
    length = kind == "length" and value.isdecimal() and int(value) > 0
    if not (share or length):
        raise ValueError(f"reward={name} is neither a reward model nor share:WORD or length:N")
    word = {*tokenizer.encode(value), *tokenizer.encode(f" {value}")}  # also after a space

    def reward(rollout):
        rewards = []
        for reply in rollout.replies:
            ids = [token for token in reply if token != tokenizer.eos_id]
            if share:
                n = sum(token in word for token in ids)
                rewards.append(n / max(1, len(ids)))
            else:
                rewards.append(1 - abs(len(ids) / int(value) - 1))
        return torch.tensor(rewards)

    return reward


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

    def forward(self, idx, rows, positions, tokens):
        """Return (logprobs, entropy, values), (N,) float32 each, of N tokens in idx (b, T).

        rows, positions, tokens: (N,), see Rollout.minibatch. logprobs and entropy are in nats, of
        the distribution that roll_out draws from.
        """
        hidden = self.policy.hidden(idx)[rows, positions].float()  # (N, C)
        # in float32: GPT-2's logits are around -100, where 16 bits have steps of a half
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.policy.lm_head(hidden)[:, : self.n_vocab]  # (N, n_vocab)
            values = self.value(hidden)[:, 0]
        logprobs = (logits / self.temperature).log_softmax(-1)
        with torch.no_grad():  # only logged
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0], entropy, values

    @torch.no_grad()
    def evaluate(self, rollout, batch_size, autocast):
        """Return (logprobs, values) of a Rollout, (B, R) each, on the CPU, 0 outside the mask.

        The minibatches are those of the update's first epoch: its first ratios are exactly 1.
        """
        parts = []
        for rows in torch.arange(len(rollout.replies)).split(batch_size):
            with autocast:
                tokens = rollout.minibatch(rows, self.value.weight.device)
                logprobs, _, values = self(*tokens)
            parts.append(torch.stack([logprobs, values]).cpu())  # (2, N)
        padded = torch.zeros(2, *rollout.mask.shape)  # (2, B, R)
        padded[:, rollout.mask] = torch.cat(parts, 1)
        return padded


def token_rewards(score, logprobs, ref_logprobs, mask, kl_coef):
    """Return the reward of each token (B, R): minus its share of the KL from the reference, plus
    the score (B,) at the last token."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1) - 1  # (B,)
    rewards[torch.arange(len(mask)), last] += score
    return rewards


def advantages_and_returns(rewards, values, mask, gamma, lam):
    """Return generalized advantage estimates (Schulman et al. 2016, arXiv 1506.02438) and the
    targets of the values, (B, R) each. The value after a reply's last token is 0."""
    advantages = torch.zeros_like(values)
    advantage = torch.zeros(len(values))  # (B,) of token t + 1
    next_value = torch.zeros(len(values))  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


def whiten(x, mask, distributed):
    """Return x with mean 0 and variance 1 over the reply tokens of all processes; 0 elsewhere."""
    x = x.double() * mask
    sums = torch.stack([x.sum(), x.square().sum(), mask.sum()])
    total, squares, n = distributed.sum(sums)
    mean = total / n
    variance = squares / n - mean.square()
    return ((x - mean) * (variance + 1e-8).rsqrt() * mask).float()


def policy_losses(ratio, advantages, clip):
    """Return the losses (N,) of the clipped objective. ratio: (N,), new over old probabilities."""
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_losses(values, old_values, returns, clip):
    """Return half the squared errors (N,) of the values, or of values clipped to a distance of
    `clip` from the old ones, whichever is larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def adapted_kl_coef(kl_coef, kl, config):
    """Return the KL coefficient after an iteration: higher if the KL was above its target, lower if
    below (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)  # relative, clipped
    return kl_coef * (1 + error * config.rollouts / config.kl_horizon)
