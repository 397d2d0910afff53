"""A page to chat on, and an API in OpenAI's manner: python serve.py --init_from=out/chat

    http://127.0.0.1:8000/       the page
    http://127.0.0.1:8000/v1     for OpenAI's clients: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Needs pip install -e '.[serve]'.
"""

import asyncio
import base64
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

# OpenMP's threads wait for the next product by spinning. Where something else needs a core, each product then waits for
# the scheduler; spinning shorter costs nothing otherwise: 16 replies get 387 tokens/s beside a busy process, not 306
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, PlainTextResponse
    from prometheus_client import (
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        disable_created_metrics,
        generate_latest,
    )
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
except ImportError as error:
    print(f"serve.py: {error.name} is missing: pip install -e '.[serve]'", file=sys.stderr)
    sys.exit(2)

from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.sampling import ChatSampling, Sampling, for_template
from nanochatgpt.tokenizer import END_OF_TEXT, fit_context
from rlhf.reward_model import load_reward_model
from serving.guard import Guard, Protocol, Refused, answer, is_loopback
from serving.protocol import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Feedback,
    conversation,
)
from serving.replies import Events, Replies, whole
from serving.scheduler import Full, Scheduler

PAGE = Path(__file__).with_name("serving") / "page.html"


@dataclass
class Config(ChatSampling):
    init_from: str = (
        default_model()
    )  # nano, a directory, gpt2[-medium|-large|-xl], distilgpt2 or org/name on the hub
    model_name: str = ""  # what clients call it; its own name unless given
    reward: str = ""  # a reward model of train_reward.py: then clients may ask for best_of
    host: str = "127.0.0.1"  # where to listen; 0.0.0.0 is for everybody who can reach this machine
    port: int = 8000  # 0: any that is free
    api_key: str = (
        ""  # what clients must show, or in the environment NANOCHATGPT_API_KEY; none: nothing
    )
    allow_open: bool = False  # listen beyond this machine without a key
    cors: str = (
        ""  # pages from elsewhere that may use the API: an origin, as in https://example.org, or *
    )
    max_rows: int = 16  # replies that are generated at once
    max_queue: int = 64  # replies that wait for that
    max_body: int = 1_000_000  # bytes in a request
    request_seconds: float = 10.0  # in which a request has to be sent
    max_seconds: float = 300.0  # that a reply may take
    prefill_tokens: int = (
        0  # of prompts, computed between two steps of replies; 0: 64 on a CPU, 2048 on a GPU
    )
    grace: int = 10  # seconds that running replies have when the server is stopped
    feedback: str = "out/feedback.jsonl"  # where thumbs are kept, as prepare/retry.py reads them
    log_text: bool = False  # print what is said, too
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto is float16 on an x86 CPU, bfloat16 on CUDA


# the service


class Metrics:
    """What is counted, for Prometheus."""

    def __init__(self, service):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        named = {"namespace": "nanochatgpt", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **named)
        self.prompt = Counter("prompt_tokens", "Tokens of prompts", **named)
        self.cached = Counter(
            "cached_prompt_tokens", "Tokens of prompts that were there already", **named
        )
        self.generated = Counter("generated_tokens", "Tokens of replies", **named)
        scale = [m * 10**n for n in range(-2, 4) for m in (1, 3)]  # 0.01 to 3,000
        self.first = Histogram(
            "first_token_seconds", "From a request to its first token", buckets=scale[:9], **named
        )
        self.rate = Histogram(
            "reply_tokens_per_second", "Tokens a second of a request", buckets=scale[4:], **named
        )
        for name, about, value in (
            (
                "running_replies",
                "Replies that are being generated",
                lambda: len(service.scheduler.running),
            ),
            ("queued_replies", "Replies that wait", lambda: len(service.scheduler.waiting)),
        ):
            Gauge(name, about, **named).set_function(value)


