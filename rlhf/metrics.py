"""Losses and metrics of a reward model."""

import numpy as np
import torch.nn.functional as F


def reward_losses(scores, labels, loss):
    """Return the losses in nats of replies (B,) or pairs (B / 2,) from scores and labels (B,).

    labels: binary cross-entropy. pairs: -log of the probability that the chosen reply is better,
    sigmoid of the difference (Bradley and Terry 1952); the chosen reply of each pair comes first.
    """
    if loss == "pairs":
        margin = scores[::2] - scores[1::2]  # (B / 2,)
        return -F.logsigmoid(margin)
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def reward_metrics(scores, labels, loss):
    """Return {accuracy, auc, ece} of scores and labels, (n,) float32 each.

    labels: accuracy is the share of replies on the right side of 0, ece the calibration error of
    sigmoid(score). pairs: both are of the order of a pair; a tie is half right.
    """
    if loss == "pairs":
        margin = scores[::2] - scores[1::2]  # (n / 2,)
        correct = (margin.sign() + 1) / 2  # 1, or 0.5 for a tie
        ece = calibration_error(margin.abs().sigmoid(), correct)
    else:
        correct = (scores > 0) == labels.bool()  # (n,)
        ece = calibration_error(scores.sigmoid(), labels)
    accuracy = correct.float().mean().item()
    return {"accuracy": accuracy, "auc": auc(scores, labels), "ece": ece}


def auc(scores, labels):
    """Return the area under the ROC curve: the probability that a reply of label 1 has a higher
    score than one of label 0; ties count half. scores, labels: (n,), both labels must occur."""
    scores = np.asarray(scores)
    positive = np.asarray(labels, bool)

    # the rank of each score, from 1; ties share the mean of their ranks
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = counts.cumsum() - (counts - 1) / 2  # of each distinct score
    ranks = ranks[inverse]  # (n,)

    # the Mann-Whitney statistic: pairs in which label 1 has the higher score
    n = positive.sum()
    rank_sum = ranks[positive].sum()
    in_order = rank_sum - n * (n + 1) / 2
    n_pairs = n * (len(scores) - n)
    return (in_order / n_pairs).item()


def calibration_error(probabilities, labels, bins=10):
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599): the mean gap
    between probability and share of label 1, in bins of equal width, weighted by their size."""
    probabilities = np.asarray(probabilities)
    labels = np.asarray(labels)
    bin_of = (probabilities * bins).astype(int)
    bin_of = np.minimum(bin_of, bins - 1)  # a probability of 1 is in the last bin
    gaps = np.bincount(bin_of, probabilities - labels, bins)  # (bins,) sums over each
    return (np.abs(gaps).sum() / len(labels)).item()
