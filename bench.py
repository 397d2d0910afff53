"""
Measure: python bench.py decode|train|prepare|fidelity|candidates|best_of|serve [--knob=value ...]

    decode      how fast a model reads prompts and writes: tokens a second, bytes of weights a second, memory, start-up
    train       how fast it learns: tokens and supervised tokens a second, beside nanoGPT's and transformers' loop
    prepare     how fast conversations become a shard, beside tiktoken alone, and in how much memory
    fidelity    what a dtype costs: how far its next-token distributions are from float32's, on real text
    candidates  what ranking the candidates of a line of PersonaChat costs, beside scoring its reply alone
    best_of     what choosing the best of several replies costs, beside one reply, and how much better it is
    serve       what many clients of serve.py get at once, beside one: tokens a second, time to the first, memory

Progress goes to stderr; the last line on stdout is the result as one JSON object.
"""

import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from checkpoint import keep_freed_memory, load_model, pick_device, pick_dtype
from configurator import run
from convai2 import continuation, loglikelihoods
from generate import Engine, generate
from load import drive, same
from model import PRESETS, move
from monitor import peak_flops
from reward import best_of, load_reward_model, scores_behind
from sampling import ChatSampling, Sampling
from shards import Loader, find_shards, open_shard, openings
from tokenizer import Tokenizer, fit_context, gpt2_encoding

sys.path.append(str(Path(__file__).with_name("prepare")))
from personachat import examples

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
class Train:
    loop: str = "packed"  # packed (ours), nanogpt, or padded (transformers', to the longest in a batch)
    init_from: str = "random:gpt2"  # random:gpt2, random:gpt2-medium, ...: of that shape
    data_dir: str = "data"  # where the shards are
    dataset: str = ""  # its train*.bin; without it random tokens, all of them supervised
    batch_size: int = 4  # rows of a step; for padded, conversations
    block_size: int = 256  # tokens in a row; for padded, at most
    dropout: float = 0.1  # share of activations dropped
    steps: int = 5  # measured, after two that are not; the median is given
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "bfloat16"  # of autocast: float32, bfloat16
    compile: bool = False  # torch.compile the model
    gradient_checkpointing: bool = False  # compute activations again in the backward pass; not for padded


@dataclass
class Prepare:
    megabytes: int = 64  # of text: chitchat's conversations, again and again


@dataclass
class Fidelity:
    init_from: str = "nano"  # a trained model: nano, a directory, gpt2, ... or org/name on the hub
    data_dir: str = "data"  # where the shards are
    dataset: str = "chitchat"  # the text: this data set's val*.bin
    positions: int = 2000  # next-token distributions to compare
    dtype: str = "int8"  # what to compare with float32: bfloat16, float16, int8
    device: str = "cpu"  # cpu, cuda


@dataclass
class Candidates:
    source: str = ""  # PersonaChat's or ConvAI2's archive, folder or valid file; candidates it lacks are other replies
    lines: int = 50  # of it, drawn at random
    init_from: str = "random:gpt2"  # as for chat.py
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class BestOf(ChatSampling):
    init_from: str = "nano"  # as for chat.py
    reward: str = "out/reward"  # a reward model, as for chat.py
    n: int = 8  # replies to choose from
    most: int = 16  # the curve of rewards goes up to the best of so many
    data_dir: str = "data"  # where the shards are
    dataset: str = "personachat"  # whose held-out people are replied to: this data set's val*.bin
    prompts: int = 50  # so many of them
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class Serve:
    init_from: str = "random:gpt2"  # as for serve.py
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    clients: int = 16  # that ask at once
    prompt_len: int = 16  # tokens in a prompt
    new_tokens: int = 64  # tokens in a reply
    rounds: int = 3  # of one client and all of them in turn; the medians are given
    soak: int = 1000  # requests of all clients after that, with replies of 16 tokens; then each once more alone


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


