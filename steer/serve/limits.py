"""Access checks of the server, before a request reaches a route: host name, API key, body size; and `Limits`."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.core.small_files import shown
from steer.errors import UsageError
from steer.serve.errors import ApiError

MAX_MESSAGES = 10_000
"""Largest value of `Limits.messages`: a longer list of messages is not parsed."""
OPEN_PATHS = frozenset({"/health"})
"""Paths that are answered without a key; they reveal only that the server is running."""


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
        for name in ("body", "messages", "choices", "tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"max {name}: expected a whole number of at least 1, found {value!r}")
        if self.messages > MAX_MESSAGES:
            raise UsageError(f"max messages: expected at most {MAX_MESSAGES}, found {self.messages}")


def is_loopback(host: str) -> bool:
    """Return whether a server bound to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return the host in a Host header, without the port."""
    host = header.lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def check_exposure(host: str, api_key: str | None) -> None:
    """Raise UsageError for a server that others could reach without a key, and for a key that no header can hold."""
    if api_key is not None and not (api_key.strip() == api_key != "" and api_key.isascii() and api_key.isprintable()):
        raise UsageError("--api-key: expected printable ASCII without spaces around it, found something else")
    if api_key is None and not is_loopback(host):
        raise UsageError(f"--host {host}: expected --api-key beside it, as others can reach it, found none; give a key")


class KnownHost:
    """Middleware that answers 400 if the Host header is not one of `hosts`.

    Against DNS rebinding: a page of another site can make its own host name point to this machine.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self._hosts = app, {h.lower() for h in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            name = host_name(Headers(scope=scope).get("host", ""))
            if name not in self._hosts:
                error = ApiError(400, f"host {shown(name)}: expected this machine's, as localhost", code="invalid_host")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class KeyRequired:
    """Middleware that answers 401 if a request does not send the key; the body is not read then."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # compare_digest takes the same time wherever two keys differ, so its timing reveals nothing of the key.
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key)
            if scheme.lower() != "bearer" or not right:
                what = "another" if given else "none"
                error = ApiError(
                    401,
                    f"expected the header Authorization: Bearer with the server's key, found {what}",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Middleware that answers 413 for a body of more than `limit` bytes.

    It counts the bytes as they arrive, because the Content-Length header may be wrong.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.limit:
            await self._too_large().response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise _TooLarge
            return message

        try:
            await self.app(scope, counted, send)
        except _TooLarge:
            await self._too_large().response()(scope, receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self.limit:,} bytes, found more", code="request_too_large")


class _TooLarge(BaseException):
    """A BaseException, so that it passes the handlers that answer 400 for errors in reading a body."""