class Service:
    """A model that many talk to."""

    def __init__(self, config):
        self.created, self.metrics, self.reward_model = int(time.time()), Metrics(self), None
        self.scheduler = Scheduler(lambda: self.load(config), config.max_queue)
        local = Path(config.init_from).exists()
        self.name = config.model_name or (
            Path(config.init_from).resolve().name if local else config.init_from
        )

    def load(self, config):
        """Load what there is to load; return the Engine."""
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device, inference=True)
        model, self.tokenizer = load_model(config.init_from, device, dtype, inference=True)
        if config.reward:
            self.reward_model = load_reward_model(
                config.reward, self.tokenizer, device, dtype=dtype, inference=True
            )
        self.config, self.size = (
            for_template(config, self.tokenizer.template),
            model.config.block_size,
        )
        pieces = config.prefill_tokens or (64 if device == "cpu" else 2048)
        return Engine(model, config.max_rows, n_vocab=self.tokenizer.n_vocab, prefill_tokens=pieces)

    @contextlib.asynccontextmanager
    async def running(self, _):
        """Hand what the scheduler delivers to whom it is for."""
        loop = asyncio.get_running_loop()

        def hear(pieces):
            for job, piece in pieces:
                job.hear(piece)

        self.scheduler.deliver = lambda pieces: loop.call_soon_threadsafe(hear, pieces)
        yield

    def model_card(self):
        """Return what clients hear of the model; `context_length` and what follows is for the page."""
        c = self.config
        sampling = {
            f.name: getattr(c, f.name)
            for f in fields(Sampling)
            if f.name not in ("max_new_tokens", "no_repeat_ngram_size")
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochatgpt",
            "context_length": self.size,
            "best_of": self.reward_model is not None,
            "sampling": {"max_tokens": c.max_new_tokens, **sampling},
        }

    def options(self, request, prompts, asked):
        """Return the Sampling of a request, whose prompts have to leave room for as many tokens as it asks for."""
        if request.model not in (None, self.name):
            raise Refused(
                404,
                f"there is no model {request.model}; this is {self.name}",
                "model",
                "model_not_found",
            )
        if request.best_of and self.reward_model is None:
            raise Refused(
                400,
                "best_of needs a server with a reward model: serve.py --reward=out/reward",
                "best_of",
            )
        if request.best_of and request.best_of < request.n:
            raise Refused(400, f"best_of={request.best_of} is less than n={request.n}", "best_of")
        each, name = request.best_of or request.n, "best_of" if request.best_of else "n"
        most = self.config.max_rows + self.config.max_queue
        if each > self.config.max_rows or each * len(prompts) > most:
            raise Refused(
                400,
                f"{each} replies to each of {len(prompts)} prompts; there may be {self.config.max_rows}, {most} in all",
                name,
            )
        if token := next((t for t in request.logit_bias if int(t) >= self.tokenizer.n_vocab), None):
            raise Refused(
                400,
                f"logit_bias has token {token}; ids end at {self.tokenizer.n_vocab - 1}",
                "logit_bias",
            )
        longest = max(map(len, prompts))
        if longest + (asked or 1) > self.size:
            raise Refused(
                400,
                f"the context is {self.size} tokens; the prompt has {longest}, and {asked or 1} are to follow. "
                'A chat may have truncation: "auto"',
                code="context_length_exceeded",
            )
        given = {f.name: getattr(request, f.name, None) for f in fields(Sampling)}
        values = {
            name: getattr(self.config, name) if value is None else value
            for name, value in given.items()
        }
        values["max_new_tokens"] = (
            asked or self.config.max_new_tokens
        )  # the context ends a reply, too
        return Sampling(**values)

    def chat_prompt(self, request, asked):
        """Return the ids of a conversation and of the opener of a reply."""
        messages = conversation(request.messages)
        if request.truncation == "disabled":
            return self.tokenizer.render(messages, add_generation_prompt=True)[0]
        room, start = self.size - asked, 0
        try:
            # what was dropped at a turn before stays dropped, as in chat.py: so prompts begin alike
            for n in [n for n, m in enumerate(messages[:-1], 1) if m["role"] == "user"] + [
                len(messages)
            ]:
                ids, start = fit_context(self.tokenizer, messages[:n], room, start)
        except ValueError as error:
            raise Refused(400, str(error), "messages", "context_length_exceeded") from error
        return ids

    def prompts(self, request):
        """Return the prompts of a request for completions, as ids."""
        many = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        if isinstance(many[0], int):
            many = [many]
        prompts = [
            self.tokenizer.encode(p) or [END_OF_TEXT] if isinstance(p, str) else p for p in many
        ]
        n = self.tokenizer.n_vocab
        if (
            token := next((t for prompt in prompts for t in prompt if not 0 <= t < n), None)
        ) is not None:
            raise Refused(400, f"prompt has token {token}; ids are 0 to {n - 1}", "prompt")
        return prompts

    async def reply(self, request, http, prompts, to, asked, stops, trim):
        """Return the response to a request, `to` the Answer that it has the form of."""
        options = self.options(request, prompts, asked)
        try:
            replies = Replies(self, http, request, prompts, options, stops, trim)
        except Full:
            seconds = 1 + self.config.max_queue // self.config.max_rows
            raise Refused(
                429,
                "too many wait already",
                code="rate_limit_exceeded",
                **{"Retry-After": str(seconds)},
            ) from None
        to = to(self.name, self.tokenizer, request.n_logprobs)
        if request.stream:
            return Events(replies, to, request.stream_options.include_usage)
        return await whole(replies, to)


