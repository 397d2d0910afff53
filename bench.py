"""
Measure: python bench.py decode|fidelity|repetition [--knob=value ...]

    decode      how fast a model reads prompts and writes: tokens a second, bytes of weights a second, memory, start-up
    fidelity    what a dtype costs: how far its next-token distributions are from float32's, on real text
    repetition  how much a chat repeats itself with given sampling, beside what people do

Progress goes to stderr; the last line on stdout is the result as one JSON object.
"""

import json
import platform
import random
import re
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import load_model, pick_device, pick_dtype
from configurator import run
from generate import Engine, generate
from sampling import ChatSampling, Sampling
from shards import find_shards, open_shard

ITEMSIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.int8: 1}


@dataclass
class Decode:
    init_from: str = "random:gpt2"  # as for chat.py; random:gpt2 has that shape and needs no weights
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    rows: int = 1  # prompts at once
    prompt_len: int = 128  # tokens in a prompt
    new_tokens: int = 128  # tokens that follow it
    repeats: int = 5  # measurements, after one that does not count; the median is given
    record: bool = True  # replay steps without Python: by CUDA graphs, on a CPU by a trace
    compile: bool = False  # torch.compile the step


@dataclass
class Fidelity:
    init_from: str = "out/demo"  # a trained model: a directory, gpt2, ... or org/name on the hub
    data_dir: str = "data"  # where the shards are
    dataset: str = "chitchat"  # the text: this data set's val*.bin
    positions: int = 2000  # next-token distributions to compare
    dtype: str = "int8"  # what to compare with float32: bfloat16, float16, int8
    device: str = "cpu"  # cpu, cuda


@dataclass
class Repetition(ChatSampling):
    max_new_tokens: int = 100
    init_from: str = "out/demo"  # a model that was trained to chat
    data_dir: str = "data"  # where the shards are
    dataset: str = "chitchat"  # the openings: those of this data set's val*.bin
    replies: int = 200  # how many
    seed: int = 0  # of the first reply; the next has the next
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8


def decode(config):
    """Return tokens a second for prompts (`prompt_tokens_per_s`), what follows (`new_tokens_per_s`) and both together
    (`tokens_per_s`: new tokens by the whole time, as the peers are measured)."""
    at_least_1(config, "rows", "prompt_len", "new_tokens", "repeats")
    start = time.perf_counter()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, _ = load_model(config.init_from, device, dtype, inference=True)
    size, vocab_size = config.prompt_len + config.new_tokens, model.config.vocab_size
    if size > model.config.block_size:
        raise ValueError(
            f"prompt_len={config.prompt_len} and new_tokens={config.new_tokens} are more than the context of "
            f"{model.config.block_size} tokens"
        )
    engine = Engine(model, config.rows, size, record=config.record, compile=config.compile)
    sampling = Sampling(max_new_tokens=config.new_tokens, top_k=50)
    choose, seconds, started = random.Random(0), [], 0.0
    for repeat in range(config.repeats + 1):
        t0 = time.perf_counter()
        for row in range(config.rows):  # another prompt each time: none can be taken over from the one before
            engine.add([choose.randrange(vocab_size) for _ in range(config.prompt_len)], sampling, seed=row)
        engine.step()  # the prompts, and a token each; the ids on the host say that the device is done
        t1 = time.perf_counter()
        while engine.step():
            pass
        t2 = time.perf_counter()
        started = started or t1 - start
        seconds.append((t1 - t0, t2 - t1))
        print(f"{repeat}: prompt {t1 - t0:.3f} s, new tokens {t2 - t1:.3f} s", file=sys.stderr)
    prompt, new = (statistics.median(s) for s in zip(*seconds[1:], strict=True))
    steps = config.new_tokens - 1
    c = model.config
    weights = (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) * ITEMSIZE[dtype]  # that a step multiplies with
    return {
        "tokens_per_s": config.rows * config.new_tokens / (prompt + new),
        "seconds": prompt + new,
        "prompt_tokens_per_s": config.rows * config.prompt_len / prompt,
        "new_tokens_per_s": config.rows * steps / new if steps else None,
        "weights_gb_per_s": weights * steps / new / 1e9 if steps else None,
        "first_token_s": started,  # since the imports, with loading and whatever is set up at first use
        "warm_up_s": sum(seconds[0]) - prompt - new,
        "peak_memory_mb": peak_memory(device),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
    }


