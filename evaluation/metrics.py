"""
What can be counted in replies and in predicted tokens: the figures that evaluate.py reports.
"""

import itertools
import math
import re
import string
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF

METRICS = {
    "bleu": BLEU(force=True),
    "chrf": CHRF(),
}  # force: without a warning that PersonaChat is tokenized
ROWS = 256  # of logits at once: 50 MB in float32


# predicted tokens


@dataclass
class Prediction:
    """What a model predicts at the N supervised positions of a batch, in the rows' order."""

    targets: torch.Tensor  # (N,) int64
    likeliest: torch.Tensor  # (N,) int64
    nll: torch.Tensor  # (N,) float32, -log of the target's probability, in nats
    follows: (
        torch.Tensor
    )  # (N - 1,) bool: of the next one, whether it is the next token of the same reply

    def sums(self):
        """Return what adds up over batches, (5,) float64: nll, right, repeated; tokens, pairs of neighbours.

        right: the target is likeliest. repeated: the likeliest token is that of the position before too.
        """
        repeated = (self.likeliest.diff() == 0) & self.follows
        counts = [
            self.nll.double(),
            self.likeliest == self.targets,
            repeated,
            self.targets >= 0,
            self.follows,
        ]
        return torch.stack([count.sum().double().cpu() for count in counts])

    def replies(self):
        """Return [(ids predicted, ids of the target)] of each reply, without its last token, which is its end."""
        ends = [*((~self.follows).nonzero()[:, 0] + 1).tolist(), len(self.targets)]
        spans = list(itertools.pairwise([0, *ends]))
        return [
            (self.likeliest[i : j - 1].tolist(), self.targets[i : j - 1].tolist()) for i, j in spans
        ]


@torch.no_grad()
def predict(model, x, y, documents, device):
    """Return the Prediction of a Loader's batch, which must have supervised tokens."""
    at = (y.flatten() != -100).nonzero()[:, 0]  # (N,)
    document = torch.searchsorted(documents, at.int(), right=True)
    follows = (at.diff() == 1) & (document.diff() == 0)
    hidden = model.hidden(x.to(device), documents=documents.to(device))
    hidden, targets = (
        hidden.flatten(0, 1)[at.to(device)],
        y.flatten()[at].to(device),
    )  # (N, C), (N,)
    likeliest, nll = [], []
    for h, target in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = model.lm_head(h).float()  # (rows, V)
        likeliest.append(logits.argmax(-1))
        nll.append(logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0])
    return Prediction(targets, torch.cat(likeliest), torch.cat(nll), follows.to(device))


# scores of replies


def auc(scores, labels):
    """Return the area under the ROC curve: how likely it is that a reply of label 1 has a higher score than one of
    label 0, both drawn at random; equal scores count half. scores (n,), labels (n,) of 0 and 1, both kinds there."""
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (
        counts.cumsum() - (counts - 1) / 2
    )  # of each different score, from 1 on; equal ones share their mean
    n = labels.sum()
    return ((ranks[which][labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n))).item()


def calibration_error(probabilities, labels, bins=10):
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599): how far the mean probability is from
    the share of label 1, in bins of equal width, weighted by how many are in each."""
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(which, probabilities - labels, bins)
    return (np.abs(gaps).sum() / len(labels)).item()


# replies


def words(text):
    """Return the words and punctuation convai2_metrics of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text, n):
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def perplexity(loss):
    """Return the exponential of a mean loss in nats; infinity where it is beyond all numbers."""
    return math.exp(loss) if loss < 700 else math.inf


def diversity(texts, tokenizer):
    """Return how varied replies are and how long, in tokens: {distinct_1, distinct_2, repeated_4grams, mean_length}."""
    figures = {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}
    mean_length = sum(len(tokenizer.encode(text)) for text in texts) / len(texts)
    return figures | {"repeated_4grams": repeated_4grams(texts), "mean_length": mean_length}


def distinct(texts, n):
    """Return the share of different n-grams among all (Li et al. 2016, arXiv 1510.03055); of words."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repeated_4grams(texts):
    """Return the share of 4-grams of words that came before in the same text."""
    grams = [ngrams(text, 4) for text in texts]
    return sum(len(g) - len(set(g)) for g in grams) / max(1, sum(map(len, grams)))


def likeness(texts, references):
    """Return {bleu, chrf} of a corpus by sacrebleu, each from 0 to 1."""
    return {
        name: metric.corpus_score(texts, [references]).score / 100
        for name, metric in METRICS.items()
    }


def f1(text, reference):
    """Return ConvAI2's F1 of a reply: the harmonic mean of the shares of words of each that the other has.

    In lower case, punctuation and the articles a, an, the left out, as ParlAI's metrics.py does it.
    """
    ours, theirs = (
        Counter(
            re.sub(
                r"\b(a|an|the)\b", " ", re.sub(f"[{re.escape(string.punctuation)}]", " ", s.lower())
            ).split()
        )
        for s in (text, reference)
    )
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def remembers(text, value):
    """Return whether a reply names the value that was asked for: as whole words, in any case."""
    return f" {' '.join(words(value))} " in f" {' '.join(words(text))} "
