"""What the best of N replies costs, compared with one reply, and how much better it scores:
python benchmarks/best_of.py [--png=best_of.png]"""

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import ModelConfig, load, resolve, run_benchmark
from nanochatgpt.configurator import at_least
from nanochatgpt.engine import Engine
from nanochatgpt.files import replacing
from nanochatgpt.generate import generate
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.shards import find_shards, open_shard
from rlhf.reward_model import RewardModel, load_reward_model
from rlhf.scoring import best_of, score_replies


@dataclass
class Config(ChatSampling, ModelConfig):
    init_from: str = "nano"  # as for chat.py, or random:NAME: that shape, random weights
    reward: str = "out/reward"  # a reward model, as for chat.py, or random:NAME
    n: int = 8  # replies to choose from, in the timing
    most: int = 16  # draw the curve up to the best of N replies
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # reply to conversations of this dataset's val*.bin
    prompts: int = 50  # conversations to reply to
    png: str = ""  # draw the curve into this file; needs matplotlib


def measure(config):
    """Time the best of n replies and one reply; compare the rewards of the best of 1, 2, 4, ..."""
    at_least(1, config, "n", "most", "prompts")
    if config.png and not importlib.util.find_spec("matplotlib"):
        raise ValueError("png needs matplotlib: pip install matplotlib")
    model, tokenizer, device, dtype = load(config)
    reward = resolve(config.reward, RewardModel)
    reward_model = load_reward_model(reward, tokenizer, device, dtype=dtype, inference=True)
    shards = [open_shard(path) for path, _ in find_shards(config.data_dir, config.dataset, "val")]
    room = model.config.block_size - config.max_new_tokens
    prompts, _ = sample_prompts(shards, tokenizer, config.prompts, room, 0)
    if not prompts:
        raise ValueError(f"{config.dataset} has no prompt of {room} tokens: lower max_new_tokens")

    # an engine for each number of replies, so that each keeps its cached prompts
    sampling = for_template(config, tokenizer.template)
    stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    sizes = (1, config.n, config.most)
    one, few, many = (Engine(model, rows, n_vocab=tokenizer.n_vocab) for rows in sizes)

    def reply(engine, prompt, seed):
        """Return as many replies to a prompt as the engine has rows."""
        copies = [prompt] * len(engine.rows)
        options = {"tokenizer": tokenizer, "engine": engine, "seed": seed}
        return generate(model, copies, sampling, **options, **stops)

    # time one reply and the best of n, then draw the replies of the curve
    seconds = 0.0
    seconds_of_one = 0.0
    n_tokens = 0
    rewards = []  # (most,) for each prompt
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first time is a warm-up
        seed = number * config.most
        t0 = time.perf_counter()
        reply(one, prompt, seed)
        t1 = time.perf_counter()
        best = best_of(few, reward_model, tokenizer, prompt, config.n, sampling, seed)
        t2 = time.perf_counter()
        if number > 0:
            seconds_of_one += t1 - t0
            seconds += t2 - t1
            n_tokens += sum(len(ids) for _, ids in best)
            replies = reply(many, prompt, seed)
            rewards.append(score_replies(reward_model, tokenizer, prompt, replies))
            print(f"{number} prompts", file=sys.stderr)
    rewards = torch.stack(rewards)  # (prompts, most)
    means = rewards.cummax(1).values.mean(0).tolist()  # of the best of 1, 2, 3, ... replies
    curve = {2**k: round(means[2**k - 1], 4) for k in range(config.most.bit_length())}

    # the curve: mean reward over the number of replies
    if config.png:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.3), dpi=110, layout="constrained")
        axes = figure.subplots()
        axes.semilogx(list(curve), list(curve.values()), "o-", base=2)
        axes.set_xticks(list(curve), list(curve))
        axes.set(xlabel="replies to choose from", ylabel="mean reward of the best")
        axes.grid(alpha=0.3)
        with replacing(Path(config.png)) as part:
            figure.savefig(part, format="png")
    return {
        "tokens_per_s": n_tokens / seconds,
        "seconds": seconds,  # of the best of n, scores included
        "seconds_of_one": seconds_of_one,
        "ratio": seconds / seconds_of_one,
        "rewards": curve,  # {number of replies: mean reward of the best}
        "std": rewards.std().item(),  # of the reward of one reply
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