@torch.inference_mode()
def fidelity(config):
    """Return the mean KL divergence of the dtype's next-token distributions from float32's, in nats, over the first
    positions of a validation set, how often both have the same likeliest token, and both perplexities."""
    at_least_1(config, "positions")
    if config.init_from.startswith("random:"):
        raise ValueError(f"init_from={config.init_from}: two random models have nothing in common; take a trained one")
    device = pick_device(config.device)
    paths = find_shards(config.data_dir, config.dataset, "val")
    models = [load_model(config.init_from, device)[0].eval()]
    models.append(
        load_model(config.init_from, device, pick_dtype(config.dtype, device, True), inference=True)[0].eval()
    )
    block = models[0].config.block_size
    tokens = torch.from_numpy(open_shard(paths[0]).tokens[: config.positions + 1].astype("int64")).to(device)
    if len(tokens) < 2:
        raise ValueError(f"{paths[0]} has {len(tokens)} tokens: too few to compare")
    kl = same = n = 0
    losses = [0.0, 0.0]
    for x, y in zip(tokens[:-1].split(block), tokens[1:].split(block), strict=True):
        positions = torch.arange(len(x), device=device)[None]
        # through the cache, as in generation: it may round keys and values
        caches = [model.kv_cache(1, block).part(slice(1), len(x)) for model in models]
        logits = [model(x[None], None, cache, positions)[0][0] for model, cache in zip(models, caches, strict=True)]
        p, q = (each.float().log_softmax(-1) for each in logits)  # (T, V)
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        losses = [loss + F.nll_loss(r, y, reduction="sum").item() for loss, r in zip(losses, (p, q), strict=True)]
        n += len(x)
        print(f"{n} of {len(tokens) - 1} positions", file=sys.stderr)
    perplexity, of_float32 = (torch.tensor(loss / n).exp().item() for loss in (losses[1], losses[0]))
    return {
        "kl": kl / n,
        "same_top": same / n,
        "perplexity": perplexity,
        "perplexity_float32": of_float32,
        "positions": n,
    }


def repetition(config):
    """Return the share of 4-grams that came before in the same reply, and the mean length of replies, of the model's
    replies to the openings of a validation set, and of the people's own."""
    at_least_1(config, "replies")
    device = pick_device(config.device)
    shard = open_shard(find_shards(config.data_dir, config.dataset, "val")[0])
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    prompts, replies = [], []
    for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
        mask = shard.mask(start, stop)
        first = int(mask.argmax())  # the first supervised token: a reply begins
        length = int((~mask[first:]).argmax()) or len(mask) - first
        if len(prompts) < config.replies and 0 < first < model.config.block_size - config.max_new_tokens:
            prompts.append(shard.tokens[start : start + first].tolist())
            replies.append(shard.tokens[start + first : start + first + length - 1].tolist())  # without its end token
    if len(prompts) < config.replies:
        raise ValueError(f"replies={config.replies}, but {config.dataset} has {len(prompts)} openings that fit")
    names = [field.name for field in fields(Sampling)]
    sampling = {name: getattr(config, name) for name in names}
    stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings, "tokenizer": tokenizer}
    new = generate(model, prompts, seed=config.seed, **stops, **sampling)
    result = {"replies": len(prompts)}
    for who, said in (("", new), ("_of_people", replies)):
        grams = [list(zip(*(ids[n:] for n in range(4)), strict=False)) for ids in said]
        result["repeated_4grams" + who] = 1 - sum(len(set(g)) for g in grams) / max(sum(map(len, grams)), 1)
        result["tokens_in_a_reply" + who] = sum(map(len, said)) / max(len(said), 1)
    return result


def at_least_1(config, *names):
    """Raise ValueError for a knob below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: it must be 1 or more")


def peak_memory(device):
    """Return the most memory in use so far, in MB: on CUDA what PyTorch had allocated, else the process's own."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if Path("/proc/self/status").exists():  # getrusage would count the process that we were forked from
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


MODES = {"decode": (decode, Decode), "fidelity": (fidelity, Fidelity), "repetition": (repetition, Repetition)}


def main():
    mode = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if mode in ("-h", "--help"):
        return print(__doc__.strip())
    if mode not in MODES:
        print(f"bench.py: {mode} is none of {', '.join(MODES)}", file=sys.stderr)
        sys.exit(2)
    measure, Config = MODES[mode]

    def report(config):
        result = measure(config)
        about = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        rounded = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in result.items()}
        print(json.dumps({"bench": mode} | rounded | {"config": asdict(config), "torch": torch.__version__} | about))

    run(report, Config)


if __name__ == "__main__":
    main()
