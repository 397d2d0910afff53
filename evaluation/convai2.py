"""
ConvAI2's metrics (arXiv 1902.00098) on PersonaChat's validation set: F1 of the model's own replies,
Hits@1 of 20 candidates, perplexity. After python prepare/personachat.py, which fetches the archive:

    python evaluation/convai2.py --init_from=out/chat

The published numbers are for ConvAI2's edition (430 MB): pass that as --source.
http://parl.ai/downloads/convai2/convai2_fix_723.tgz
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metrics import f1, perplexity
from evaluation.ranking import continuation, loglikelihoods
from evaluation.replies import reply_to
from evaluation.report import print_table, progress, table, write_json
from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.tokenizer import fit_context
from prepare.parlai import examples

ROWS = {  # metric -> its label and format in the table
    "f1": ("F1", ".1%"),
    "hits_1": ("Hits@1 of 20 candidates", ".1%"),
    "persona_perplexity": ("perplexity with the persona", ".2f"),
    "plain_perplexity": ("perplexity without", ".2f"),
}
PUBLISHED = {
    # arXiv 1901.08149: a GPT of 117M parameters with a ranking head, on the hidden test set
    "TransferTransfo": {"persona_perplexity": 16.28, "hits_1": 0.807, "f1": 0.195},
    # the same authors' transfer-learning-conv-ai, on the validation set
    "conv-ai": {"persona_perplexity": 20.5, "hits_1": 0.79, "f1": 0.165},
}


@dataclass
class Config(ChatSampling):
    max_new_tokens: int = 100  # new tokens in a reply, at most
    init_from: str = default_model()  # the model: nano, a directory, gpt2, ..., org/name
    source: str = "data/downloads/personachat.tgz"  # the archive, its folder or its valid file
    max_dialogs: int = 0  # use the first N dialogs (0 = all)
    json: str = ""  # write the metrics to this file too
    seed: int = 1337  # of the replies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto = the fastest here


def with_persona(persona, messages):
    """Return the messages with the persona, if there is one, as a system message."""
    return [{"role": "system", "content": persona}, *messages] if persona else messages


def rank(model, tokenizer, lines):
    """Return {hits_1, persona_perplexity, plain_perplexity} of lines (persona, messages, reply,
    candidates).

    hits_1: how often the reply has the highest mean log-likelihood per token, as ParlAI ranks with
    a generative model; None without candidates. The oldest turns of a long line are left out.
    """
    nll = 0.0  # nats, over all replies
    nll_plain = 0.0  # without the persona
    n_tokens = 0
    hits = []  # whether the reply is ranked first
    for persona, messages, reply, candidates in progress(lines, "ranking"):
        texts = [*candidates[:-1], reply]  # the last candidate is the reply
        replies = [continuation(tokenizer, text) for text in texts]
        longest = max(len(ids) for ids in replies)
        room = model.config.block_size - longest + 1  # the last token is only a target

        # the candidates after the persona and the conversation
        prompt, _ = fit_context(tokenizer, with_persona(persona, messages), room)
        scores = loglikelihoods(model, prompt, replies)
        nll -= scores[-1]
        if candidates:
            means = [score / len(ids) for score, ids in zip(scores, replies, strict=True)]
            hits.append(means[-1] == max(means))

        # the reply without the persona
        prompt, _ = fit_context(tokenizer, messages, room)
        nll_plain -= loglikelihoods(model, prompt, replies[-1:])[0]
        n_tokens += len(replies[-1])
    return {
        "hits_1": sum(hits) / len(hits) if hits else None,
        "persona_perplexity": perplexity(nll / n_tokens),
        "plain_perplexity": perplexity(nll_plain / n_tokens),
    }


def main(config):
    at_least(0, config, "max_dialogs")
    if not Path(config.source).exists():
        raise FileNotFoundError(f"no {config.source}: fetch it with prepare/personachat.py")
    lines = examples(Path(config.source), config.max_dialogs)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)

    # the model's own replies, and how it ranks the candidates
    room = model.config.block_size - config.max_new_tokens
    prompts = []
    for persona, messages, _, _ in lines:
        prompt, _ = fit_context(tokenizer, with_persona(persona, messages), room)
        prompts.append(prompt)
    sampling = for_template(config, tokenizer.template)
    replies = reply_to(prompts, model, tokenizer, sampling, config.seed, "replying")
    total = 0.0
    for (_, _, reference, _), reply in zip(lines, replies, strict=True):
        total += f1(reply.text, reference)
    metrics = {"f1": total / len(lines)} | rank(model, tokenizer, lines)

    # next to the published numbers
    metrics = {config.init_from: metrics}
    print_table(table(metrics | PUBLISHED, ROWS))
    print("the published perplexities are per dictionary word, without the end token; ours are per")
    print("token of GPT-2, with it")
    if config.json:
        write_json(config.json, metrics)


if __name__ == "__main__":
    run(main, Config)
