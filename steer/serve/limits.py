"""Checks of a request before it reaches a route: origin, host name, API key, size of the body; and `Limits`."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.core.small_files import shown
from steer.errors import UsageError
from steer.serve.errors import ApiError
from steer.serve.metrics import Metrics

MAX_MESSAGES = 10_000
"""Largest value of `Limits.messages`: a longer list of messages is not parsed."""


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    body: int = 4 * 2**20
    """Bytes of the body."""
    messages: int = 1000
    """Messages of a chat."""
    choices: int = 16
    """Texts written for one request: number of prompts times n."""
    tokens: int | None = None
    """Tokens of each reply; None for as many as the context leaves."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"max {name}: expected a whole number of at least 1, found {value!r}")
        if self.messages > MAX_MESSAGES:
            raise UsageError(f"max messages: expected at most {MAX_MESSAGES}, found {self.messages}")


def is_loopback(host: str) -> bool:
    """Return whether a server bound to `host` can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return the host in a Host header, without the port and the dot that ends a full name."""
    host = header.lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return host.removesuffix(".")


class Guard:
    """Middleware that refuses requests before their body is read, and counts all requests by route and status.

    It answers 401 without the server's key, except at /health, which reveals only that the server is running, and 413
    for a body of more than `max_body` bytes. On loopback it answers 400 for a Host header other than this machine's and
    `hosts`, against DNS rebinding: a page of another site can make its own host name point to this machine.
    """

    def __init__(
        self, app: ASGIApp, host: str, hosts: Sequence[str], api_key: str | None, max_body: int, metrics: Metrics
    ) -> None:
        self.app, self._key, self._max_body, self._metrics = app, api_key, max_body, metrics
        names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._hosts = names | {host_name(h) for h in hosts} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # what the client receives for an exception that no handler caught
        seen = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))  # counted as they arrive, as the Content-Length may be wrong
            if seen > self._max_body:
                raise _TooLarge
            return message

        try:
            if (refusal := self._refusal(scope["path"], Headers(scope=scope))) is None:
                await self.app(scope, counted, noted)
            else:
                await refusal.response()(scope, receive, noted)
        except _TooLarge:
            await self._too_large().response()(scope, receive, noted)
        finally:
            # The label is the route's path, not the request's: unknown paths would each make a new time series.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        name = host_name(headers.get("host", ""))
        if self._hosts is not None and name not in self._hosts:
            message = f"host {shown(name)}: expected this machine's, as localhost, or one that --allow-host names"
            return ApiError(400, message, code="invalid_host")
        if self._key is not None and path != "/health":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # compare_digest takes the same time wherever two keys differ, so its timing reveals nothing of the key.
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key.encode())
            if scheme.lower() != "bearer" or not right:
                found = "another" if given else "none"
                message = f"expected the header Authorization: Bearer with the server's key, found {found}"
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        declared = headers.get("content-length", "")
        return self._too_large() if declared.isdecimal() and int(declared[:20]) > self._max_body else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self._max_body:,} bytes, found more", code="request_too_large")


class Origins(CORSMiddleware):
    """Middleware that lets web pages of some origins use the server, and answers the question that browsers ask first.

    It stands before `Guard`: a browser asks without the key, and a page must be able to read a refusal.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        """`origins`: as `https://example.org`, or `*` for every page."""
        super().__init__(
            app, origins, ("GET", "POST", "PUT"), ("*",), allow_private_network=True, expose_headers=("Retry-After",)
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a browser's question. A refusal is 403 and names the option."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = (request_headers[name] for name in ("origin", "access-control-request-method"))
        if not self.is_allowed_origin(origin):
            message = f"origin {shown(origin)}: expected one that --allow-origin names; start the server with it"
            return ApiError(403, message, code="invalid_origin").response()
        message = f"expected one of {', '.join(self.allow_methods)}, found {shown(method)}"
        return ApiError(403, message, code="method_not_allowed").response()


class _TooLarge(BaseException):
    """A BaseException, so that it passes the handlers that answer 400 for errors in reading a body."""