def api_key(config):
    return config.api_key or os.environ.get("NANOCHATGPT_API_KEY", "")


# the application


def the_page():
    """Return the response with the page, which may run its own script and load nothing."""
    page = PAGE.read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(page, headers=headers)


def create_app(config, service):
    """Return the ASGI application."""
    app = FastAPI(title="nanoChatGPT", docs_url=None, redoc_url=None, lifespan=service.running)
    app.add_middleware(Guard, config=config, key=api_key(config), requests=service.metrics.requests)
    if config.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=[config.cors], allow_methods=["*"], allow_headers=["*"]
        )

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request):
        """Reply to a conversation."""
        asked = request.max_completion_tokens or request.max_tokens
        if request.truncation == "auto":
            asked = min(asked or config.max_new_tokens, service.size // 2)
        prompt = await asyncio.to_thread(
            service.chat_prompt, request, asked
        )  # a megabyte of text takes its time
        stops = (*service.tokenizer.stop_strings, *request.stops)
        return await service.reply(request, http, [prompt], ChatAnswer, asked, stops, trim=True)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, http: Request):
        """Go on with a text, or with each of several."""
        prompts = await asyncio.to_thread(service.prompts, request)
        return await service.reply(
            request, http, prompts, CompletionAnswer, request.max_tokens, request.stops, False
        )

    @app.get("/v1/models")
    async def models():
        return answer({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        if name != service.name:
            raise Refused(
                404, f"there is no model {name}; this is {service.name}", "model", "model_not_found"
            )
        return answer(service.model_card())

    @app.post("/feedback", status_code=204)
    async def feedback(judged: Feedback):
        """Keep a conversation whose last reply was liked or not."""
        path = Path(config.feedback)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"messages": conversation(judged.messages), "label": judged.label})
                    + "\n"
                )
        except OSError as error:
            raise Refused(500, f"{path}: {error.strerror}") from error

    @app.api_route("/health", methods=["GET", "HEAD"], operation_id="health")
    async def health():
        if not service.scheduler.thread.is_alive():
            raise Refused(503, "the engine has stopped")
        return answer({"status": "ok"})

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(service.metrics.registry))

    page = the_page()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def chat_page():
        return page

    @app.exception_handler(Refused)
    async def refused(http, refused):
        http.scope["note"] = f": {ascii(refused.message)[1:-1]}"  # for the log
        return refused.response

    @app.exception_handler(RequestValidationError)
    async def invalid(http, invalid):
        what = invalid.errors()
        deepest = max(
            what, key=lambda e: (len(e["loc"]), what.index(e))
        )  # of what might have been meant the nearest
        fields = [
            part
            for part in deepest["loc"][1:]
            if isinstance(part, int) or re.fullmatch("[a-z_]+", part)
        ]
        param, message = (
            ".".join(map(str, fields)).removesuffix(".str"),
            deepest["msg"].removeprefix("Value error, "),
        )
        if deepest["type"] == "json_invalid":
            param, message = "", "the body is not valid JSON"
        elif deepest["loc"] == ("body",) and deepest["type"] != "value_error":
            message = "the body must be a JSON object, with Content-Type: application/json"
        elif deepest["type"] == "extra_forbidden":
            message = "this is not supported"
        return await refused(
            http, Refused(400, f"{param}: {message}" if param else message, param or None)
        )

    @app.exception_handler(HTTPException)
    async def http_error(http, found):
        return await refused(
            http, Refused(found.status_code, found.detail, **(found.headers or {}))
        )

    @app.exception_handler(Exception)
    async def broken(_, error):  # which is logged besides
        return Refused(500, "the server has a defect: its log says which").response

    return app


