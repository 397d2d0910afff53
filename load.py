"""
Load for a server: what many clients at once hear of it, and when.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field, replace


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
    body = json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status, first, events = int((await reader.readline()).split()[1]), None, []
    while line := await reader.readline():
        if line.startswith(b"data: {"):  # to be read when there is time: the server has the same cores
            first = first or time.perf_counter() - began
            events.append(line)
    seconds = time.perf_counter() - began
    writer.close()
    parts = [json.loads(line.removeprefix(b"data: ")) for line in events]
    text = "".join(choice["text"] for part in parts for choice in part.get("choices", ()))
    logprobs = [choice["logprobs"] for part in parts for choice in part.get("choices", ()) if choice["logprobs"]]
    likeliest = [pair for found in logprobs for pair in zip(found["tokens"], found["top_logprobs"], strict=True)]
    usage = parts[-1].get("usage") if parts else None
    return Heard(
        status, text, usage["completion_tokens"] if usage else 0, first or seconds, seconds, likeliest=likeliest
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
