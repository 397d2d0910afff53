"""
Measure what a model says, next to another one:

    python evaluate.py --init_from=out/chat --base=gpt2 --dataset=personachat

On the validation shards: how well it predicts the supervised tokens; how close its own replies are
to what people replied, how much they repeat, whether they emit the end token and do not write the
user's next turn. Without a corpus: whether it remembers names, facts and sentences that
prepare/recall.py does not train on.
"""

import contextlib
import math
from dataclasses import dataclass

import torch

from evaluation.charts import read_run
from evaluation.metrics import SACREBLEU, diversity, predict, rates, remembers, similarity
from evaluation.replies import reply_to
from evaluation.report import ROWS, page, print_table, progress, table, write, write_json
from nanochatgpt.checkpoint import NANO, default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import keep_freed_memory, pick_device, pick_dtype
from nanochatgpt.fast import speed_up
from nanochatgpt.loader import Loader
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.shards import find_shards
from prepare.recall_generator import Speaker, probe

# kind of probe -> exchanges since the fact was told; 0: the fact is in the persona
PROBES = {"recall_1": 1, "recall_3": 3, "recall_6": 6, "persona": 0}


@dataclass
class Config(ChatSampling):
    max_new_tokens: int = 100  # new tokens in a reply, at most
    init_from: str = default_model()  # the model: nano, a directory, gpt2, ..., org/name
    base: str = ""  # a second model to compare it with
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with val*.bin: a,b; empty = only the probes
    max_conversations: int = 0  # use the first N conversations of each shard (0 = all)
    batch_size: int = 8  # rows in a batch of predictions
    replies: int = 200  # replies to generate
    probes: int = 100  # facts of each kind to ask for
    json: str = ""  # write the metrics to this file too
    report: str = ""  # write an HTML page with tables, charts and conversations to this file
    seed: int = 1337  # of the replies and the probes
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto = the fastest here


class EvalSet:
    """What all models are measured on: conversations of people, and probes."""

    def __init__(self, config, tokenizer, context):
        """context: the shortest context of the models, so that all see the same tokens. Raises
        ValueError if it is too short for the prompts and max_new_tokens."""
        self.loader = None
        self.prompts = []  # to reply to, a list of ids each
        self.references = []  # what people replied
        self.probes = {}  # name -> ([ids of a prompt], [the value to remember])
        room = context - config.max_new_tokens  # for a prompt
        too_long = f"max_new_tokens={config.max_new_tokens} leaves no room in {context} tokens"

        for name, k in PROBES.items():
            speaker = Speaker("val", config.seed)
            prompts = []
            values = []
            for _ in range(config.probes):
                messages, value = probe(speaker, k)
                prompts.append(tokenizer.render(messages, add_generation_prompt=True)[0])
                values.append(value)
            if any(len(prompt) > room for prompt in prompts):
                raise ValueError(f"{too_long} for a probe: lower it, or set --probes=0")
            self.probes[name] = (prompts, values)

        if config.dataset:
            paths = find_shards(config.data_dir, config.dataset, "val")
            n = config.max_conversations
            self.loader = Loader(paths, config.batch_size, context, config.seed, tokenizer, n)
            shards = [part.shard for part in self.loader.parts]
            self.prompts, self.references = sample_prompts(
                shards, tokenizer, config.replies, room, config.seed
            )
            has_replies = any(shard.template for shard in shards)
            if config.replies and has_replies and not self.prompts:
                raise ValueError(f"{too_long} for a prompt: lower it, or set --replies=0")


@torch.no_grad()
def predictions(model, loader, device):
    """Return `rates` over all supervised tokens of a Loader. Compare with other programs in
    float32, because the precision changes them."""
    sums = torch.zeros(5, dtype=torch.float64)
    n_batches = math.ceil(loader.n_rows / loader.batch_size)
    for number in progress(range(n_batches), "predicting"):
        x, y, documents = loader.batch(number)
        rows_left = loader.n_rows - number * loader.batch_size
        y[rows_left:] = -100  # rows of the next epoch
        if (y != -100).any():
            sums += predict(model, x, y, documents, device).sums()
    return rates(sums)


