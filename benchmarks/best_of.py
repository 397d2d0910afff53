"""
What choosing the best of several replies costs, beside one reply, and how much better it is.
"""

import sys
import time
from dataclasses import dataclass

import torch

from nanochatgpt.checkpoint import load_model
from nanochatgpt.configurator import at_least
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.sampling import ChatSampling, for_template, options_of
from nanochatgpt.shards import find_shards, open_shard, sample_prompts
from rlhf.reward import best_of, scores_behind
from rlhf.reward_model import load_reward_model


@dataclass
class Config(ChatSampling):
    init_from: str = "nano"  # as for chat.py
    reward: str = "out/reward"  # a reward model, as for chat.py
    n: int = 8  # replies to choose from
    most: int = 16  # the curve of rewards goes up to the best of so many
    data_dir: str = "data"  # where the shards are
    dataset: str = "personachat"  # whose held-out people are replied to: this data set's val*.bin
    prompts: int = 50  # so many of them
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def measure(config):
    """Return the time of the best of `n` replies, their scores included, as a multiple of that of one reply (`ratio`),
    and the mean reward of the best of 1, 2, 4, ... replies (`rewards`), with the standard deviation of one."""
    at_least(1, config, "n", "most", "prompts")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    reward_model = load_reward_model(config.reward, tokenizer, device, dtype=dtype, inference=True)
    shards = [open_shard(path) for path, _ in find_shards(config.data_dir, config.dataset, "val")]
    room = model.config.block_size - config.max_new_tokens
    prompts, _ = sample_prompts(shards, tokenizer, config.prompts, room, 0)
    if not prompts:
        raise ValueError(
            f"no reply in {config.dataset} has a prompt of at most {room} tokens: lower max_new_tokens"
        )
    options = options_of(for_template(config, tokenizer.template))
    options |= {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    engines = [
        Engine(model, rows, n_vocab=tokenizer.n_vocab) for rows in (1, config.n, config.most)
    ]
    seconds, drawn, n_tokens = [0.0, 0.0], [], 0
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first time does not count
        seed = number * config.most
        for which in (0, 1) if number % 2 else (1, 0):
            t0 = time.perf_counter()
            if which:
                chosen = best_of(
                    engines[1], reward_model, tokenizer, prompt, config.n, seed=seed, **options
                )
                n_tokens += sum(len(ids) for _, ids in chosen) * (number > 0)
            else:
                generate(
                    model, [prompt], engine=engines[0], tokenizer=tokenizer, seed=seed, **options
                )
            seconds[which] += (time.perf_counter() - t0) * (number > 0)
        if not number:
            continue
        replies = generate(
            model,
            [prompt] * config.most,
            engine=engines[2],
            tokenizer=tokenizer,
            seed=seed,
            **options,
        )
        drawn.append(scores_behind(reward_model, tokenizer, prompt, replies))
        print(f"{number} prompts", file=sys.stderr)
    drawn = torch.stack(drawn)  # (prompts, most)
    best = drawn.cummax(1).values.mean(0).tolist()
    return {
        "tokens_per_s": n_tokens / seconds[1],
        "seconds": seconds[1],
        "seconds_of_one": seconds[0],
        "ratio": seconds[1] / seconds[0],
        "rewards": {2**k: round(best[2**k - 1], 4) for k in range(config.most.bit_length())},
        "std": drawn.std().item(),
    }
