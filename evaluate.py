"""
Measure what a model says, beside another: python evaluate.py --init_from=out/chat --base=gpt2 --dataset=personachat

Over the supervised tokens of the validation shards: how well it predicts them. Of its replies to the people there: how
near they are to what was said, how much they repeat, whether they end and keep to their own turn. And without a corpus:
whether it remembers what it was told, with names, facts and sentences that prepare/recall.py does not train on.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.convai2 import PUBLISHED, convai2_metrics
from evaluation.metrics import METRICS, diversity, f1, likeness, perplexity, predict, remembers
from evaluation.report import BATCH_COLUMNS, FIGURES, page, read_run, table, table_of_batches
from nanochatgpt.checkpoint import NANO, default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import keep_freed_memory, pick_device, pick_dtype
from nanochatgpt.files import replacing
from nanochatgpt.generate import generate
from nanochatgpt.loader import Loader
from nanochatgpt.sampling import ChatSampling, for_template, options_of
from nanochatgpt.shards import find_shards, open_shard, sample_prompts
from nanochatgpt.tokenizer import END_OF_TEXT, Tokenizer, fit_context
from prepare.personachat import examples
from prepare.recall import Speaker, probe

PROBES = {
    "recall_1": 1,
    "recall_3": 3,
    "recall_6": 6,
    "persona": 0,
}  # -> exchanges since the fact was told
SHOWN = 20  # conversations in a report
REPLIES = 64  # that are generated at once, between two looks at the clock


@dataclass
class Config(ChatSampling):
    max_new_tokens: int = 100
    init_from: str = (
        default_model()
    )  # the model: nano, a directory, gpt2[-medium|-large|-xl], distilgpt2, org/name
    base: str = ""  # a second one, to stand beside it
    data_dir: str = "data"  # where the datasets are
    dataset: str = (
        "personachat"  # folders of data_dir with val*.bin: a,b; empty: only what needs no corpus
    )
    max_conversations: int = 0  # look at so many of each shard, the first ones; 0: all
    batch_size: int = 8  # rows at once
    replies: int = 200  # generate so many
    probes: int = 100  # ask for so many facts of each kind
    convai2: str = ""  # in place of a dataset PersonaChat's or ConvAI2's archive, folder or valid file: F1, Hits@1
    first_batches: int = (
        0  # instead of all that, fine-tune on the dataset for so many batches, and show each
    )
    learning_rate: float = 5e-5  # of first_batches
    json: str = ""  # write the figures to this file too
    report: str = ""  # and a page to look at: figures, loss curves, lengths, conversations side by side; FILE.html
    seed: int = 1337  # of the replies and the probes
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto is float16 on an x86 CPU, bfloat16 on CUDA


# 1. what the model makes of what people said


@torch.no_grad()
def predictions(model, loader, device):
    """Return {loss, perplexity, token_accuracy, reward, penalty} over all supervised tokens of a Loader.

    loss: mean cross-entropy in nats; perplexity: its exponential. token_accuracy: the share of tokens that are the
    likeliest ones, which Locutusque's gpt2-conversational-or-qa calls reward ("correct words"). penalty: the share of
    likeliest tokens that are the likeliest one a position before too, within a reply ("words repeated one after the
    other"). 16-bit weights give figures of their own: take dtype=float32 to compare with other programs.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    n_batches = -(-loader.n_rows // loader.batch_size)
    with progress("predicting", n_batches) as shown:
        for number in range(n_batches):
            x, y, documents = loader.batch(number)
            rows = min(loader.batch_size, loader.n_rows - number * loader.batch_size)
            y[rows:] = -100  # of the next epoch
            if (y != -100).any():
                sums += predict(model, x, y, documents, device).sums()
            shown(number + 1)
    return rates(sums)


def rates(sums):
    """Return {loss, perplexity, token_accuracy, reward, penalty} of Prediction.sums()."""
    nll, right, repeated, n, n_pairs = sums.tolist()
    figures = {
        "loss": nll / n,
        "perplexity": perplexity(nll / n),
        "token_accuracy": right / n,
        "reward": right / n,
    }
    return figures | {"penalty": repeated / max(1, n_pairs)}


# 2. what the model says itself


def reply(model, tokenizer, prompts, sampling, seed, what):
    """Return a Reply to each prompt; prompt i has the seed `seed` + i."""
    replies = []
    with progress(what, len(prompts)) as shown:
        for first in range(0, len(prompts), REPLIES):
            these = prompts[first : first + REPLIES]
            # only its end stops a reply: whether it would go on to speak for the human is to be seen
            options = sampling | {"seed": seed + first, "stop_ids": (tokenizer.eos_id, END_OF_TEXT)}
            for ids in generate(model, these, tokenizer=tokenizer, **options):
                text = tokenizer.decode(ids)
                openers = [
                    at for opener in tokenizer.stop_strings if (at := text.find(opener)) >= 0
                ]
                ended = len(ids) < sampling["max_new_tokens"]
                replies.append(
                    Reply(text[: min(openers, default=None)].strip(), ended, bool(openers))
                )
            shown(len(replies))
    return replies


@dataclass
class Reply:
    text: str  # up to where another turn would begin
    ended: bool  # by itself, before max_new_tokens
    spoke_on: bool  # wrote the opener of another turn


# 3. what it comes to when it is trained: gpt2-conversational-or-qa's table of its first batches


def first_batches(config, name, model, tokenizer, context):
    """Fine-tune a model on `dataset`'s training split for so many batches; return [{loss, reward, penalty, bleu}], of
    each before the step on it. bleu: of the likeliest tokens, reply by reply, against those that were said. context:
    tokens in a row."""
    device = model.transformer.wpe.weight.device
    shards = find_shards(config.data_dir, config.dataset, "train")
    if (template := open_shard(shards[0][0]).template) not in (None, tokenizer.template):
        tokenizer = Tokenizer(
            template
        )  # which a base that knows no turns takes as well as any other
        if tokenizer.n_vocab > model.config.vocab_size:
            model.grow_vocab(tokenizer.n_vocab)
    loader = Loader(shards, config.batch_size, context, config.seed, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    batches = []
    with progress(f"training {name}", config.first_batches) as shown:
        for number in range(config.first_batches):
            x, y, documents = loader.batch(number)
            prediction = predict(model, x, y, documents, device)
            figures = rates(prediction.sums())
            pairs = zip(
                *([tokenizer.decode(ids) for ids in pair] for pair in prediction.replies()),
                strict=True,
            )
            figures |= likeness(*map(list, pairs))
            batches.append({key: figures[key] for key in BATCH_COLUMNS})
            model(x.to(device), y, documents=documents.to(device))[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            shown(number + 1)
    return batches


# 4. one model, or two side by side


class Material:
    """What models are measured by, the same for all of them: conversations of people, and probes."""

    def __init__(self, config, tokenizer, context):
        """context: of the model that has the least. Raises ValueError where it is too short for what is asked for."""
        self.context, room = context, context - config.max_new_tokens
        self.probes = {}  # name -> ([ids of a prompt], [the value to be remembered])
        for name, k in PROBES.items():
            speaker = Speaker("val", config.seed)
            asked = [probe(speaker, k) for _ in range(config.probes)]
            prompts = [
                tokenizer.render(messages, add_generation_prompt=True)[0] for messages, _ in asked
            ]
            if prompts and (longest := max(map(len, prompts))) > room:
                short = f"max_new_tokens={config.max_new_tokens} and a probe of {longest} tokens are beyond the context"
                raise ValueError(
                    f"{short}, {context}: lower the one, or leave the other out by --probes=0"
                )
            self.probes[name] = prompts, [value for _, value in asked]
        self.loader, self.lines, self.prompts, self.references = None, [], [], []
        if config.convai2:
            if room < 1:
                raise ValueError(
                    f"max_new_tokens={config.max_new_tokens}, but the context is {context}: lower it"
                )
            self.lines = examples(Path(config.convai2), config.max_conversations)
            for persona, messages, said, _ in self.lines:
                system = [{"role": "system", "content": persona}] if persona else []
                self.prompts.append(fit_context(tokenizer, system + messages, room)[0])
                self.references.append(said)
        elif config.dataset:
            shards = [
                (path, 1.0) for path, _ in find_shards(config.data_dir, config.dataset, "val")
            ]
            batch = (config.batch_size, context, config.seed, tokenizer)
            self.loader = Loader(shards, *batch, max_conversations=config.max_conversations)
            shards = [part.shard for part in self.loader.parts]
            self.prompts, self.references = sample_prompts(
                shards, tokenizer, config.replies, room, config.seed
            )
            if config.replies and not self.prompts and any(shard.template for shard in shards):
                short = f"no reply in {config.dataset} has max_new_tokens={config.max_new_tokens} left of {context}"
                raise ValueError(f"{short} tokens: lower it, or ask for none by --replies=0")


def evaluate(config, model, tokenizer, material):
    """Return {name: figure} of a model, for each name in FIGURES (None where nothing was asked for), and [reply].

    `ended` and `speaks_for_human` are of all replies, those to the probes too; the latter counts the openers of other
    turns, the human's or another of its own.
    """
    figures, replies, said = dict.fromkeys(FIGURES), [], []
    config = for_template(config, tokenizer.template)
    sampling = options_of(config)
    if material.loader:
        figures |= predictions(model, material.loader, model.transformer.wpe.weight.device)
    if material.prompts:
        said += reply(model, tokenizer, material.prompts, sampling, config.seed, "replying")
        replies = [r.text for r in said]
        figures |= likeness(replies, material.references) | diversity(replies, tokenizer)
    if material.lines:
        with progress("ranking", len(material.lines)) as shown:
            figures |= convai2_metrics(model, tokenizer, material.lines, material.context, shown)
        pairs = zip(replies, material.references, strict=True)
        figures["f1"] = sum(f1(*pair) for pair in pairs) / len(replies)
    for name, (prompts, values) in material.probes.items():
        if prompts:
            answers = reply(model, tokenizer, prompts, sampling, config.seed, name)
            right = [
                remembers(answer.text, value) for answer, value in zip(answers, values, strict=True)
            ]
            figures[name] = sum(right) / len(right)
            said += answers
    if said:
        figures["ended"] = sum(r.ended for r in said) / len(said)
        figures["speaks_for_human"] = sum(r.spoke_on for r in said) / len(said)
    return figures, replies


@contextlib.contextmanager
def progress(what, total):
    """Yield shown(done): on a terminal, how much of `total` is done and how long the rest will take."""
    start, terminal = time.perf_counter(), sys.stderr.isatty()

    def shown(done):
        if terminal:
            left = (time.perf_counter() - start) * (total / done - 1)
            print(
                f"\r\033[K{what}: {done:,} of {total:,}, {left:.0f} s left",
                end="",
                file=sys.stderr,
                flush=True,
            )

    try:
        yield shown
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(config):
    at_least(0, config, "max_conversations", "replies", "probes", "first_batches", "learning_rate")
    at_least(1, config, "batch_size", "max_new_tokens")
    names = [config.base] * bool(config.base) + [config.init_from]
    if len(set(names)) < len(names):
        raise ValueError(f"base={config.base} is the model itself")
    for name in names:
        if Path(name).is_dir() and not any(
            (Path(name) / file).exists() for file in ("tokenizer.json", "vocab.json")
        ):
            raise FileNotFoundError(
                f"{name} has no tokenizer.json: figures would be of tokens that nobody knows"
            )
    for name in ("json", "report"):
        path = Path(getattr(config, name))
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}={path}: there is no such folder")
        if getattr(config, name) and path.is_dir():
            raise ValueError(f"{name}={path} is a folder: name a file in it")
    if config.convai2 and not Path(config.convai2).exists():
        raise FileNotFoundError(
            f"convai2={config.convai2} does not exist: prepare/personachat.py fetches PersonaChat's"
        )
    given = getattr(config, "given", ())
    for mode, names_of_no_use in (
        ("first_batches", ("dtype", "max_conversations", "replies")),
        ("convai2", ("batch_size", "replies", "data_dir")),
    ):
        for name in names_of_no_use:
            if getattr(config, mode) and name in given:
                raise ValueError(f"{name} does nothing with {mode}: leave it out")
    if not config.first_batches and "learning_rate" in given:
        raise ValueError("learning_rate does nothing without first_batches: leave it out")
    if config.first_batches and (config.convai2 or config.report or not config.dataset):
        raise ValueError("first_batches needs a dataset, and goes with neither convai2 nor report")
    if config.convai2 and config.dataset and "dataset" in given:
        raise ValueError("convai2 goes without a dataset: leave it out")
    if not (config.dataset or config.convai2 or config.probes):
        raise ValueError("nothing is asked for: set dataset, convai2 or probes")
    if config.dataset and not config.convai2:  # before models are fetched
        find_shards(config.data_dir, config.dataset, "train" if config.first_batches else "val")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    if device == "cpu":
        keep_freed_memory()
    if config.first_batches:
        models = {name: load_model(name, device) for name in names}
    else:
        models = {name: load_model(name, device, dtype, inference=True) for name in names}
    context = min(model.config.block_size for model, _ in models.values())
    for name, (model, tokenizer) in models.items():
        if tokenizer.n_vocab > (n := model.config.vocab_size):
            raise ValueError(
                f"{name} knows {n} tokens, its tokenizer makes {tokenizer.n_vocab}: another vocabulary"
            )
    if config.first_batches:
        figures = {name: first_batches(config, name, *models[name], context) for name in names}
        print(table_of_batches(figures))
        return write(config.json, as_json(figures))
    if len({tokenizer.template for _, tokenizer in models.values()}) > 1:
        which = " and ".join(
            f"{name} {tokenizer.n_vocab} tokens" for name, (_, tokenizer) in models.items()
        )
        raise ValueError(
            f"the two have different vocabularies, {which}: evaluate each by itself, on shards of its own"
        )
    tokenizer = models[config.init_from][1]
    material = Material(config, tokenizer, context)
    if material.loader and (lost := material.loader.n_lost):
        print(f"{lost:,} tokens are left out, of exchanges beyond the context")
    figures, replies = {}, {}
    for name in names:
        figures[name], replies[name] = evaluate(config, *models[name], material)
    people = {"people": diversity(material.references, tokenizer)} if material.references else {}
    rows = table(figures | people | (PUBLISHED if config.convai2 else {}))
    widths = [max(len(name) + 2, 10) for name in rows[0][1:]]
    for label, *cells in rows:
        print(
            f"{label:46}{''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths, strict=True))}".rstrip()
        )
    if config.convai2:
        print(
            "TransferTransfo: on ConvAI2's hidden test set; conv-ai: on its validation set. Their perplexities are a"
        )
        print("word of ConvAI2's dictionary, without the end; ours a token of GPT-2's, with it")
    if people:
        print(
            "\n".join(
                f"sacrebleu's {name}: {metric.get_signature()}" for name, metric in METRICS.items()
            )
        )
    write(config.json, as_json(figures))
    if config.report:
        replies |= {"people": material.references} if people else {}
        folders = {name: NANO if name == "nano" else Path(name) for name in names}
        runs = {}
        for name, folder in folders.items():
            with contextlib.suppress(
                FileNotFoundError, ValueError
            ):  # a run without losses has no curve
                runs[name] = read_run(folder)
        lengths = {
            name: [len(tokenizer.encode(text)) for text in texts]
            for name, texts in replies.items()
            if texts
        }
        talks = list(zip(material.prompts, *replies.values(), strict=True))
        talks = (
            [talks[i * len(talks) // SHOWN] for i in range(SHOWN)] if len(talks) > SHOWN else talks
        )
        talks = [
            (tokenizer.parse(prompt), dict(zip(replies, texts, strict=True)))
            for prompt, *texts in talks
        ]
        write(config.report, page(" and ".join(names), rows, runs, lengths, talks))


def as_json(figures):
    """Return figures as JSON, which has no infinity and no NaN: null."""
    return (
        json.dumps(json.loads(json.dumps(figures), parse_constant=lambda _: None), indent=2) + "\n"
    )


def write(path, text):
    """Write a file, if it has a name."""
    if path:
        with replacing(Path(path)) as part:
            part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main, Config)
