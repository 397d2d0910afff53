"""What many clients of serve.py get, compared with one alone: python benchmarks/serve.py"""

import contextlib
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ModelConfig, resolve, run_benchmark


@dataclass
class Config(ModelConfig):
    clients: int = 16  # clients that ask together
    prompt_len: int = 16  # tokens per prompt
    new_tokens: int = 64  # tokens per reply
    rounds: int = 3  # rounds of one client, then all; the result is their median


def measure(config):
    """Let one client and all clients ask in turn; return the medians."""
    one_rates = []  # tokens per second of one client
    rates = []  # of all together
    waits = []  # seconds to the first token
    with running_server(config) as port:
        drive(config, port, config.clients)  # a warm-up
        for _ in range(config.rounds):
            rate, _ = drive(config, port, 1)
            one_rates.append(rate)
            rate, first_tokens = drive(config, port, config.clients)
            rates.append(rate)
            waits += first_tokens
    rate = statistics.median(rates)
    one_rate = statistics.median(one_rates)
    return {
        "tokens_per_s": rate,  # of all clients together
        "seconds": 1 / rate,  # per token
        "one_tokens_per_s": one_rate,
        "ratio": rate / one_rate,
        "first_token_s": statistics.median(waits),
        "longest_first_token_s": max(waits),
    }


@contextlib.contextmanager
def running_server(config):
    """Run serve.py, yield its port, stop it."""
    script = Path(__file__).parents[1] / "serve.py"
    command = [sys.executable, script, "--port=0", f"--max_rows={config.clients}"]
    command += [f"--init_from={resolve(config.init_from)}", f"--dtype={config.dtype}"]
    command += [f"--device={config.device}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # the first line of its log has the address
        url = re.search(r"http://[\d.]+:(\d+)", server.stdout.readline())
        if not url:
            raise ValueError("the server did not start: it says why above")
        threading.Thread(target=server.stdout.read, daemon=True).start()  # drain its log
        yield int(url[1])
    finally:
        server.terminate()
        server.wait()


def drive(config, port, n_clients):
    """Let clients ask eight times each; return (tokens/s, [seconds to a request's first token])."""
    # random prompts, so that nothing of them is cached
    prompts = [random.choices(range(50256), k=config.prompt_len) for _ in range(8 * n_clients)]
    start = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as clients:  # a client is a thread
        first_tokens = list(clients.map(lambda prompt: ask(config, port, prompt), prompts))
    rate = len(prompts) * config.new_tokens / (time.perf_counter() - start)
    print(f"{n_clients} clients: {rate:.1f} tokens/s", file=sys.stderr)
    return rate, first_tokens


def ask(config, port, prompt):
    """Send a request on a new connection, read the stream; return the seconds to its start."""
    request = {
        "prompt": prompt,
        "max_tokens": config.new_tokens,
        "temperature": 0,
        "frequency_penalty": 0,
        "logit_bias": {"50256": -100},  # never end
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(request), headers)
    response = connection.getresponse()
    first_line = response.readline()
    first_token = time.perf_counter() - start
    rest = response.read()  # in one call: the server needs the same cores now
    if f'"completion_tokens": {config.new_tokens},'.encode() not in rest:
        end = (first_line + rest)[-300:]
        raise ValueError(f"not new_tokens={config.new_tokens}; has the context room? {end}")
    return first_token


if __name__ == "__main__":
    run_benchmark(measure, Config)
