"""
The door of serve.py: who may come in, how much may be carried in and in what time, and how one is turned away.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
import time

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.protocol import error


class Refused(Exception):
    """A request that is not carried out, and why."""

    def __init__(self, status, message, param=None, code=None, **headers):
        self.message = message
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error"
        )
        self.response = answer(
            error(message, "server_error" if status >= 500 else kind, param, code), status, headers
        )


def answer(content, status=200, headers=None):
    """Return a response of JSON in ASCII: whatever clients sent, it can be said."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


class Guard:
    """Refuses who may not ask, and what is too long or too slow; prints a line for each request."""

    def __init__(self, app, config, key, requests):
        """requests: a Counter of paths and statuses."""
        self.app, self.config, self.key, self.requests = app, config, key.encode(), requests
        self.local = is_loopback(config.host)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0

        async def noting(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            request = Request(scope, receive)
            self.check(request)
            body = await self.body(request)

            async def replay():
                nonlocal body
                if body is None:
                    return await receive()
                message, body = {"type": "http.request", "body": body}, None
                return message

            await self.app(scope, replay, noting)
        except Refused as refused:
            scope["note"] = f": {refused.message}"
            await refused.response(scope, receive, noting)
        except ClientDisconnect:
            status = 499
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"].encode("unicode_escape").decode()[:80]
            seconds = time.perf_counter() - began
            known = getattr(scope.get("route"), "path", "other")
            self.requests.labels(known, status or "cut").inc()
            if status != 200 or path not in ("/health", "/metrics"):  # which are asked for all day
                print(
                    f"{scope['method']} {path} {status or 'cut'} {seconds:.2f} s{scope.get('note', '')}"
                )

    def check(self, request):
        """Raise Refused where the request comes by another name, or without the key."""
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        # else any page of the web could get here, by a name of its own that leads to this machine
        if self.local and not (host == "localhost" or is_loopback(host.strip("[]"))):
            raise Refused(403, f"Host is {host}: here it has to be localhost or 127.0.0.1")
        open_to_all = request.scope["path"] in ("/", "/health") or request.method == "OPTIONS"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip().encode() if scheme.lower() == "bearer" else b""
        if self.key and not open_to_all and not hmac.compare_digest(given, self.key):
            raise Refused(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                **{"WWW-Authenticate": "Bearer"},
            )

    async def body(self, request):
        """Return the body. What is too long is read on for a while, so that the client gets to hear the answer."""
        body, size = [], 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.request_seconds):
                async for part in request.stream():
                    size += len(part)
                    body.append(part)
                    if size > self.config.max_body:
                        body.clear()
                if size <= self.config.max_body:
                    return b"".join(body)
        if size > self.config.max_body:
            raise Refused(
                413,
                f"a request may have at most {self.config.max_body:,} bytes",
                Connection="close",
            )
        raise Refused(
            408,
            f"the request was not sent within {self.config.request_seconds} seconds",
            Connection="close",
        )


class Protocol(H11Protocol):
    """HTTP; a connection on which for a while no request has come whole is closed."""

    def __init__(self, seconds, **of_uvicorn):
        super().__init__(**of_uvicorn)
        self.seconds = seconds

    def connection_made(self, transport):
        super().connection_made(transport)
        self.timer = self.loop.call_later(self.seconds, self.watch, None)

    def watch(self, before):
        """Close the connection if it has begun no request since the last look, when it had `before`."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if self.cycle is before and not busy:
            self.transport.close()
        else:
            self.timer = self.loop.call_later(self.seconds, self.watch, self.cycle)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self.timer.cancel()


def is_loopback(host):
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
