"""Draw how much a reply repeats itself as it gets longer, with and without a penalty:

    python evaluation/repetition.py --init_from=nano

The replies go to held-out people and may not end. Needs matplotlib (pip install matplotlib).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import new_figure, save
from evaluation.metrics import repeated_4grams
from evaluation.replies import ReplyConfig, load
from nanochatgpt.configurator import at_least, run
from nanochatgpt.generate import generate
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.sampling import for_template
from nanochatgpt.shards import find_shards, open_shard

CURVES = {  # name -> what it changes about the sampling
    "none": {"frequency_penalty": 0.0},
    "repetition_penalty 1.1": {"frequency_penalty": 0.0, "repetition_penalty": 1.1},
    "frequency_penalty 0.7": {"frequency_penalty": 0.7},
}
STEP = 20  # tokens between two points of a curve


@dataclass
class Config(ReplyConfig):
    dataset: str = "personachat"  # take the prompts from its val*.bin in data/
    prompts: int = 200  # replies to generate for each curve
    max_new_tokens: int = 120  # tokens in each reply
    seed: int = 0  # of the prompts and the replies
    svg: str = "repetition.svg"  # the file to write


def main(config):
    at_least(STEP, config, "max_new_tokens")
    figure = new_figure()
    axes = figure.add_subplot(xlabel="tokens", ylabel="% of 4-grams that came before")

    # the model, and prompts that leave room for the replies
    model, tokenizer = load(config.init_from, config)
    shards = [open_shard(path) for path, _ in find_shards("data", config.dataset, "val")]
    room = model.config.block_size - config.max_new_tokens
    prompts, _ = sample_prompts(shards, tokenizer, config.prompts, room, config.seed)
    if not prompts:
        raise ValueError(f"no prompt in {config.dataset} fits: lower max_new_tokens")

    # a curve for each penalty; a reply that ends could not go on to repeat itself
    no_end = dict.fromkeys(tokenizer.stop_ids, -100.0)  # added to their logits
    lengths = range(STEP, config.max_new_tokens + 1, STEP)
    for name, penalties in CURVES.items():
        sampling = replace(for_template(config, tokenizer.template), **penalties)
        replies = generate(
            model, prompts, sampling, seed=config.seed, logit_bias=no_end, tokenizer=tokenizer
        )
        percents = []  # of each length
        for n in lengths:
            texts = [tokenizer.decode(ids[:n]) for ids in replies]
            percents.append(100 * repeated_4grams(texts))
        axes.plot(lengths, percents, "o-", label=name)
        print(f"{name}: {percents[-1]:.1f}% of 4-grams are repeated")
    axes.legend()
    save(figure, config.svg)


if __name__ == "__main__":
    run(main, Config)
