"""What choosing among replies costs, compared with one reply: python benchmarks/best_of.py

The best of N: write N replies to a prompt and score them with a reward model. Ranking: compute the
log-likelihoods of 20 candidates, which people wrote.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nanochatgpt  # isort: skip  # noqa: F401  # first: sets how OpenMP's threads wait
import torch

from benchmarks.common import ModelConfig, load, resolve, run_benchmark
from evaluation.ranking import continuation, loglikelihoods
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.prompts import sample_prompts
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.shards import find_shards, open_shard
from rlhf.reward_model import RewardModel, load_reward_model
from rlhf.scoring import score_replies


@dataclass
class Config(ChatSampling, ModelConfig):
    init_from: str = "nano"  # as for chat.py, or random:NAME: that shape, random weights
    reward: str = "out/reward"  # a reward model, as for chat.py, or random:NAME
    n: int = 8  # replies to choose from
    data_dir: str = "data"  # where the datasets are
    dataset: str = "personachat"  # reply to conversations of this dataset's val*.bin
    prompts: int = 50  # conversations to reply to


def measure(config):
    """Time one reply and the best of N, then one candidate and 20."""
    model, tokenizer, device, dtype = load(config)
    reward = resolve(config.reward, RewardModel)
    reward_model = load_reward_model(reward, tokenizer, device, dtype=dtype, inference=True)

    # prompts, and the first 20 replies to them as candidates
    shards = [open_shard(path) for path, _ in find_shards(config.data_dir, config.dataset, "val")]
    room = model.config.block_size - config.max_new_tokens
    prompts, texts = sample_prompts(shards, tokenizer, config.prompts, room, 0)
    candidates = [continuation(tokenizer, text)[: config.max_new_tokens] for text in texts[:20]]

    # an engine for one reply and one for N, so that each keeps its cached prompts
    one = Engine(model, 1, n_vocab=tokenizer.n_vocab)
    many = Engine(model, config.n, n_vocab=tokenizer.n_vocab)
    sampling = for_template(config, tokenizer.template)
    options = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    options["tokenizer"] = tokenizer

    def reply(engine, prompt, seed):
        """Return as many replies to a prompt as the engine has rows."""
        copies = [prompt] * len(engine.rows)
        return generate(model, copies, sampling, engine=engine, seed=seed, **options)

    # seconds for one reply, the best of N, one candidate, 20 candidates; tokens in the N replies
    costs = []  # for each prompt
    rewards = []  # (N,) for each prompt
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first time is a warm-up
        seed = number * config.n
        t0 = time.perf_counter()
        reply(one, prompt, seed)
        t1 = time.perf_counter()
        replies = reply(many, prompt, seed)
        rewards.append(score_replies(reward_model, tokenizer, prompt, replies))
        t2 = time.perf_counter()
        loglikelihoods(model, prompt, candidates[:1])
        t3 = time.perf_counter()
        loglikelihoods(model, prompt, candidates)
        t4 = time.perf_counter()
        n_tokens = sum(map(len, replies))
        costs.append([t1 - t0, t2 - t1, t3 - t2, t4 - t3, n_tokens])
        print(f"{number} of {len(prompts)} prompts", file=sys.stderr)

    costs = torch.tensor(costs[1:]).sum(0).tolist()
    one_reply, best_of_n, one_candidate, all_candidates, n_tokens = costs
    rewards = torch.stack(rewards[1:])  # (prompts, N)
    return {
        "tokens_per_s": n_tokens / best_of_n,
        "seconds": best_of_n,  # scores included
        "ratio": best_of_n / one_reply,
        "ranking_ratio": all_candidates / one_candidate,
        "rewards": rewards.cummax(1).values.mean(0).tolist(),  # of the best of 1, 2, 3, ... replies
        "std": rewards.std().item(),  # of the reward of one reply
    }


if __name__ == "__main__":
    run_benchmark(measure, Config)
