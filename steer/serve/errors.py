"""Error responses in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

Handlers raise `ApiError`; `handle_errors` makes a FastAPI app answer every error, pydantic's included, in this format.
"""

from __future__ import annotations

import logging
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from steer.core.small_files import shown
from steer.errors import SteerError, UsageError

log = logging.getLogger("steer.serve")

_TYPES = {401: "authentication_error", 413: "request_too_large", 429: "rate_limit_error"}
_LONGEST = 600
"""Most characters of a message; a message may quote what a client sent."""


class ErrorFields(BaseModel):
    """What went wrong, in OpenAI's format."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorFields


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""What the OpenAPI document says of errors."""


class ApiError(Exception):
    """The error response to a request that cannot be answered."""

    def __init__(
        self, status: int, message: str, *, code: str | None, param: str | None = None, headers: Any = None
    ) -> None:
        """`status`: the HTTP status. `code`: the error, for programs. `param`: the field of the body that is wrong."""
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return the error as a JSON object in OpenAI's format."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        fields = {"message": " ".join(str(self).split()), "type": kind, "param": self.param, "code": self.code}
        return {"error": {key: text and _short(text) for key, text in fields.items()}}

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def invalid(field: str, expected: str, found: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a field of the body with a value that is not allowed."""
    return ApiError(400, f"{field}: expected {expected}, found {found}", param=field, code=code)


def failed(error: Exception) -> ApiError:
    """Return the error response for a reply that could not be finished.

    Details of an exception that is not a SteerError go to the log only, not to the client.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, SteerError):
        return ApiError(500, str(error), code="engine_error")
    log.error("a request failed", exc_info=error)
    return _internal_error()


def handle_errors(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's format."""

    async def answer(request: Request, e: Exception) -> JSONResponse:
        if isinstance(e, RequestValidationError):
            e = _invalid(e)
        elif isinstance(e, HTTPException):
            known = {
                404: ("there is no such path", "not_found"),
                405: ("this path has other methods", "method_not_allowed"),
            }
            detail, code = known.get(e.status_code, (e.detail, None))
            message = f"{request.method} {request.url.path}: {detail}"
            e = ApiError(e.status_code, message, code=code, headers=e.headers)
        # Starlette raises any other exception again after this response is sent, and uvicorn logs it.
        return (e if isinstance(e, ApiError) else _internal_error()).response()

    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _internal_error() -> ApiError:
    return ApiError(500, "the server failed on this request; its log has the details", code="internal_error")


def _invalid(e: RequestValidationError) -> ApiError:
    """Return the error for the first field that pydantic refuses, with every value that the field could have."""
    errors = e.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        message = f"body: expected JSON, found none: {first['ctx']['error']} at {first['loc'][-1]}"
        return ApiError(400, message, code="invalid_json")
    if len(first["loc"]) == 1:
        message = "body: expected a JSON object, with the header Content-Type: application/json"
        return ApiError(400, message, code="invalid_json")
    field = _field(first["loc"])
    texts = [x["msg"].removeprefix("Value error, ") for x in errors if x["loc"][1:] and _field(x["loc"]) == field]
    expected = " or ".join(dict.fromkeys(text[:1].lower() + text[1:] for text in texts))
    found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
    return ApiError(400, f"{field}: {expected}{found}", param=field, code="invalid_value")


def _short(text: str) -> str:
    """Shorten a text and escape what is not printable.

    A text that a client sent may be long, and may hold lone surrogates, which UTF-8 cannot encode, or terminal control
    characters.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _field(loc: tuple[int | str, ...]) -> str:
    """Return pydantic's location as a path, as in `messages[0].role`.

    The path ends at a union, because the parts below it are the names of the union's members.
    """
    path = takewhile(lambda p: isinstance(p, int) or (p != "str" and p.isidentifier()), loc[1:])
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
