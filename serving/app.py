"""The routes of the API, the page, and who may use them."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from serving import protocol
from serving.protocol import Refused
from serving.responses import respond
from serving.service import QUEUED, REFUSED, RUNNING

PAGE = Path(__file__).with_name("page.html")  # the chat page: HTML, CSS and script in one file
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # hosts that only this machine can reach
MAX_BODY = 1_000_000  # bytes per request
BODY_SECONDS = 10.0  # time limit for sending the body of a request
READ = ["GET", "HEAD"]
ORIGIN = r"[a-z][a-z0-9+.-]*://[^/?#@*\s]+"


class ApiRoute(APIRoute):
    """A route that needs the API key, and waits for the body of a request for a limited time."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def checked(http):
            key = http.app.state.service.config.api_key
            scheme, _, given = http.headers.get("authorization", "").partition(" ")
            # compare in constant time: the time must not show how much of a key is right
            same = hmac.compare_digest(given.strip().encode(), key.encode())
            if key and not (same and scheme.lower() == "bearer"):
                message = "the API key is missing or wrong"
                headers = {"WWW-Authenticate": "Bearer"}
                raise Refused(401, message, None, "invalid_api_key", headers)
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    await http.body()  # kept for `handle`
            except (TimeoutError, ClientDisconnect):
                message = "the request was sent too slowly"
                raise Refused(408, message, headers={"Connection": "close"}) from None
            return await handle(http)

        return checked


public = APIRouter()  # the page asks for the API key itself
router = APIRouter(route_class=ApiRoute)


@router.post("/v1/chat/completions")
async def chat(request: protocol.ChatRequest, http: Request):
    """Reply to a conversation."""
    service = http.app.state.service
    # in a thread: a megabyte of text takes a while to render
    prompt = await asyncio.to_thread(service.chat_prompt, request)  # ids
    options = service.sampling(request, [prompt])
    return await respond(service, http, request, [prompt], options)


@router.post("/v1/completions")
async def complete(request: protocol.CompletionRequest, http: Request):
    """Continue one text or several."""
    service = http.app.state.service
    prompts = await asyncio.to_thread(service.completion_prompts, request)  # lists of ids
    options = service.sampling(request, prompts)
    return await respond(service, http, request, prompts, options)


@router.api_route("/v1/models/", methods=READ, include_in_schema=False)
@router.api_route("/v1/models", methods=READ, operation_id="models")
async def models(http: Request):
    card = http.app.state.service.model_card()  # one model per server
    return {"object": "list", "data": [card]}


@router.api_route("/v1/models/{name:path}", methods=READ, operation_id="model")
async def model(name: str, http: Request):  # a name may contain slashes, like org/model
    service = http.app.state.service
    service.check_model(name.removesuffix("/"))  # 404 if the name is wrong
    return service.model_card()


@router.post("/feedback", status_code=204)
async def feedback(rating: protocol.Feedback, http: Request):
    """Append a conversation whose last reply was rated, as prepare/retry.py reads it."""
    messages = protocol.conversation(rating.messages)
    if messages[-1]["role"] != "assistant":
        raise Refused(400, "messages must end with the reply that was rated", "messages")
    path = Path(http.app.state.service.config.feedback)
    path.parent.mkdir(parents=True, exist_ok=True)  # the first rating creates it
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": messages, "label": rating.label}) + "\n")


@router.api_route("/metrics", methods=READ, operation_id="metrics")
async def metrics(http: Request):
    scheduler = http.app.state.service.scheduler
    RUNNING.set(len(scheduler.running))
    QUEUED.set(len(scheduler.waiting))
    return PlainTextResponse(generate_latest())  # Prometheus' text format


@public.api_route("/health", methods=READ, operation_id="health")
async def health(http: Request):
    http.app.state.service.check_alive()  # a load balancer sends no more requests after a 503
    return {"status": "ok"}


@public.api_route("/", methods=READ, include_in_schema=False)
async def page(http: Request):
    return http.app.state.page  # read once, when the server starts