def evaluate(config, model, tokenizer, eval_set):
    """Return ({metric: value}, [text of a reply]) of a model; metrics that were not asked for are
    None. `ended` and `speaks_for_human` are over all replies, those to probes included."""
    metrics = dict.fromkeys(ROWS)
    sampling = for_template(config, tokenizer.template)

    # 1. how it predicts what people said
    if eval_set.loader:
        metrics |= predictions(model, eval_set.loader, model.transformer.wpe.weight.device)

    # 2. how it replies to them
    replies = reply_to(eval_set.prompts, model, tokenizer, sampling, config.seed, "replying")
    texts = [reply.text for reply in replies]
    if texts:
        metrics |= similarity(texts, eval_set.references) | diversity(texts, tokenizer)

    # 3. what it remembers
    for name, (prompts, values) in eval_set.probes.items():
        answers = reply_to(prompts, model, tokenizer, sampling, config.seed, name)
        correct = 0
        for answer, value in zip(answers, values, strict=True):
            correct += remembers(answer.text, value)
        if answers:
            metrics[name] = correct / len(answers)
        replies += answers

    # 4. whether it ends and keeps to its turn
    if replies:
        n = len(replies)
        metrics["ended"] = sum(reply.ended for reply in replies) / n
        metrics["speaks_for_human"] = sum(reply.speaks_for_human for reply in replies) / n
    return metrics, texts


def report(title, rows, replies, tokenizer, eval_set):
    """Return the HTML page of an evaluation. replies: {name: [text of a reply]}."""
    runs = {}
    lengths = {}
    for name, texts in replies.items():
        with contextlib.suppress(FileNotFoundError, ValueError):  # not a run, or without losses
            runs[name] = read_run(NANO if name == "nano" else name)
        if texts:
            lengths[name] = [len(tokenizer.encode(text)) for text in texts]

    # twenty of the conversations
    talks = []
    prompts = eval_set.prompts
    step = max(1, math.ceil(len(prompts) / 20))
    for i in range(0, len(prompts), step):
        messages = tokenizer.parse(prompts[i])
        row = {name: texts[i] for name, texts in replies.items()}
        talks.append((messages, row))
    return page(title, rows, runs, lengths, talks)


def main(config):
    at_least(0, config, "max_conversations", "replies", "probes")
    at_least(1, config, "batch_size", "max_new_tokens")

    # 1. the models; fail before downloading weights if there is no data
    if config.dataset:
        find_shards(config.data_dir, config.dataset, "val")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    if device == "cpu":
        keep_freed_memory()
    models = {}
    templates = set()
    names = [config.base, config.init_from] if config.base else [config.init_from]
    for name in names:
        model, tokenizer = load_model(name, device, dtype, inference=True)
        models[name] = speed_up(model)
        templates.add(tokenizer.template)
    title = " and ".join(models)
    if len(templates) > 1:
        raise ValueError(f"{title} use different templates: evaluate each on its own shards")

    # 2. what they are measured on
    context = min(model.config.block_size for model in models.values())
    eval_set = EvalSet(config, tokenizer, context)
    if eval_set.loader and eval_set.loader.n_lost:
        print(f"{eval_set.loader.n_lost:,} tokens are left out: exchanges beyond the context")

    # 3. the measurements
    metrics = {}
    replies = {}
    for name, model in models.items():
        metrics[name], replies[name] = evaluate(config, model, tokenizer, eval_set)

    # 4. the table, with people in the last column
    columns = dict(metrics)
    if eval_set.references:
        replies["people"] = eval_set.references
        columns["people"] = diversity(eval_set.references, tokenizer)
    rows = table(columns)
    print_table(rows)
    if eval_set.references:
        for name, metric in SACREBLEU.items():
            print(f"sacrebleu's {name}: {metric.get_signature()}")

    # 5. the files
    if config.json:
        write_json(config.json, metrics)
    if config.report:
        write(config.report, report(title, rows, replies, tokenizer, eval_set))


if __name__ == "__main__":
    run(main, Config)
