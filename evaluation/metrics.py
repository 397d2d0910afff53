"""Metrics of predicted tokens and of replies."""

import math
import re
import string
from collections import Counter
from dataclasses import dataclass

import torch
from sacrebleu.metrics import BLEU, CHRF

SACREBLEU = {"bleu": BLEU(force=True), "chrf": CHRF()}  # force: PersonaChat is tokenized text
HEAD_ROWS = 256  # rows of logits at a time, 50 MB in float32


@dataclass
class Prediction:
    """What a model predicts at the N supervised positions of a batch, in the order of the rows."""

    targets: torch.Tensor  # (N,) int64
    predicted: torch.Tensor  # (N,) int64, the most likely tokens
    nll: torch.Tensor  # (N,) float32, -log of the target's probability, in nats
    continues: torch.Tensor  # (N - 1,) bool: the next position is the next token of the same reply

    def sums(self):
        """Return what adds up over batches, (5,) float64, for `rates`."""
        correct = self.predicted == self.targets
        repeated = (self.predicted.diff() == 0) & self.continues  # equals the prediction before it
        token = torch.ones_like(self.targets)
        columns = (self.nll, correct, repeated, token, self.continues)
        return torch.stack([column.cpu().double().sum() for column in columns])

    def replies(self):
        """Return [(predicted ids, target ids)] of each reply, without its last token, the end."""
        predicted = self.predicted.tolist()
        targets = self.targets.tolist()
        ends = (~self.continues).nonzero()[:, 0].tolist()
        ends.append(len(targets) - 1)
        replies = []
        start = 0
        for end in ends:
            replies.append((predicted[start:end], targets[start:end]))
            start = end + 1
        return replies


@torch.no_grad()
def predict(model, x, y, documents, device):
    """Return the Prediction of a Loader's batch, which must have supervised tokens."""
    # the supervised positions, and which of them follow each other in one reply
    pos = (y.flatten() != -100).nonzero()[:, 0]  # (N,)
    document = torch.searchsorted(documents, pos.int(), right=True)
    continues = (pos.diff() == 1) & (document.diff() == 0)

    # the hidden states that predict them
    hidden = model.hidden(x.to(device), documents=documents.to(device))  # (B, T, C)
    hidden = hidden.flatten(0, 1)[pos.to(device)]  # (N, C)
    targets = y.flatten()[pos].to(device)  # (N,)

    # the head, a few rows at a time
    predicted = []
    nll = []
    for rows, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.lm_head(rows).float()  # (rows, V)
        predicted.append(logits.argmax(-1))
        target_logits = logits.gather(1, target[:, None])[:, 0]  # (rows,)
        nll.append(logits.logsumexp(-1) - target_logits)
    return Prediction(targets, torch.cat(predicted), torch.cat(nll), continues.to(device))


def rates(sums):
    """Return {loss, perplexity, token_accuracy, reward, penalty} of summed Prediction.sums().

    loss: mean cross-entropy in nats. token_accuracy: how often the most likely token is the target;
    Locutusque's gpt2-conversational-or-qa calls it reward. penalty: how often the most likely token
    is the same as one position earlier in the same reply.
    """
    nll, correct, repeated, n_tokens, n_pairs = sums.tolist()
    loss = nll / n_tokens
    accuracy = correct / n_tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "token_accuracy": accuracy,
        "reward": accuracy,
        "penalty": repeated / max(1, n_pairs),
    }


def perplexity(loss):
    """Return the exponential of a mean loss in nats; infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def words(text):
    """Return the words and punctuation marks of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text, n):
    """Return the n-grams of words of a text, as tuples."""
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def diversity(texts, tokenizer):
    """Return {distinct_1, distinct_2, repeated_4grams, mean_length in tokens} of replies."""
    lengths = [len(tokenizer.encode(text)) for text in texts]
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repeated_4grams": repeated_4grams(texts),
        "mean_length": sum(lengths) / len(lengths),
    }


def distinct(texts, n):
    """Return the number of different n-grams of words divided by the number of all (Li et al. 2016,
    arXiv 1510.03055)."""
    grams = []  # of all texts
    for text in texts:
        grams += ngrams(text, n)
    return len(set(grams)) / max(1, len(grams))


def repeated_4grams(texts):
    """Return the share of 4-grams of words that came before in the same text."""
    total = 0
    repeated = 0
    for text in texts:
        grams = ngrams(text, 4)
        total += len(grams)
        # the first time that a 4-gram comes is no repetition
        repeated += len(grams) - len(set(grams))
    return repeated / max(1, total)


def similarity(texts, references):
    """Return sacrebleu's {bleu, chrf} of a corpus, each from 0 to 1."""
    scores = {}
    for name, metric in SACREBLEU.items():
        score = metric.corpus_score(texts, [references])
        scores[name] = score.score / 100  # from percent
    return scores


def f1(text, reference):
    """Return ConvAI2's F1 of a reply: the harmonic mean of its words' precision and recall."""

    def bag(text):
        # lower case, without punctuation and articles, as in ParlAI's metrics.py
        text = re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower())
        text = re.sub(r"\b(a|an|the)\b", " ", text)
        return Counter(text.split())

    # a word counts as often as both have it
    reply = bag(text)
    target = bag(reference)
    common = (reply & target).total()
    n_words = reply.total() + target.total()
    return 2 * common / max(1, n_words)


def remembers(text, value):
    """Return whether a reply names the value that was asked for: as whole words, in any case."""
    # the spaces at both ends keep "ana" from being found in "banana"
    value = " ".join(words(value))
    text = " ".join(words(text))
    return f" {value} " in f" {text} "