def train(config):
    """Return tokens and supervised tokens a second of whole steps: batch, forward, backward, clipping, AdamW."""
    at_least_1(config, "batch_size", "block_size", "steps")
    if config.loop not in ("packed", "nanogpt", "padded"):
        raise ValueError(f"loop={config.loop} is not one of packed, nanogpt, padded")
    if not config.init_from.startswith("random:"):
        raise ValueError(f"init_from={config.init_from}: speed does not depend on the weights; take a random: one")
    start = time.perf_counter()
    B, T, device = config.batch_size, config.block_size, pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if config.loop == "packed":
        keep_freed_memory()
    model = raw_model = load_model(config.init_from, device, dropout=config.dropout)[0].train()
    if config.loop == "padded":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = PRESETS[config.init_from.removeprefix("random:")]
        drop = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        model = GPT2LMHeadModel(GPT2Config(**shape, **drop)).to(device).train()
    model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run_model = model
    if config.compile:
        run_model = torch.compile(model) if config.loop == "padded" else model.compiled()

    if config.dataset:
        shards = find_shards(config.data_dir, config.dataset, "train")
        loader = Loader(shards, B, T, 0, Tokenizer())
    fill, span = (loader.fill, loader.span) if config.dataset else (1.0, T)
    random_ids = torch.randint(0, 50257, (B, T + 1), generator=torch.Generator().manual_seed(0))

    def batch(number):
        return loader.batch(number) if config.dataset else (random_ids[:, :-1], random_ids[:, 1:], None)

    def packed(number):
        """Return the loss of a batch, how many of its positions hold tokens, and its targets."""
        x, y, documents = batch(number)
        documents = None if documents is None else move(documents, device)
        return run_model(move(x, device), y, documents=documents)[1], fill * y.numel(), y

    def nanogpt(number):
        """Alike; logits of all positions, attention to all that came before in the row."""
        x, y, _ = batch(number)
        logits = run_model(move(x, device))[0]
        return F.cross_entropy(logits.flatten(0, 1), move(y, device).flatten()), fill * y.numel(), y

    def padded(number):
        """Alike; as transformers' own examples do it."""
        ids = random_ids[:, :-1]
        x, y, seen = padded_batch(loader, number) if config.dataset else (ids, ids, torch.ones_like(ids))
        loss = run_model(move(x, device), attention_mask=move(seen, device), labels=move(y, device)).loss
        return loss, seen.sum().item(), y

    loss_of = {"packed": packed, "nanogpt": nanogpt, "padded": padded}[config.loop]
    seconds, counts, first_step = [], [], None
    for step in range(config.steps + 2):
        t0 = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss, tokens, targets = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # which waits for the device
        t1 = time.perf_counter()
        first_step = first_step or t1 - start
        print(f"{step}: {t1 - t0:.3f} s, loss {loss.item():.3f}", file=sys.stderr)
        if step > 1:
            seconds.append(t1 - t0)
            counts.append((tokens, (targets != -100).sum().item(), targets.numel()))

    def rate(i):
        return statistics.median(count[i] / s for count, s in zip(counts, seconds, strict=True))

    peak = peak_flops(device) if dtype != torch.float32 else None
    return {
        "tokens_per_s": rate(0),
        "supervised_tokens_per_s": rate(1),
        "seconds": statistics.median(seconds),
        "fill": sum(count[0] for count in counts) / sum(count[2] for count in counts),
        "mfu": rate(0) * raw_model.flops_per_token(span, rate(1) / rate(0)) / peak if peak else None,
        "first_step_s": first_step,  # since the imports, with loading and compiling
        "peak_memory_mb": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
    }


def padded_batch(loader, number):
    """Return ids, labels, attention mask of the next conversations of a loader's first shard, in the order of a
    shuffle, cut at the block and padded to the longest of them."""
    shard, B = loader.parts[0].shard, loader.batch_size
    order = np.random.default_rng(0).permutation(len(shard.offsets) - 1)
    rows, labels = [], []
    for i in np.take(order, range(number * B, (number + 1) * B), mode="wrap"):
        start, stop = shard.offsets[i], min(shard.offsets[i + 1], shard.offsets[i] + loader.block_size)
        rows.append(torch.from_numpy(shard.tokens[start:stop].astype(np.int64)))
        labels.append(rows[-1].where(torch.from_numpy(shard.mask(start, stop)), -100))
    seen = [torch.ones_like(row) for row in rows]
    padding = ((rows, loader.tokenizer.pad_id), (labels, -100), (seen, 0))
    return [pad_sequence(part, batch_first=True, padding_value=value) for part, value in padding]


