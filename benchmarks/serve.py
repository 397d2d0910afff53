"""What many clients of serve.py get, compared with one alone: python benchmarks/serve.py"""

import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ModelConfig, process_memory, resolve, run_benchmark
from nanochatgpt.configurator import at_least

SERVE = Path(__file__).resolve().parents[1] / "serve.py"
OPTIONS = {
    "temperature": 0,
    "frequency_penalty": 0,
    "logit_bias": {"50256": -100},  # never end
    "stream": True,
    "stream_options": {"include_usage": True},
}
TIE = 0.05  # nats between two tokens that rounding may swap


@dataclass
class Config(ModelConfig):
    clients: int = 16  # clients that ask together
    prompt_len: int = 16  # tokens per prompt
    new_tokens: int = 64  # tokens per reply
    rounds: int = 3  # rounds of one client, then all; the result is their median
    soak: int = 1000  # requests of all clients after that, then again from one client


@dataclass
class Reply:
    """What a client got for a request."""

    client: int  # its number
    text: str = ""
    n_tokens: int = 0  # by the server's count, 0 after an error
    first_token: float = 0.0  # seconds from the request to the first piece of text
    top_logprobs: list = field(default_factory=list)  # (token, {likely token: logprob}) of each


def measure(config):
    """Measure rounds of one client and of all, then the soak; return the medians."""
    at_least(1, config, "clients", "prompt_len", "new_tokens", "rounds", "soak")
    draw = random.Random(0)

    def make_requests(n, **options):
        prompts = [draw.choices(range(50256), k=config.prompt_len) for _ in range(n)]
        return [{"prompt": prompt, **options, **OPTIONS} for prompt in prompts]

    with running_server(config) as (pid, port):
        # a warm-up, then the rounds
        drive(port, make_requests(4 * config.clients, max_tokens=config.new_tokens), config.clients)
        one_rates = []  # tokens per second
        rates = []
        first_tokens = [[] for _ in range(config.clients)]  # seconds
        for _ in range(config.rounds):
            _, rate = drive(port, make_requests(8, max_tokens=config.new_tokens), 1)
            one_rates.append(rate)
            requests = make_requests(8 * config.clients, max_tokens=config.new_tokens)
            replies, rate = drive(port, requests, config.clients)
            rates.append(rate)
            for reply in replies:
                first_tokens[reply.client].append(reply.first_token)

        # the soak, then the same requests from one client
        memory = process_memory("VmRSS", pid)
        requests = make_requests(config.soak, max_tokens=16, logprobs=5)
        together, _ = drive(port, requests, config.clients)
        memory_after = process_memory("VmRSS", pid)
        alone, _ = drive(port, requests, 1)

    # compare the replies
    mixed_up = 0
    tied = 0
    for a, b in zip(alone, together, strict=True):
        if not same(a, b):
            mixed_up += 1
        elif a.text != b.text:
            tied += 1
    all_first_tokens = list(itertools.chain(*first_tokens))
    one_rate = statistics.median(one_rates)
    rate = statistics.median(rates)
    return {
        "tokens_per_s": rate,  # of all clients together
        "seconds": 1 / rate,  # per token
        "one_tokens_per_s": one_rate,
        "ratio": rate / one_rate,
        "first_token_s": statistics.median(all_first_tokens),
        "slowest_clients_first_token_s": max(map(statistics.mean, first_tokens)),
        "longest_first_token_s": max(all_first_tokens),
        "memory_mb": memory,  # of the server
        "memory_after_soak_mb": memory_after,
        "lost": [reply.n_tokens for reply in together + alone].count(0),  # replies in the soak
        "mixed_up": mixed_up,  # replies that differ from those to one client
        "tied": tied,  # replies that differ only after a tie
    }


@contextlib.contextmanager
def running_server(config):
    """Run serve.py; yield its process id and port."""
    command = [sys.executable, str(SERVE), "--port=0", f"--max_rows={config.clients}"]
    command += [f"--init_from={resolve(config.init_from)}", f"--dtype={config.dtype}"]
    command += [f"--device={config.device}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # the first line of its log has the address
        url = re.search(r"http://[\d.]+:(\d+)", server.stdout.readline())
        if not url:
            raise ValueError("the server did not start: it says why above")
        threading.Thread(target=server.stdout.read, daemon=True).start()  # drain its log
        yield server.pid, int(url[1])
    finally:
        server.terminate()
        server.wait()


def drive(port, requests, n_clients):
    """Return ([Reply], tokens per second) of clients that share the requests; each sends its next
    one when it has the reply to the last."""
    replies = [None] * len(requests)
    remaining = iter(enumerate(requests))  # all clients take from it

    async def client(number):
        for i, request in remaining:
            replies[i] = await send(port, request, number)

    async def all_clients():
        await asyncio.gather(*(client(number) for number in range(n_clients)))

    start = time.perf_counter()
    asyncio.run(all_clients())
    rate = sum(reply.n_tokens for reply in replies) / (time.perf_counter() - start)
    print(f"{n_clients} clients: {rate:.1f} tokens/s", file=sys.stderr)
    return replies, rate


async def send(port, request, client):
    """Send a request on a new connection; return the Reply."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(request)
    # HTTP by hand: a client library would take more of the server's cores
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())

    # collect the events and parse them at the end: the server needs the same cores now
    reply = Reply(client)
    events = []
    async for line in reader:
        if line.startswith(b"data: {"):
            events.append(line.removeprefix(b"data: "))
            reply.first_token = reply.first_token or time.perf_counter() - start
    writer.close()

    # text and logprobs come in pieces, the usage at the end
    for event in map(json.loads, events):
        for choice in event.get("choices", ()):
            reply.text += choice["text"]
            if logprobs := choice["logprobs"]:
                reply.top_logprobs += zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        if event.get("usage"):
            reply.n_tokens = event["usage"]["completion_tokens"]
    return reply


def same(a, b):
    """Return whether two greedy replies to a prompt agree, at least up to a tie of two tokens."""
    for (token, logprobs), (other, _) in zip(a.top_logprobs, b.top_logprobs, strict=False):
        if token != other:  # what follows depends on it
            return other in logprobs and logprobs[token] - logprobs[other] < TIE
    return a.text == b.text


if __name__ == "__main__":
    run_benchmark(measure, Config)
