"""
Draw how much a reply repeats itself as it gets longer, with and without a penalty:

    python evaluation/repetition.py --init_from=nano

The replies go to held-out people and may not end.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.charts import Chart, pick_colors
from evaluation.metrics import repeated_4grams
from evaluation.report import write
from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.generate import generate
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.shards import find_shards, open_shard

CURVES = {  # name -> what it changes about the sampling
    "none": {"frequency_penalty": 0.0},
    "repetition_penalty 1.1": {"frequency_penalty": 0.0, "repetition_penalty": 1.1},
    "frequency_penalty 0.7": {"frequency_penalty": 0.7},
}
STEP = 20  # tokens between two points of a curve


@dataclass
class Config(ChatSampling):
    init_from: str = default_model()  # the model: nano, a directory, gpt2, ..., org/name
    data_dir: str = "data"  # where the shards are
    dataset: str = "personachat"  # take the prompts from its val*.bin
    prompts: int = 200  # replies to generate for each curve
    max_new_tokens: int = 120  # tokens in each reply
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    svg: str = "repetition.svg"  # the file to write


def main(config):
    at_least(1, config, "prompts")
    at_least(STEP, config, "max_new_tokens")

    # the model, and prompts that leave room for the replies
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    paths = find_shards(config.data_dir, config.dataset, "val")
    shards = [open_shard(path) for path, _ in paths]
    room = model.config.block_size - config.max_new_tokens
    prompts, _ = sample_prompts(shards, tokenizer, config.prompts, room, seed=0)
    if not prompts:
        raise ValueError(f"no prompt in {config.dataset} fits: lower max_new_tokens")

    # measure; a reply that ends could not go on to repeat itself
    no_end = dict.fromkeys(tokenizer.stop_ids, -100.0)  # added to their logits
    lengths = list(range(STEP, config.max_new_tokens + 1, STEP))
    curves = {}
    for name, penalties in CURVES.items():
        sampling = replace(for_template(config, tokenizer.template), **penalties)
        replies = generate(model, prompts, sampling, seed=0, logit_bias=no_end, tokenizer=tokenizer)
        curve = []  # a share for each length
        for n in lengths:
            texts = [tokenizer.decode(ids[:n]) for ids in replies]
            curve.append(repeated_4grams(texts))
        curves[name] = curve
        print(f"{name}: {curve[-1]:.1%} of 4-grams are repeated", file=sys.stderr)

    # draw
    highest = 100 * max(max(curve) for curve in curves.values())
    chart = Chart("tokens", "% of 4-grams that came before", config.max_new_tokens, highest)
    colors = pick_colors(curves)
    for name, curve in curves.items():
        percent = [100 * share for share in curve]
        chart.line(lengths, percent, colors[name])
        chart.dots(lengths, percent, colors[name])
    write(config.svg, chart.svg("repetition in replies", colors))
    print(f"wrote {config.svg}", file=sys.stderr)
    print(json.dumps({"lengths": lengths} | curves))


if __name__ == "__main__":
    run(main, Config)
