"""Fine-tune a model for a few batches, and print the metrics of each batch before its step:

    python evaluation/first_batches.py --init_from=out/columned --dataset=mine

This is the table of Locutusque's gpt2-conversational-or-qa: loss, reward and penalty (see `rates`
in metrics.py), and BLEU of the most likely tokens against the replies.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metrics import predict, rates, similarity
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
    dataset: str = "personachat"  # folders of data/ with train*.bin: a,b
    batches: int = 15  # batches to train on
    batch_size: int = 8  # rows in a batch
    learning_rate: float = 5e-5  # of AdamW
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def texts_of_replies(ids, starts, tokenizer):
    """Return the texts of replies, without end tokens; ids and starts: as `predict` has them."""
    replies = ids.tensor_split(starts.nonzero()[1:, 0])
    return [tokenizer.decode(reply[:-1].tolist()) for reply in replies]


def main(config):
    at_least(1, config, "batches", "batch_size")
    shards = find_shards("data", config.dataset, "train")
    template = open_shard(shards[0][0]).template
    device = pick_device(config.device)

    # the model; one that does not know the template of the data can learn it
    model, tokenizer = load_model(config.init_from, device)
    if template not in (None, tokenizer.template):
        tokenizer = Tokenizer(template)
        model.grow_vocab(tokenizer.n_vocab)
    speed_up(model)
    block_size = model.config.block_size
    loader = Loader(shards, config.batch_size, block_size, seed=1337, tokenizer=tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)

    print("batch" + "".join(f"{key:>10}" for key in COLUMNS))
    for number in range(config.batches):
        # the metrics; BLEU compares reply by reply
        x, y, documents = loader.batch(number)
        prediction = predict(model, x, y, documents, device)
        targets, predicted, _, starts = prediction
        texts = texts_of_replies(predicted, starts, tokenizer)
        references = texts_of_replies(targets, starts, tokenizer)
        metrics = rates([prediction]) | similarity(texts, references)
        line = f"{number + 1:5}"
        for key, form in COLUMNS.items():
            line += f"{metrics[key]:>10{form}}"
        print(line)

        # the step
        _, loss = model(x.to(device), y, documents.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    run(main, Config)
