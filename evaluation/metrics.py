"""Metrics of predicted tokens and of replies."""

import re
import string
from collections import Counter

import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU, CHRF

SACREBLEU = {"bleu": BLEU(force=True), "chrf": CHRF()}  # force: text may be tokenized
HEAD_ROWS = 256  # rows of logits at a time, 50 MB in float32


@torch.no_grad()
def predict(model, x, y, documents, device):
    """Return (targets, predicted, nll, starts) of a Loader's batch, each (N,) and on the CPU, for
    its N supervised positions. predicted: the most likely tokens; nll: -log of the target's
    probability, in nats; starts: whether this is the first token of a reply."""
    # the supervised positions; a reply starts where they have a gap or the document changes
    pos = (y.flatten() != -100).nonzero()[:, 0]  # (N,)
    document = torch.searchsorted(documents, pos.int(), right=True)
    starts = torch.ones_like(pos, dtype=torch.bool)
    starts[1:] = (pos.diff() != 1) | (document.diff() != 0)

    # the hidden states that predict them
    hidden = model.hidden(x.to(device), documents=documents.to(device))  # (B, T, C)
    hidden = hidden.flatten(0, 1)[pos.to(device)]  # (N, C)
    targets = y.flatten()[pos]  # (N,)

    # the head, a few rows at a time
    predicted = []
    nll = []
    for rows, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.lm_head(rows).float()  # (rows, V)
        predicted.append(logits.argmax(-1).cpu())
        nll.append(F.cross_entropy(logits, target.to(device), reduction="none").cpu())
    return targets, torch.cat(predicted), torch.cat(nll), starts


def rates(predictions):
    """Return {loss, perplexity, reward, penalty} of a list of what `predict` returns. loss: mean
    cross-entropy in nats. reward, a name from Locutusque's gpt2-conversational-or-qa: how often the
    most likely token is the target. penalty: how often the most likely token is the same as one
    position earlier in the same reply."""
    targets, predicted, nll, starts = map(torch.cat, zip(*predictions, strict=True))
    loss = nll.double().mean()
    pairs = ~starts[1:]  # whether a token and the one before it are in the same reply
    repeated = (predicted.diff() == 0) & pairs
    return {
        "loss": loss.item(),
        "perplexity": loss.exp().item(),
        "reward": (predicted == targets).double().mean().item(),
        "penalty": repeated.sum().item() / max(1, pairs.sum().item()),
    }


def words(text):
    """Return the words and punctuation marks of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text, n):
    """Return the n-grams of words of a text, as tuples."""
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def diversity(texts, tokenizer):
    """Return {distinct_1, distinct_2, repeated_4grams, mean_length in tokens} of replies."""
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repeated_4grams": repeated_4grams(texts),
        "mean_length": n_tokens / len(texts),
    }


def distinct(texts, n):
    """Return the number of different n-grams of words divided by the number of all (Li et al. 2016,
    arXiv 1510.03055)."""
    counts = Counter()  # of all texts
    for text in texts:
        counts.update(ngrams(text, n))
    return len(counts) / max(1, counts.total())


def repeated_4grams(texts):
    """Return the share of 4-grams of words that came before in the same text."""
    total = 0
    repeated = 0
    for text in texts:
        grams = ngrams(text, 4)
        total += len(grams)
        repeated += len(grams) - len(set(grams))  # the first of each is no repetition
    return repeated / max(1, total)


def similarity(texts, references):
    """Return sacrebleu's {bleu, chrf} of a corpus, each from 0 to 1."""
    scores = {}
    for name, metric in SACREBLEU.items():
        scores[name] = metric.corpus_score(texts, [references]).score / 100  # from percent
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
    return 2 * common / max(1, reply.total() + target.total())


def remembers(text, value):
    """Return whether a reply names the value that was asked for: as whole words, in any case."""
    # the spaces at both ends keep "ana" from being found in "banana"
    value = " ".join(words(value))
    text = " ".join(words(text))
    return f" {value} " in f" {text} "
