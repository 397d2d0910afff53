"""
What many clients of serve.py get at once, beside one: tokens a second, time to the first, memory.
"""

import asyncio
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochatgpt.configurator import at_least

SERVE = Path(__file__).parents[1] / "serve.py"


@dataclass
class Config:
    init_from: str = "random:gpt2"  # as for serve.py
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    clients: int = 16  # that ask at once
    prompt_len: int = 16  # tokens in a prompt
    new_tokens: int = 64  # tokens in a reply
    rounds: int = 3  # of one client and all of them in turn; the medians are given
    soak: int = 1000  # requests of all clients after that, with replies of 16 tokens; then each once more alone


def measure(config):
    """Return the tokens a second of many clients (`tokens_per_s`), as a multiple of what one client gets (`ratio`), the
    times to the first token, the server's memory before and after the soak, and how many of its greedy replies were
    lost, or not what the server says to the same prompt alone (`mixed_up`; `tied` where rounding decided)."""
    at_least(1, config, "clients", "prompt_len", "new_tokens", "rounds", "soak")
    draw = random.Random(0)

    def requests(n, new_tokens=config.new_tokens):
        options = {
            "max_tokens": new_tokens,
            "temperature": 0,
            "frequency_penalty": 0,
            "logit_bias": {"50256": -100},
        }
        return [
            options | {"prompt": draw.choices(range(50256), k=config.prompt_len)} for _ in range(n)
        ]

    command = [sys.executable, str(SERVE), "--port=0", f"--max_rows={config.clients}"]
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
    return (
        int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e6
        if status.exists()
        else None
    )


@dataclass
class Heard:
    """An answer as its client got it. Times in seconds from when it was asked for."""

    status: int
    text: str
    tokens: int  # of the reply, by the server's count
    first: float  # until the first of it came
    seconds: float
    client: int = 0  # which of them it was
    # for each token (itself, {it and others: log-probability}), where the request wants logprobs
    likeliest: list = field(default_factory=list)


async def ask(host, port, request):
    """Send a request for a streamed completion over a connection of its own; return what was Heard."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps(
        request | {"stream": True, "stream_options": {"include_usage": True}}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status, first, events = int((await reader.readline()).split()[1]), None, []
    while line := await reader.readline():
        if line.startswith(
            b"data: {"
        ):  # to be read when there is time: the server has the same cores
            first = first or time.perf_counter() - began
            events.append(line)
    seconds = time.perf_counter() - began
    writer.close()
    parts = [json.loads(line.removeprefix(b"data: ")) for line in events]
    text = "".join(choice["text"] for part in parts for choice in part.get("choices", ()))
    logprobs = [
        choice["logprobs"]
        for part in parts
        for choice in part.get("choices", ())
        if choice["logprobs"]
    ]
    likeliest = [
        pair
        for found in logprobs
        for pair in zip(found["tokens"], found["top_logprobs"], strict=True)
    ]
    usage = parts[-1].get("usage") if parts else None
    return Heard(
        status,
        text,
        usage["completion_tokens"] if usage else 0,
        first or seconds,
        seconds,
        likeliest=likeliest,
    )


def same(a, b, tie=0.05):
    """Return whether two greedy replies to one prompt are the same, up to where two tokens were as likely: their
    log-probabilities differ by less than `tie`, and rounding decides."""
    for (token, likeliest), (other, _) in zip(a.likeliest, b.likeliest, strict=False):
        if token != other:
            return other in likeliest and likeliest[token] - likeliest[other] < tie
    return a.text == b.text


async def drive(host, port, requests, clients):
    """Return ([Heard] of the requests, in their order, seconds), asked for by so many clients, each one by one."""
    heard, left = [None] * len(requests), iter(enumerate(requests))

    async def client(me):
        for number, request in left:
            heard[number] = replace(await ask(host, port, request), client=me)

    began = time.perf_counter()
    await asyncio.gather(*(client(me) for me in range(clients)))
    return heard, time.perf_counter() - began