def load_page():
    """Return the response with the page, which may run its own script and load nothing."""
    # allow exactly this script, by its hash, so that injected scripts do not run
    html = PAGE.read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
    policy += "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    policy += "frame-ancestors 'none'"
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


def check_host(http: Request):
    """Refuse host names that are not ours. DNS rebinding: any web page can give its own host name
    the address of this machine."""
    hosts = http.app.state.allowed_hosts
    name = host_name(http.headers.get("host", ""))
    if hosts and not any(fnmatch(name, host) for host in hosts):
        message = f"this server does not answer to the name {name or '(none)'}: start it with "
        raise Refused(403, f"{message}--allowed_hosts={name or 'NAME'} if that is its name")


def host_name(host):
    """Return the lower-case name in a Host header, without its port; "" if it has none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def http_error(http, error):
    """Return the response to an error, in OpenAI's format."""
    if error.status_code == 404 and not isinstance(error, Refused):  # no such path
        message = f"there is nothing at {http.url.path}; the API's address is {http.base_url}v1, "
        error = Refused(404, f"{message}with /chat/completions, /completions and /models")
    REFUSED.labels(error.status_code).inc()
    return JSONResponse(protocol.error_body(error), error.status_code, error.headers)


async def invalid_request(http, error):
    """Return the response to a wrong field; it names the field."""
    last = error.errors()[-1]  # a field of several types has an error for each
    # build the field's name from its path, such as messages.0.content, without names of types
    names = []
    for part in last["loc"][1:]:
        if isinstance(part, int) or part.isidentifier():
            names.append(str(part))
    param = ".".join(names)
    message = f"{param}: {last['msg']}"
    if last["type"] == "extra_forbidden":
        message = f"{param}: {protocol.why_unknown(names[-1])}"
    if last["type"] == "json_invalid":
        message = f"the body is not JSON: {last['ctx']['error']}"
        param = None
    if last["loc"] == ("body",):
        message = "the body must be a JSON object, with Content-Type: application/json"
    return await http_error(http, Refused(400, message, param or None))


@contextlib.asynccontextmanager
async def lifespan(app):
    """Let the scheduler's thread hand its pieces to the event loop."""
    loop = asyncio.get_running_loop()

    def hand_out(pieces):
        for job, piece in pieces:
            job.on_piece(piece)  # puts the piece in the queue of its request

    # another thread may only reach the loop through call_soon_threadsafe
    scheduler = app.state.service.scheduler
    scheduler.deliver = functools.partial(loop.call_soon_threadsafe, hand_out)
    yield


def create_app(config, service):
    """Return the ASGI application."""
    handlers = {RequestValidationError: invalid_request, HTTPException: http_error}
    # FastAPI's pages would load scripts from a CDN
    options = {"docs_url": None, "redoc_url": None, "lifespan": lifespan}
    options |= {"exception_handlers": handlers, "max_body_size": MAX_BODY}
    options["dependencies"] = [Depends(check_host)]  # of all routes
    app = FastAPI(title="nanoChatGPT", **options)
    app.state.service = service
    app.state.page = load_page()
    # a server that is open to other machines may have any name, unless it is told which
    app.state.allowed_hosts = [host_name(host) for host in split(config.allowed_hosts)]
    if app.state.allowed_hosts or config.host in LOOPBACK:
        app.state.allowed_hosts += LOOPBACK
    app.include_router(public)
    app.include_router(router)
    if config.cors:  # origins whose pages may call the API
        allow = {"allow_origins": origins(config.cors), "allow_private_network": True}
        allow |= {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **allow)
    return app


def split(knob):
    """Return the items of a knob that lists several, separated by commas."""
    return list(filter(None, map(str.strip, knob.split(","))))


def origins(knob):
    """Return the origins in a knob, as browsers send them. Raises ValueError if one is none."""
    listed = []
    for item in split(knob):
        origin = item.lower().removesuffix("/")
        if origin not in ("*", "null") and not re.fullmatch(ORIGIN, origin):
            remedy = "an origin is scheme://host[:port], such as https://example.org; * is any"
            raise ValueError(f"cors={item}: {remedy}")
        listed.append(re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", origin))
    return listed
