"""
PPO's formulas for a language model, with the papers' names.

Schulman et al. 2017 (arXiv 1707.06347); for language models Ziegler et al. 2019 (arXiv 1909.08593),
with the details of Huang et al. 2023 (lm-human-preference-details). Unlike theirs, all means are
over reply tokens only.

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
        lengths = torch.tensor([len(reply) for reply in self.replies])  # (B,)
        return torch.arange(max(lengths)) < lengths[:, None]  # (B, R)

    def means(self, kl):
        """Return the means over the replies, (5,) float64, that MEANS names. kl: (B, R) nats."""
        per_reply = kl.sum(1)  # (B,)
        lengths = self.mask.sum(1)
        columns = (self.rewards, self.score, per_reply, lengths, self.ended)
        return torch.stack([column.double().mean() for column in columns])

    def minibatch(self, rows, device):
        """Return what ActorCritic takes: idx (b, T), prompts with replies, and for each of the N
        reply tokens its row in idx, the position before it, and the token, (N,) each."""
        texts = []
        tokens = []
        for row, b in enumerate(rows.tolist()):
            prompt = self.prompts[b]
            reply = self.replies[b]
            texts.append(prompt + reply)
            # a token is predicted one position earlier, the first one at the prompt's end
            for position, token in enumerate(reply, len(prompt) - 1):
                tokens.append((row, position, token))
        idx, _ = pad(texts, device)
        rows, positions, tokens = torch.tensor(tokens, device=device).T
        return idx, rows, positions, tokens


def roll_out(policy, tokenizer, prompts, config, seed):
    """Return the Rollout of a policy; prompt i has the seed `seed + i`."""
    # no top_k, top_p or penalties: the log-probabilities we train must match the sampling
    # distribution
    sampling = Sampling(config.max_new_tokens, config.temperature)
    end = (tokenizer.eos_id,)
    replies = generate(policy, prompts, sampling, seed=seed, stop_ids=end, tokenizer=tokenizer)

    ended = []
    for ids in replies:
        # a reply with a turn marker speaks for the human
        text = tokenizer.decode(ids)
        speaks_for_human = not set(tokenizer.stop_ids).isdisjoint(ids)
        for marker in tokenizer.stop_strings:
            speaks_for_human |= marker in text

        # the policy chose the end token, which generate leaves out
        complete = len(ids) < config.max_new_tokens
        ended.append(complete and not speaks_for_human)
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
            text = scored_ids(prompt + reply, tokenizer, model.config.block_size)
            texts.append(text)
        with autocast:
            return score_texts(model, texts)  # float32

    return reward


def toy_reward(name, tokenizer):
    """Return a toy reward whose maximum is 1. share:WORD is the share of a reply's tokens that are
    this word; length:N is 1 for N tokens and 1/N less for each token more or fewer."""
    kind, _, value = name.partition(":")
    share = kind == "share" and value != ""
    length = kind == "length" and value.isdecimal() and int(value) > 0
    if not (share or length):
        raise ValueError(f"reward={name} is neither a reward model nor share:WORD or length:N")
    word = tokenizer.encode(value) + tokenizer.encode(f" {value}")  # also after a space

    def reward(rollout):
        rewards = []
        for reply in rollout.replies:
            ids = [token for token in reply if token != tokenizer.eos_id]
            if share:
                n = sum(token in word for token in ids)
                rewards.append(n / max(1, len(ids)))
            else:
                error = len(ids) / int(value) - 1
                rewards.append(1 - abs(error))
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
        """Return (logprobs, entropy, values), (N,) float32 each, of the N tokens of a minibatch.

        logprobs and entropy are in nats, of the distribution that roll_out draws from.
        """
        hidden = self.policy.hidden(idx)  # (b, T, C)
        hidden = hidden[rows, positions].float()  # (N, C)

        # in float32: GPT-2's logits are around -100, where 16 bits have steps of a half
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.policy.lm_head(hidden)[:, : self.n_vocab]  # (N, n_vocab)
            values = self.value(hidden)[:, 0]
        logprobs = (logits / self.temperature).log_softmax(-1)
        with torch.no_grad():  # only logged
            entropy = -(logprobs.exp() * logprobs).sum(-1)

        # the log-probability of the token that follows each position
        logprobs = logprobs.gather(1, tokens[:, None])[:, 0]
        return logprobs, entropy, values

    @torch.no_grad()
    def evaluate(self, rollout, batch_size, autocast):
        """Return (logprobs, values) of a Rollout, (B, R) each, on the CPU, 0 outside the mask."""
        device = self.value.weight.device
        parts = []
        # the minibatches of the update's first epoch, so that its first ratios are exactly 1
        for rows in torch.arange(len(rollout.replies)).split(batch_size):
            minibatch = rollout.minibatch(rows, device)
            with autocast:
                logprobs, _, values = self(*minibatch)
            part = torch.stack([logprobs, values])  # (2, N)
            parts.append(part.cpu())

        # from a list of tokens to a row for each reply
        mask = rollout.mask
        padded = torch.zeros(2, *mask.shape)  # (2, B, R)
        padded[:, mask] = torch.cat(parts, 1)
        return padded


def token_rewards(score, logprobs, ref_logprobs, mask, kl_coef):
    """Return the reward of each token (B, R): minus its share of the KL from the reference, plus
    the score (B,) at the last token."""
    kl = (logprobs - ref_logprobs) * mask  # (B, R) an estimate, in nats
    rewards = -kl_coef * kl
    rows = torch.arange(len(mask))
    last = mask.sum(1) - 1  # (B,)
    rewards[rows, last] += score
    return rewards


def advantages_and_returns(rewards, values, mask, gamma, lam):
    """Return generalized advantage estimates (Schulman et al. 2016, arXiv 1506.02438) and the
    targets of the values, (B, R) each. The value after a reply's last token is 0."""
    advantages = torch.zeros_like(values)
    advantage = torch.zeros(len(values))  # (B,) of token t + 1
    next_value = torch.zeros(len(values))  # (B,)
    for t in reversed(range(values.size(1))):
        value = values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = value * mask[:, t]
        advantages[:, t] = advantage
    returns = (advantages + values) * mask
    return advantages, returns


def whiten(x, mask, distributed):
    """Return x with mean 0 and variance 1 over the reply tokens of all processes; 0 elsewhere."""
    x = x.double() * mask

    # the mean and the variance from sums, so that every process has its part
    sums = torch.stack([x.sum(), x.square().sum(), mask.sum()])
    total, squares, n = distributed.sum(sums)
    mean = total / n
    variance = squares / n - mean.square()
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
    """Return the KL coefficient after an iteration: higher if the KL was above its target, lower if
    below (Ziegler et al. 2019, section 2.2)."""
    error = kl / config.kl_target - 1  # relative
    error = min(max(error, -0.2), 0.2)
    return kl_coef * (1 + error * config.rollouts / config.kl_horizon)
