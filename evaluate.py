"""Measure what a model says, next to another one:

    python evaluate.py --init_from=out/chat --base=gpt2 --dataset=personachat

On the validation shards: how well it predicts the supervised tokens; how close its own replies are
to what people replied, how much they repeat, whether they emit the end token and do not write the
user's next turn. Without a corpus: whether it remembers names, facts and sentences that
prepare/recall.py does not train on.
"""

import math
from dataclasses import dataclass

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
from evaluation.metrics import SACREBLEU, diversity, predict, rates, remembers, similarity
from evaluation.replies import ReplyConfig, load, reply_to
from evaluation.report import ROWS, page, progress, table, write, write_json
from nanochatgpt.configurator import at_least, run
from nanochatgpt.fast import speed_up
from nanochatgpt.loader import Loader
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.shards import find_shards
from prepare.recall_generator import Speaker, probe

# kind of probe -> exchanges since the fact was told; 0: the fact is in the persona
PROBES = {"recall_1": 1, "recall_3": 3, "recall_6": 6, "persona": 0}


@dataclass
class Config(ReplyConfig):
    base: str = ""  # a second model to compare it with
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with val*.bin: a,b; empty = only the probes
    max_conversations: int = 0  # use the first N conversations of each shard (0 = all)
    batch_size: int = 8  # rows in a batch of predictions
    replies: int = 200  # replies to generate
    probes: int = 100  # facts of each kind to ask for
    json: str = ""  # write the metrics to this file too
    report: str = ""  # write an HTML page with the table and conversations to this file


class EvalSet:
    """What all models are measured on: conversations of people, and probes."""

    def __init__(self, config, tokenizer, context):
        """context: the shortest context of the models, so that all see the same tokens. Raises
        ValueError if it is too short for the prompts and max_new_tokens."""
        self.loader = None
        self.prompts = []  # to reply to, a list of ids each
        self.references = []  # what people replied
        self.probes = {}  # name -> [(ids of a prompt, the value to remember)]

        # made-up conversations that end with a question
        longest = 1  # tokens in a prompt
        for name, k in PROBES.items():
            speaker = Speaker("val", config.seed)
            self.probes[name] = []
            for _ in range(config.probes):
                messages, value = probe(speaker, k)
                prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
                self.probes[name].append((prompt, value))
                longest = max(longest, len(prompt))
        room = context - config.max_new_tokens  # for a prompt
        if longest > room:
            problem = f"max_new_tokens={config.max_new_tokens} leaves {room} of {context} tokens"
            raise ValueError(f"{problem} for prompts of {longest}: lower it, or set --probes=0")

        # conversations of people
        if config.dataset:
            paths = find_shards(config.data_dir, config.dataset, "val")
            n = config.max_conversations
            self.loader = Loader(paths, config.batch_size, context, config.seed, tokenizer, n)
            shards = [part.shard for part in self.loader.parts]
            samples = sample_prompts(shards, tokenizer, config.replies, room, config.seed)
            self.prompts, self.references = samples


def predictions(model, loader):
    """Return `rates` over all supervised tokens of a Loader."""
    device = model.transformer.wpe.weight.device
    batches = []
    n_batches = math.ceil(loader.n_rows / loader.batch_size)
    for number in progress(range(n_batches), "predicting"):
        x, y, documents = loader.batch(number)
        rows_left = loader.n_rows - number * loader.batch_size
        y[rows_left:] = -100  # rows of the next epoch
        batches.append(predict(model, x, y, documents, device))
    return rates(batches)


def evaluate(config, model, tokenizer, eval_set):
    """Return ({metric: value}, [text of a reply]) of a model; metrics that were not asked for are
    None. `ended` and `speaks_for_human` are over all replies, those to probes included."""
    metrics = dict.fromkeys(ROWS)

    # 1. how it predicts what people said
    if eval_set.loader:
        metrics |= predictions(model, eval_set.loader)

    # 2. how it replies to them
    replies = reply_to(eval_set.prompts, model, tokenizer, config, "replying")
    texts = [reply.text for reply in replies]
    if texts:
        metrics |= similarity(texts, eval_set.references) | diversity(texts, tokenizer)

    # 3. what it remembers
    for name, probes in eval_set.probes.items():
        answers = reply_to([prompt for prompt, _ in probes], model, tokenizer, config, name)
        correct = 0
        for answer, (_, value) in zip(answers, probes, strict=True):
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


def main(config):
    at_least(0, config, "max_conversations", "replies", "probes")
    at_least(1, config, "batch_size", "max_new_tokens")

    # 1. the models; fail before downloading weights if there is no data
    if config.dataset:
        find_shards(config.data_dir, config.dataset, "val")
    models = {}
    templates = set()
    for name in filter(None, [config.base, config.init_from]):
        model, tokenizer = load(name, config)
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
    if config.json:
        write_json(config.json, metrics)

    # 4. the table, with people in the last column
    if eval_set.references:
        replies["people"] = eval_set.references
        metrics["people"] = diversity(eval_set.references, tokenizer)
    text = table(metrics)
    print(text)
    if eval_set.references:
        for name, metric in SACREBLEU.items():
            print(f"sacrebleu's {name}: {metric.get_signature()}")

    # 5. the page
    if config.report:
        write(config.report, page(title, text, replies, eval_set.prompts, tokenizer))


if __name__ == "__main__":
    run(main, Config)