def prepare(config):
    """Return how fast conversations become a shard, how fast tiktoken alone encodes the same text, and peak memory.

    The conversations are chitchat's, again and again; of tiktoken the first 64 MB are measured, and of ours all.
    """
    at_least_1(config, "megabytes")
    sys.path.append(str(Path(__file__).parent / "prepare"))
    import chitchat

    import corpus

    talk = [messages for _, messages in chitchat.read(chitchat.packaged())]
    size = sum(len(message["content"].encode()) for messages in talk for message in messages) / len(talk) / 1e6
    total = max(2, round(config.megabytes / size))
    before = peak_memory("cpu")
    conversations = (("train" if i else "val", talk[i % len(talk)]) for i in range(total))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        corpus.prepare(corpus.Config(out_dir=folder), "bench", conversations)
        seconds = time.perf_counter() - start
        tokens = sum(len(open_shard(path).tokens) for path in Path(folder).glob("*.bin"))
    peak = peak_memory("cpu")
    texts = ["\n".join(m["content"] for m in talk[i % len(talk)]) for i in range(min(total, round(64 / size)))]
    start = time.perf_counter()
    gpt2_encoding().encode_ordinary_batch(texts, num_threads=os.cpu_count())
    alone = len(texts) * size / (time.perf_counter() - start)
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "megabytes": total * size,
        "megabytes_per_s": total * size / seconds,
        "tiktoken_megabytes_per_s": alone,
        "peak_memory_mb": peak,
        "peak_memory_before_mb": before,  # with chitchat in memory
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
    tokens = torch.from_numpy(open_shard(paths[0][0]).tokens[: config.positions + 1].astype("int64")).to(device)
    if len(tokens) < 2:
        raise ValueError(f"{paths[0][0]} has {len(tokens)} tokens: too few to compare")
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


def candidates(config):
    """Return the time of scoring 20 candidates behind one context as a multiple of that of the reply alone (`ratio`),
    and the tokens of context and candidates a second."""
    at_least_1(config, "lines")
    if not Path(config.source or "-").exists():
        raise FileNotFoundError(f"source={config.source} does not exist: the archive of PersonaChat, or its valid file")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    draw = random.Random(0)
    found = examples(Path(config.source))
    replies = [reply for _, _, reply, _ in found]
    seconds, n_tokens = [[], []], 0
    for persona, said, reply, others in draw.sample(found, min(config.lines, len(found))):
        texts = others or [*draw.choices(replies, k=19), reply]
        continuations = [continuation(tokenizer, text) for text in texts]
        system = [{"role": "system", "content": persona}] if persona else []
        context, _ = fit_context(tokenizer, system + said, model.config.block_size - max(map(len, continuations)) + 1)
        for which, scored in enumerate((continuations, continuations[-1:])):
            t0 = time.perf_counter()
            loglikelihoods(model, context, scored)  # whose floats say that the device is done
            seconds[which].append(time.perf_counter() - t0)
        n_tokens += len(context) + sum(map(len, continuations))
        print(f"{len(seconds[0])} lines", file=sys.stderr)
    all_of_them, alone = map(sum, seconds)
    return {
        "tokens_per_s": n_tokens / all_of_them,
        "seconds": all_of_them,
        "seconds_alone": alone,
        "ratio": all_of_them / alone,
    }


