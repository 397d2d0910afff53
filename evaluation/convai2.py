"""ConvAI2's metrics (arXiv 1902.00098) on PersonaChat's validation set: F1 of the model's replies,
Hits@1 of 20 candidates, perplexity. After python prepare/personachat.py --natural=false, which
fetches it and writes it as published, to train on what is measured here:

    python evaluation/convai2.py --init_from=out/chat

The published numbers are for ConvAI2's edition. Hugging Face's JSON has it; if you have PersonaChat
from ParlAI, pass http://parl.ai/downloads/convai2/convai2_fix_723.tgz (430 MB) as --source.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metrics import f1
from evaluation.ranking import continuation, loglikelihoods
from evaluation.replies import ReplyConfig, load, reply_to
from evaluation.report import progress, table
from nanochatgpt.configurator import at_least, run
from nanochatgpt.tokenizer import fit_context
from prepare import editions, parlai

ROWS = {  # metric -> its label and format in the table
    "f1": ("F1", ".1%"),
    "hits_1": ("Hits@1 of 20 candidates", ".1%"),
    # per token of GPT-2, the end token included; the published ones are per word of a dictionary
    "perplexity": ("perplexity per token (published: per word)", ".2f"),
}
FETCHED = ("data/downloads/personachat.tgz", "data/downloads/personachat_self_original.json")
PUBLISHED = {
    # arXiv 1901.08149: a GPT of 117M parameters with a ranking head, on the hidden test set
    "TransferTransfo": {"perplexity": 16.28, "hits_1": 0.807, "f1": 0.195},
    # the same authors' transfer-learning-conv-ai, on the validation set
    "conv-ai": {"perplexity": 20.5, "hits_1": 0.79, "f1": 0.165},
}


@dataclass
class Config(ReplyConfig):
    source: str = ""  # an edition with candidates; by default what prepare/personachat.py fetched
    max_dialogs: int = 0  # use the first N dialogs (0 = all)


def examples(source, max_dialogs=0):
    """Return [(persona, messages so far, reply, [candidate])], one per reply of the validation set
    in an edition of PersonaChat; of its first max_dialogs (0 = all). The last candidate is the
    reply. Raises ValueError if it is not, FileNotFoundError if there is no such file."""
    replies = []  # as returned
    for split, name, dialogs in editions.read([source], r"(valid)_self_original\.txt"):
        if split == "train":
            continue
        # one entry per reply, with all that was said before it
        dialogs = itertools.islice(dialogs, max_dialogs or None)
        for number, (persona, exchanges) in enumerate(dialogs, 1):
            for i, (utterance, reply, candidates) in enumerate(exchanges):
                if candidates and candidates[-1] != reply:
                    problem = f"the last candidate is not the reply, {reply!r:.60}"
                    raise ValueError(f"{name}, dialog {number}: {problem}")
                if reply:  # the human has said `utterance`
                    before = parlai.messages([*exchanges[:i], (utterance, "", [])])
                    replies.append((" ".join(persona), before, reply, candidates))
    if not replies:
        raise ValueError(f"{source} has no reply")
    return replies


def rank(model, tokenizer, lines):
    """Return {hits_1, perplexity} of lines (messages, reply, candidates). hits_1: how often the
    reply has the highest mean log-likelihood per token, as ParlAI ranks with a generative model;
    None without candidates. The oldest turns of a long line are left out."""
    nll = 0.0  # nats, over all replies
    n_tokens = 0
    hits = []  # whether the reply is ranked first
    for messages, reply, candidates in progress(lines, "ranking"):
        # the candidates after the conversation; the last one is the reply
        texts = [*candidates[:-1], reply]
        replies = [continuation(tokenizer, text) for text in texts]
        longest = max(len(ids) for ids in replies)
        room = model.config.block_size - longest + 1  # the last token is only a target
        prompt, _ = fit_context(tokenizer, messages, room)
        scores = loglikelihoods(model, prompt, replies)
        nll -= scores[-1]
        n_tokens += len(replies[-1])
        if candidates:
            means = [score / len(ids) for score, ids in zip(scores, replies, strict=True)]
            hits.append(means[-1] == max(means))
    hits_1 = sum(hits) / len(hits) if hits else None
    return {"hits_1": hits_1, "perplexity": math.exp(nll / n_tokens)}


def main(config):
    at_least(0, config, "max_dialogs")
    paths = [Path(path) for path in ([config.source] if config.source else FETCHED)]
    source = next(filter(Path.exists, paths), None)
    if source is None:
        names = " or ".join(map(str, paths))
        raise FileNotFoundError(f"no {names}: run prepare/personachat.py, or pass --source=PATH")
    lines = []
    for persona, messages, reply, candidates in examples(source, config.max_dialogs):
        if persona:
            messages.insert(0, {"role": "system", "content": persona})
        lines.append((messages, reply, candidates))
    model, tokenizer = load(config.init_from, config)

    # the model's own replies
    room = model.config.block_size - config.max_new_tokens
    prompts = [fit_context(tokenizer, messages, room)[0] for messages, _, _ in lines]
    replies = reply_to(prompts, model, tokenizer, config, "replying")
    total = 0.0
    for (_, reference, _), reply in zip(lines, replies, strict=True):
        total += f1(reply.text, reference)

    # how it ranks the candidates, next to the published numbers
    metrics = {"f1": total / len(lines)} | rank(model, tokenizer, lines)
    print(table({config.init_from: metrics} | PUBLISHED, ROWS))


if __name__ == "__main__":
    run(main, Config)
