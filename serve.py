"""Chat in the browser, and an OpenAI-compatible API: python serve.py --init_from=out/chat

    http://127.0.0.1:8000/       the page
    http://127.0.0.1:8000/v1     for OpenAI's clients:
                                 OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Needs pip install -e '.[serve]'. On the open internet put a reverse proxy in front: it adds TLS and
closes connections that are slow to send a request.
"""

import asyncio
import os
import socket
import sys
from dataclasses import dataclass

try:
    import uvicorn

    from serving.app import LOOPBACK, create_app, origins
    from serving.service import Service
except ModuleNotFoundError as error:
    print(f"serve.py: {error.name} is missing: pip install -e '.[serve]'", file=sys.stderr)
    sys.exit(2)

from nanochatgpt.checkpoint import default_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.sampling import ChatSampling

GRACE = 10  # seconds that running replies get when the server is stopped


@dataclass
class Config(ChatSampling):
    init_from: str = default_model()  # nano, gpt2[-medium|-large|-xl], org/name or a directory
    model_name: str = ""  # what clients call the model; default: the last part of init_from
    reward: str = ""  # a reward model of train_reward.py, so that clients may ask for best_of
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 = reachable from other machines
    port: int = 8000  # 0 = any free port
    api_key: str = ""  # key that clients must send; or set NANOCHATGPT_API_KEY
    allow_open: bool = False  # listen beyond this machine without a key
    cors: str = ""  # origins whose pages may use the API: https://example.org,app://..., or *
    allowed_hosts: str = ""  # more names of this machine, such as host.docker.internal
    max_rows: int = 16  # replies generated at once
    max_queue: int = 64  # replies that may wait
    max_seconds: float = 300.0  # time limit for a reply, waiting included
    feedback: str = "out/feedback.jsonl"  # where ratings are stored, for prepare/retry.py
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto (float16 on x86, bfloat16 on CUDA), float32, bfloat16, float16, int8


def check(config):
    """Raise ValueError for a knob that is out of range, or a server open to all by accident."""
    at_least(1, config, "max_rows")
    at_least(0, config, "max_queue", "max_seconds")
    origins(config.cors)
    if "/" in config.allowed_hosts:
        remedy = "write names only, such as host.docker.internal"
        raise ValueError(f"allowed_hosts={config.allowed_hosts}: {remedy}")
    if config.host not in LOOPBACK and not config.api_key and not config.allow_open:
        remedy = "set an --api_key, or --allow_open=true"
        raise ValueError(f"host={config.host} is open to other machines: {remedy}")


def listen(config):
    """Return a listening socket. It is opened before the model loads: mistakes show early."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except (OSError, OverflowError) as error:  # OverflowError: no such port
        reason = getattr(error, "strerror", error)
        place = f"host={config.host}, port={config.port}"
        raise ValueError(f"{place}: {reason}; --port=0 finds a free port") from error


class Server(uvicorn.Server):
    """uvicorn's server; when stopped, it gives running replies a grace period."""

    def __init__(self, app, scheduler):
        self.scheduler = scheduler
        # a client that does not read gets five seconds more, then its connection is cut
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=GRACE + 5))

    def handle_exit(self, number, frame):
        """On the first signal take no more requests; on the second end the replies now."""
        if self.should_exit:
            self.scheduler.cancel_all()
        self.should_exit = True

    async def shutdown(self, sockets=None):
        """End the replies after the grace period with the text they have."""
        asyncio.get_running_loop().call_later(GRACE, self.scheduler.cancel_all)
        await super().shutdown(sockets)


def main(config):
    config.api_key = config.api_key or os.environ.get("NANOCHATGPT_API_KEY", "")
    check(config)
    listening = listen(config)
    service = Service(config)
    server = Server(create_app(config, service), service.scheduler)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{service.name}: page at {url}/, API at {url}/v1; Ctrl-C stops it")
    try:
        server.run(sockets=[listening])
    finally:
        service.scheduler.close()


if __name__ == "__main__":
    run(main, Config)