def best_of_n(config):
    """Return the time of the best of `n` replies, their scores included, as a multiple of that of one reply (`ratio`),
    and the mean reward of the best of 1, 2, 4, ... replies (`rewards`), with the standard deviation of one."""
    at_least_1(config, "n", "most", "prompts")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, inference=True)
    model, tokenizer = load_model(config.init_from, device, dtype, inference=True)
    reward_model = load_reward_model(config.reward, tokenizer, device, dtype=dtype, inference=True)
    shards = [open_shard(path) for path, _ in find_shards(config.data_dir, config.dataset, "val")]
    room = model.config.block_size - config.max_new_tokens
    prompts, _ = openings(shards, tokenizer, config.prompts, room, 0)
    if not prompts:
        raise ValueError(f"no reply in {config.dataset} has a prompt of at most {room} tokens: lower max_new_tokens")
    options = {field.name: getattr(config, field.name) for field in fields(Sampling)}
    options |= {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    engines = [Engine(model, rows, n_vocab=tokenizer.n_vocab) for rows in (1, config.n, config.most)]
    seconds, drawn, n_tokens = [0.0, 0.0], [], 0
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first time does not count
        seed = number * config.most
        for which in (0, 1) if number % 2 else (1, 0):
            t0 = time.perf_counter()
            if which:
                chosen = best_of(engines[1], reward_model, tokenizer, prompt, config.n, seed=seed, **options)
                n_tokens += sum(len(ids) for _, ids in chosen) * (number > 0)
            else:
                generate(model, [prompt], engine=engines[0], tokenizer=tokenizer, seed=seed, **options)
            seconds[which] += (time.perf_counter() - t0) * (number > 0)
        if not number:
            continue
        replies = generate(model, [prompt] * config.most, engine=engines[2], tokenizer=tokenizer, seed=seed, **options)
        drawn.append(scores_behind(reward_model, tokenizer, prompt, replies))
        print(f"{number} prompts", file=sys.stderr)
    drawn = torch.stack(drawn)  # (prompts, most)
    best = drawn.cummax(1).values.mean(0).tolist()
    return {
        "tokens_per_s": n_tokens / seconds[1],
        "seconds": seconds[1],
        "seconds_of_one": seconds[0],
        "ratio": seconds[1] / seconds[0],
        "rewards": {
            n: round(best[n - 1], 4) for n in (2**k for k in range(config.most.bit_length())) if n <= config.most
        },
        "std": drawn.std().item(),
    }


def serve(config):
    """Return the tokens a second of many clients (`tokens_per_s`), as a multiple of what one client gets (`ratio`), the
    times to the first token, the server's memory before and after the soak, and how many of its greedy replies were
    lost, or not what the server says to the same prompt alone (`mixed_up`; `tied` where rounding decided)."""
    at_least_1(config, "clients", "prompt_len", "new_tokens", "rounds", "soak")
    draw = random.Random(0)

    def requests(n, new_tokens=config.new_tokens):
        options = {"max_tokens": new_tokens, "temperature": 0, "frequency_penalty": 0, "logit_bias": {"50256": -100}}
        return [options | {"prompt": draw.choices(range(50256), k=config.prompt_len)} for _ in range(n)]

    command = [sys.executable, str(Path(__file__).with_name("serve.py")), "--port=0", f"--max_rows={config.clients}"]
    command += [f"--{name}={getattr(config, name)}" for name in ("init_from", "dtype", "device")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://[\d.]+:(\d+)", server.stdout.readline())
        if not url:
            raise ValueError("serve.py did not start; it says why above")
        threading.Thread(target=server.stdout.read, daemon=True).start()  # a line a request

        def ask(requests, clients):
            heard, seconds = asyncio.run(drive("127.0.0.1", int(url[1]), requests, clients))
            tokens = sum(each.tokens for each in heard)
            print(f"{clients} clients: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
            return heard, tokens / seconds

        ask(requests(4 * config.clients), config.clients)
        rates, firsts = ([], []), defaultdict(list)
        for _ in range(config.rounds):
            rates[0].append(ask(requests(8), 1)[1])
            heard, rate = ask(requests(8 * config.clients), config.clients)
            rates[1].append(rate)
            for each in heard:
                firsts[each.client].append(each.first)
        memory = [resident_memory(server.pid)]
        asked = [request | {"logprobs": 5} for request in requests(config.soak, 16)]
        together, _ = ask(asked, config.clients)
        memory.append(resident_memory(server.pid))
        alone, _ = ask(asked, 1)
    finally:
        server.terminate()
        server.wait()
    one, many = map(statistics.median, rates)
    return {
        "tokens_per_s": many,
        "seconds": 1 / many,
        "one_tokens_per_s": one,
        "ratio": many / one,
        "first_token_s": statistics.median(itertools.chain(*firsts.values())),
        "slowest_clients_first_token_s": max(map(statistics.mean, firsts.values())),
        "longest_first_token_s": max(itertools.chain(*firsts.values())),
        "memory_mb": memory[0],
        "memory_after_soak_mb": memory[1],
        "lost": sum(each.status != 200 or not each.tokens for each in (*together, *alone)),
        "mixed_up": sum(not same(a, b) for a, b in zip(alone, together, strict=True)),
        "tied": sum(same(a, b) and a.text != b.text for a, b in zip(alone, together, strict=True)),
    }


def resident_memory(pid):
    """Return what a process has in memory, in MB; None where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    return int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e6 if status.exists() else None


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


MODES = {"decode": (decode, Decode), "train": (train, Train), "prepare": (prepare, Prepare)}
MODES |= {"fidelity": (fidelity, Fidelity), "candidates": (candidates, Candidates), "best_of": (best_of_n, BestOf)}
MODES |= {"serve": (serve, Serve)}


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
