"""
Fine-tune a model for a few batches, or two, and print the metrics of each batch before its step:

    python evaluation/first_batches.py --init_from=out/columned --base=gpt2 --dataset=mine

This is the table of Locutusque's gpt2-conversational-or-qa: loss, reward and penalty (see `rates`
in metrics.py), and BLEU of the most likely tokens against the replies.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metrics import predict, rates, similarity
from evaluation.report import progress, write_json
from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import pick_device
from nanochatgpt.fast import speed_up
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards, open_shard
from nanochatgpt.tokenizer import Tokenizer

COLUMNS = {"loss": ".4f", "reward": ".1%", "penalty": ".1%", "bleu": ".1%"}  # metric -> format


@dataclass
class Config:
    init_from: str = default_model()  # the model: nano, a directory, gpt2, ..., org/name
    base: str = ""  # a second model to compare it with
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # folders of data_dir with train*.bin: a,b
    batches: int = 15  # batches to train on
    batch_size: int = 8  # rows in a batch
    learning_rate: float = 5e-5  # of AdamW
    json: str = ""  # write the metrics to this file too
    seed: int = 1337  # of the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def train(config, name, model, loader, device):
    """Fine-tune a model; return the metrics of each batch before its step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    batches = []
    for number in progress(range(config.batches), f"training {name}"):
        x, y, documents = loader.batch(number)

        # the metrics; BLEU compares reply by reply
        prediction = predict(model, x, y, documents, device)
        predicted = []
        references = []
        for ids, target_ids in prediction.replies():
            predicted.append(loader.tokenizer.decode(ids))
            references.append(loader.tokenizer.decode(target_ids))
        metrics = rates(prediction.sums()) | similarity(predicted, references)
        batches.append({key: metrics[key] for key in COLUMNS})

        # the step
        _, loss = model(x.to(device), y, documents.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return batches


def main(config):
    at_least(1, config, "batches", "batch_size")
    shards = find_shards(config.data_dir, config.dataset, "train")
    template = open_shard(shards[0][0]).template
    device = pick_device(config.device)

    # the models; one that does not know the template of the data can learn it
    models = {}
    names = [config.base, config.init_from] if config.base else [config.init_from]
    for name in names:
        model, tokenizer = load_model(name, device)
        if template not in (None, tokenizer.template):
            tokenizer = Tokenizer(template)
            model.grow_vocab(tokenizer.n_vocab)
        models[name] = (speed_up(model), tokenizer)

    # train each on the same rows
    context = min(model.config.block_size for model, _ in models.values())
    metrics = {}
    for name, (model, tokenizer) in models.items():
        loader = Loader(shards, config.batch_size, context, config.seed, tokenizer)
        metrics[name] = train(config, name, model, loader, device)
    if config.json:
        write_json(config.json, metrics)

    # a line for each batch, four columns for each model
    print("     " + "".join(f"{name:>40}" for name in metrics))
    print("batch" + "".join(f"{key:>10}" for key in COLUMNS) * len(metrics))
    for number in range(config.batches):
        line = f"{number + 1:5}"
        for batches in metrics.values():
            for key, form in COLUMNS.items():
                line += f"{batches[number][key]:>10{form}}"
        print(line)


if __name__ == "__main__":
    run(main, Config)
