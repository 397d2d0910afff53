"""
Access control: API key, Host check, size and time limits, error responses; a log line per request.

Connections that never send a whole header are left to a reverse proxy: uvicorn has no limit for it.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import re
import time

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect


class Refused(Exception):
    """A request that the server turns down, with the HTTP response that says why."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        self.message = message
        # map the status to OpenAI's error types
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code}  # OpenAI's format
        self.response = json_response({"error": error}, status, headers)


def json_response(content, status=200, headers=None):
    """Return a response of JSON in ASCII, which can also hold lone surrogates."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


def api_key(config):
    """Return the key that clients must send, "" if they need none."""
    return config.api_key or os.environ.get("NANOCHATGPT_API_KEY", "")


def is_loopback(host):
    """Return whether only this machine can reach `host`, a name or an address."""
    # an address, such as 127.0.0.1 or ::1
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"  # any other name may resolve to a public address


class AccessControl:
    """ASGI middleware that checks each request before the app sees it, and logs it afterwards."""

    def __init__(self, app, config, n_requests):
        """n_requests: a Counter with the labels path and status."""
        self.app = app
        self.config = config
        self.n_requests = n_requests  # for /metrics
        # bytes, which compare_digest takes; empty: no key needed
        self.api_key = api_key(config).encode()
        self.local = is_loopback(config.host)  # then the Host header must say so too

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":  # startup and shutdown
            return await self.app(scope, receive, send)
        start = time.perf_counter()
        status = "aborted"  # until the response starts

        # note the status when the response starts, for the log
        async def send_and_note(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            # read the body here, where its size and time are limited, and replay it to the app
            request = Request(scope, receive)
            self.check(request)
            messages = [{"type": "http.request", "body": await self.read_body(request)}]

            async def replay():
                # the body, then the disconnect
                return messages.pop() if messages else await receive()

            await self.app(scope, replay, send_and_note)
        except Refused as refused:
            # ASCII without quotes, for the log line
            scope["note"] = f": {ascii(refused.message)[1:-1]}"
            await refused.response(scope, receive, send_and_note)
        except ClientDisconnect:
            status = 499  # nginx's code for it
        except Exception:
            status = 500
            raise  # uvicorn logs the traceback
        finally:
            self.log(scope, status, time.perf_counter() - start)

    def check(self, request):
        """Raise Refused for a foreign Host or a wrong API key."""
        # DNS rebinding: any web page can give its own host name the address of this machine
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        if self.local and not is_loopback(host.strip("[]")):
            raise Refused(403, f"Host is {host}; it must be localhost or 127.0.0.1")

        # the page asks for the key itself, and preflight requests of browsers cannot carry one
        public = request.scope["path"] in ("/", "/health") or request.method == "OPTIONS"
        # compare in constant time: the time must not show how much of a key is right
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip().encode() if scheme.lower() == "bearer" else b""
        if self.api_key and not public and not hmac.compare_digest(key, self.api_key):
            message = "the API key is missing or wrong"
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, message, code="invalid_api_key", headers=headers)

    async def read_body(self, request):
        """Return the body. A body that is too large is read to its end but not kept: a client that
        is still sending would not see the response."""
        limit = self.config.max_body  # bytes
        parts = []
        size = 0  # bytes
        # a timeout leaves this block, and one of the errors below follows
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.request_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        parts.append(part)
                if size <= limit:
                    return b"".join(parts)
        if size > limit:  # too large, whether or not all of it came in time
            message = f"request body too large: the limit is {limit:,} bytes"
            raise Refused(413, message, headers={"Connection": "close"})
        raise Refused(408, "the request was sent too slowly", headers={"Connection": "close"})

    def log(self, scope, status, seconds):
        """Count the request and print a line. Monitors poll /health and /metrics: skip those."""
        # label by route, not by path: clients could create endless labels
        route = getattr(scope.get("route"), "path", "other")
        self.n_requests.labels(route, status).inc()
        # escape newlines, so that a path cannot forge a log line
        path = scope["path"].encode("unicode_escape").decode()[:80]
        if status != 200 or path not in ("/health", "/metrics"):
            print(f"{scope['method']} {path} {status} {seconds:.2f} s{scope.get('note', '')}")
