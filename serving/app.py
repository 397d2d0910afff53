"""
The routes of the API, and the page.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serving.access import AccessControl, Refused, json_response
from serving.protocol import ChatRequest, CompletionRequest, Feedback, conversation
from serving.responses import respond

PAGE = Path(__file__).with_name("page.html")  # the chat page: HTML, CSS and script in one file
router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(request: ChatRequest, http: Request):
    """Reply to a conversation."""
    service = http.app.state.service
    # in a thread: a megabyte of text takes a while to render
    prompt, max_tokens = await asyncio.to_thread(service.chat_prompt, request)
    # raises Refused before anything is generated
    options = service.sampling(request, [prompt], max_tokens)
    return await respond(service, http, request, [prompt], options)


@router.post("/v1/completions")
async def complete(request: CompletionRequest, http: Request):
    """Continue one text or several."""
    service = http.app.state.service
    prompts = await asyncio.to_thread(service.completion_prompts, request)  # lists of ids
    options = service.sampling(request, prompts, request.max_tokens)
    return await respond(service, http, request, prompts, options)


@router.get("/v1/models")
async def models(http: Request):
    card = http.app.state.service.model_card()  # one model per server
    return json_response({"object": "list", "data": [card]})


@router.get("/v1/models/{name:path}")
async def model(name: str, http: Request):  # a name may contain slashes, like org/model
    service = http.app.state.service
    service.check_model(name)  # 404 if the name is wrong
    return json_response(service.model_card())


@router.post("/feedback", status_code=204)
async def feedback(rating: Feedback, http: Request):
    """Append a conversation whose last reply was rated, as prepare/retry.py reads it."""
    path = Path(http.app.state.service.config.feedback)
    # one JSON object per line: messages and label
    record = {"messages": conversation(rating.messages), "label": rating.label}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # the first rating creates the folder
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise Refused(500, f"{path}: {error.strerror}") from error


@router.api_route("/health", methods=["GET", "HEAD"], operation_id="health")
async def health(http: Request):
    # a load balancer stops sending requests here after a 503
    if not http.app.state.service.scheduler.is_alive():
        raise Refused(503, "the engine has stopped; see the server's log")
    return json_response({"status": "ok"})


@router.get("/metrics")
async def metrics(http: Request):
    # Prometheus' text format
    return PlainTextResponse(generate_latest(http.app.state.service.metrics.registry))


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(http: Request):
    return http.app.state.page  # read once, when the server starts


def load_page():
    """Return the response with the page, which may run its own script and load nothing."""
    # allow exactly this script, by its hash, so that injected scripts do not run
    html = PAGE.read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # connect-src: the page talks to this server only
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
    policy += "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    policy += "frame-ancestors 'none'"
    # nosniff: browsers must not guess another content type
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=headers | {"X-Content-Type-Options": "nosniff"})


async def invalid_request(_, error):
    """Raise Refused, whose response AccessControl sends, with the name of the wrong field."""
    # a field of several types has an error for each: take the deepest, which came closest
    deepest = max(reversed(error.errors()), key=lambda each: len(each["loc"]))
    # build the field's name from its path, such as messages.0.content
    names = []
    for part in deepest["loc"][1:]:
        if isinstance(part, int) or re.fullmatch("[a-z_]+", part):  # else the name of a type
            names.append(str(part))
    param = ".".join(names).removesuffix(".str")  # "str": one type of a union
    # replace pydantic's wording where clients need a clearer message
    message = deepest["msg"].removeprefix("Value error, ")
    if deepest["type"] == "json_invalid":
        param = ""
        message = "the body is not valid JSON"
    elif deepest["loc"] == ("body",) and deepest["type"] != "value_error":
        message = "the body must be a JSON object, with Content-Type: application/json"
    elif deepest["type"] == "extra_forbidden":
        message = "not supported"
    raise Refused(400, f"{param}: {message}" if param else message, param or None)


async def http_error(_, error):
    # send 404 and 405 in OpenAI's error format too
    raise Refused(error.status_code, error.detail, headers=error.headers)


async def internal_error(_, error):
    # uvicorn logs the traceback
    return Refused(500, "the server has a bug; its log has the traceback").response


@contextlib.asynccontextmanager
async def lifespan(app):
    """Let the scheduler's thread hand its pieces to the event loop."""
    # the scheduler's thread may only reach it through call_soon_threadsafe
    loop = asyncio.get_running_loop()

    def hand_out(pieces):
        for job, piece in pieces:
            job.on_piece(piece)  # puts the piece in the queue of its request

    scheduler = app.state.service.scheduler
    scheduler.deliver = lambda pieces: loop.call_soon_threadsafe(hand_out, pieces)
    yield


def create_app(config, service):
    """Return the ASGI application."""
    # every error becomes a JSON response in OpenAI's format
    handlers = {
        RequestValidationError: invalid_request,
        HTTPException: http_error,
        Exception: internal_error,
    }
    # FastAPI's pages would load scripts from a CDN
    options = {"docs_url": None, "redoc_url": None, "lifespan": lifespan}
    app = FastAPI(title="nanoChatGPT", exception_handlers=handlers, **options)
    app.state.service = service
    app.state.page = load_page()
    app.include_router(router)
    # the middleware added last sees a request first: CORS, then access control
    app.add_middleware(AccessControl, config=config, n_requests=service.metrics.requests)
    if config.cors:  # an origin whose pages may call the API
        allow = {"allow_origins": [config.cors], "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **allow)
    return app
