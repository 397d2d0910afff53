"""The reward model: GPT-2 with a score in place of the head; its loss, and how well it ranks."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT
from nanochatgpt.checkpoint import load_model
from nanochatgpt.weights import NoScore


class RewardModel(GPT):
    """Same parameter names and arithmetic as GPT2ForSequenceClassification with one label."""

    architecture = "GPT2ForSequenceClassification"

    def __init__(self, config):
        super().__init__(config)
        del self.lm_head  # a score takes its place
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def tie_weights(self):
        """There is no head to share the embedding's weight."""

    def num_parameters(self):
        return super().num_parameters() + self.score.weight.numel()

    @torch.no_grad()
    def shorten(self, block_size):
        """Keep only the first block_size positions."""
        wpe = self.transformer.wpe.weight[:block_size].clone()  # (block_size, C)
        self.transformer.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.config.block_size = block_size

    def forward(self, idx, lengths):
        """Return the score of each row, (B,), a logit: higher means the reply is more likely kept.
        idx: (B, T) int64, padded on the right with anything. lengths: (B,) int64, at least 1."""
        x = self.hidden(idx)  # (B, T, C)
        rows = torch.arange(len(x), device=x.device)
        last = x[rows, lengths - 1]  # (B, C), the last token of each row
        return self.score_of(last)

    def score_of(self, x):
        """Return the scores (N,) float32 of final hidden states (N, C)."""
        # in float32: in 16 bits many scores would be equal
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.score.weight.float())  # (N, 1)
        return scores[:, 0]


def load_reward_model(name, tokenizer, device, dtype=torch.float32, inference=False):
    """Return the RewardModel of that name, ready to score texts of this tokenizer. Raises
    ValueError if it is not a reward model or has another template."""
    options = {"inference": inference, "model_class": RewardModel}
    try:
        model, trained_with = load_model(name, device, dtype, **options)
    except (FileNotFoundError, NoScore) as error:
        text = f"reward={name} is no reward model"
        raise ValueError(f"{text}: make one with train_reward.py") from error

    # a model judges texts as it was trained to read them
    if trained_with.template != tokenizer.template:
        templates = f"template {trained_with.template}, the chat model in {tokenizer.template}"
        raise ValueError(f"reward={name} is in {templates}: train one in that template")
    return model.eval()


def reward_losses(scores, labels, loss):
    """Return the losses in nats of replies (B,) or pairs (B / 2,) from scores and labels (B,).
    labels: binary cross-entropy. pairs: -log of the probability that the chosen reply is better,
    sigmoid of the difference (Bradley and Terry 1952); the chosen one of each pair comes first."""
    if loss == "pairs":
        margin = scores[::2] - scores[1::2]  # (B / 2,)
        return -F.logsigmoid(margin)
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def roc_auc(scores, labels):
    """Return the area under the ROC curve of scores and 0/1 labels, (n,) each: the probability that
    a kept reply has a higher score than another; ties count half."""
    kept = scores[labels == 1]
    others = scores[labels == 0].sort().values
    below = torch.searchsorted(others, kept)  # other replies with a lower score, for each kept one
    up_to = torch.searchsorted(others, kept, right=True)  # or the same score: half of these count
    auc = (below + up_to).double() / (2 * len(others))
    return auc.mean().item()