class Server(uvicorn.Server):
    def __init__(self, settings, service):
        super().__init__(settings)
        self.service = service

    async def shutdown(self, sockets=None):
        """Let replies go on for the grace time, and then end with what they have."""
        asyncio.get_running_loop().call_later(
            self.service.config.grace, self.service.scheduler.hurry
        )
        await super().shutdown(sockets)

    def handle_exit(self, number, frame):
        """Take no more requests and let replies end; asked once more, end them now."""
        if self.should_exit:
            self.service.scheduler.hurry()
        elif n := len(self.service.scheduler.running):
            print(
                f"waiting up to {self.service.config.grace} s for {n} replies; Ctrl-C once more ends them now"
            )
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self):
        """End by a signal as by one's own will, with status 0."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check(config):
    """Raise ValueError for a knob that is out of range, or a server that is open to all without its person's will."""
    for name in ("max_rows", "max_body", "request_seconds", "max_seconds", "grace"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: it must be above 0")
    at_least(0, config, "max_queue", "prefill_tokens")
    if not 0 <= config.port < 2**16:
        raise ValueError(f"port={config.port} is not from 0 to 65535")
    if config.cors and not re.match(r"https?://|\*$", config.cors):
        raise ValueError(f"cors={config.cors} is no origin, as https://example.org is, nor *")
    if not config.feedback or Path(config.feedback).is_dir():
        raise ValueError(f"feedback={config.feedback} is not a file to keep thumbs in")
    if not re.fullmatch(r"[!-~]*", api_key(config)):
        raise ValueError("the API key has other characters than letters, digits and signs of ASCII")
    if not is_loopback(config.host) and not api_key(config) and not config.allow_open:
        raise ValueError(
            f"host={config.host}: whoever reaches this machine could use it. Give an --api_key, or --allow_open=true"
        )


def main(config):
    check(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        what = "is taken; --port=0 takes any that is free" if taken else error.strerror
        raise ValueError(
            f"{'port' if taken else 'host'}={config.port if taken else config.host}: {what}"
        ) from error
    service = Service(config)
    settings = {"log_level": "warning", "access_log": False, "server_header": False, "ws": "none"}
    app = create_app(config, service)
    protocol = functools.partial(Protocol, config.request_seconds)
    # those who do not even read what they have have five seconds more
    settings |= {"http": protocol, "timeout_graceful_shutdown": config.grace + 5}
    server = Server(uvicorn.Config(app, **settings), service)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{service.name}: the page is at {url}/, the API at {url}/v1; Ctrl-C ends it")
    try:
        server.run(sockets=[listening])
    finally:
        service.scheduler.close()


if __name__ == "__main__":
    run(main, Config)
