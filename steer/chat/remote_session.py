"""A chat with a model behind `steer serve`, over OpenAI's API.

`RemoteModel` is the client, which the page uses as well (`steer.chat.remote`). `RemoteSession` is the session that
`steer chat --server` runs in a terminal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import openai
from pydantic import BaseModel, FiniteFloat, ValidationError

from steer.chat.remote_sliders import RemoteSliders, Told, remote_profile, use_remote
from steer.chat.session import Session
from steer.core.profile import Profile
from steer.core.sampler import CHAT, ORDER, TEMPERATURE_LAST, Sampler
from steer.core.slider import Operation
from steer.errors import SteerError, UnsupportedError, UsageError
from steer.files import one_line
from steer.model.kv_cache import PrefixCache
from steer.model.steering.receipts import Receipt, SliderReceipt

_FRESH = 5.0
"""Seconds for which the server's answer about its sliders is cached."""
_STANDARD = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")
"""Fields of a sampler that have the same name in OpenAI's API."""


@dataclass(frozen=True)
class RemotePiece:
    """One piece of a streamed reply."""

    text: str
    finish: str | None = None
    """`stop` or `length` in the last piece, else None."""
    steering: Mapping[str, Any] | None = None
    """The server's `steering` extension (sliders, seed, receipt) in the last piece, else None."""


class RemoteModel:
    """A client for one model of a server. Its methods raise SteerError, one line that names the address."""

    def __init__(self, url: str, api_key: str | None = None, name: str | None = None) -> None:
        """`url`: the server's address, with or without /v1. `name`: one of its models, as in `merged@noir`; by default
        the first. Errors: SteerError if nothing answers, or if it is not a steer server."""
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self.client = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=api_key or "none", timeout=openai.Timeout(120.0, connect=5.0)
            )
        except (openai.OpenAIError, ValueError) as e:
            raise SteerError(f"{url}: expected the address of a server, found {e}; give http://HOST:PORT") from e
        self._cached_answer: tuple[float, Told] | None = None
        self.name = name or self._first_model()
        self.steering()

    def steering(self) -> Told:
        """Return the server's sliders: `GET /v1/steering`, cached for five seconds."""
        if self._cached_answer is None or time.monotonic() - self._cached_answer[0] > _FRESH:
            with self._errors():
                found = self.client.get("/steering", cast_to=object)
            try:
                parsed = Told.model_validate(found)
            except ValidationError as e:
                where = ".".join(map(str, e.errors()[0]["loc"]))[:60]
                raise SteerError(
                    f"{self.url}: expected a steer server, found another (its answer to GET /v1/steering at "
                    f"{where or 'its beginning'}: {e.errors()[0]['msg'][:80]}); start one with: steer serve MODEL"
                ) from e
            self._cached_answer = (time.monotonic(), parsed)
        return self._cached_answer[1]

    def write(
        self, messages: Sequence[Mapping[str, str]], sampler: Sampler, steering: Mapping[str, Any]
    ) -> Generator[RemotePiece]:
        """Yield the reply to a chat in pieces. Closing the generator ends the request.

        If the last message is the assistant's, the reply continues it. `steering`: the extension of the body of
        `POST /v1/chat/completions`.
        """
        fields = asdict(sampler)
        biases, order = fields.pop("logit_bias"), fields.pop("order")
        if order not in (ORDER, TEMPERATURE_LAST):
            raise UnsupportedError(f"{self.url}: order: expected the usual one, temperature last or not, found {order}")
        # A server ignores a seed below 0.
        fields["seed"] = abs(sampler.seed)
        standard = {name: fields.pop(name) for name in _STANDARD}
        body = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        body |= {"temperature_last": sampler.temperature_last, "steering": dict(steering)}
        with self._errors():
            stream = self.client.chat.completions.create(
                model=self.name, messages=cast(Any, list(messages)), stream=True, extra_body=body,
                logit_bias={str(token): bias for token, bias in biases}, **standard,
            )  # fmt: skip
        with stream:
            chunks = iter(stream)
            while True:
                with self._errors():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                piece = _piece(chunk, self.url)
                if piece.text or piece.finish or piece.steering:
                    yield piece

    def _first_model(self) -> str:
        with self._errors():
            found = [getattr(m, "id", None) for m in self.client.models.list()]
        if not found or not isinstance(found[0], str):
            raise SteerError(f"{self.url}: expected a model, found none; start one with: steer serve MODEL")
        return found[0]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as e:
            server_message = e.body.get("message") if isinstance(e.body, dict) else None
            raise SteerError(f"{self.url}: {' '.join(str(server_message or e.message).split())[:500]}") from e
        except openai.APIConnectionError as e:
            why = " ".join(str(e.__cause__ or e).split())
            raise SteerError(f"{self.url}: no server answers ({why}); start one with: steer serve MODEL") from e
        except openai.OpenAIError as e:
            raise SteerError(f"{self.url}: {' '.join(str(e).split())[:500]}") from e
        except UnicodeEncodeError as e:  # in the request, so the user's text or key is wrong
            what = "a key in ASCII" if e.encoding == "ascii" else "text that is Unicode, in the messages and names sent"
            raise UsageError(f"{self.url}: expected {what}, found {e.object[e.start]!r}; convert it to UTF-8") from e
        except (
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as e:  # the openai client does not check what it receives
            raise SteerError(f"{self.url}: expected a steer server, found one that sends {one_line(e)}") from e


class RemoteSession(Session):
    """A `Session` whose replies come from a server.

    The server reads the whole chat for each reply, and a slider that moves acts from the next reply on.
    """

    def __init__(self, model: RemoteModel, *, system: str | None = None, sampler: Sampler = CHAT) -> None:
        self.model, self.sliders = cast(Any, model), cast(Any, RemoteSliders(model))
        self.system, self.sampler = system, sampler
        self.messages: list[dict[str, str]] = []
        self.receipts: list[Receipt] = []
        self.memory = PrefixCache()

    def reply(self, text: str) -> Generator[str]:
        """See `Session.reply`."""
        sampler = replace(self.sampler, seed=self.sampler.seed + len(self.messages) // 2)
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        reply_text, extension, count = "", None, 0
        model = cast(RemoteModel, self.model)
        pieces = model.write([*system, *self.messages], sampler, {"sliders": dict(self.sliders)})
        try:
            for piece in pieces:
                reply_text, extension, count = reply_text + piece.text, piece.steering or extension, count + 1
                if piece.text:
                    yield piece.text
        finally:
            with suppress(Exception):
                pieces.close()
            if reply_text:
                self.messages.append({"role": "assistant", "content": reply_text})
                self.receipts.append(receipt_of(extension, count))
            else:
                self.messages.pop()

    def use(self, profile: Profile) -> None:
        """See `Session.use`. Errors: UsageError for settings that a request cannot express."""
        use_remote(cast(Any, self.sliders), profile)
        current = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=current.max_new_tokens, seed=current.seed)

    def profile(self, name: str) -> Profile:
        """See `Session.profile`."""
        return remote_profile(name, cast(Any, self.sliders), self.sampler)


def receipt_of(told: Mapping[str, Any] | None, tokens: int) -> Receipt:
    """Return the receipt in a server's `steering` extension.

    If the reply broke off, or the extension has another form, the receipt has only `tokens`, the number of pieces.
    """
    try:
        row = _ReceiptAnswer.model_validate((told or {}).get("receipt"))
    except ValidationError:
        return Receipt(tokens)
    return Receipt(
        tokens if row.tokens is None else row.tokens,
        tuple(
            SliderReceipt(
                s.name, s.operation, s.amount, s.tokens, math.nan if s.mean_share is None else s.mean_share
            )
            for s in row.sliders
        ),
    )  # fmt: skip


class _SliderAnswer(BaseModel):
    name: str
    operation: Operation
    amount: FiniteFloat
    tokens: int
    mean_share: FiniteFloat | None = None


class _ReceiptAnswer(BaseModel):
    tokens: int | None = None
    sliders: list[_SliderAnswer] = []


def _piece(chunk: Any, url: str) -> RemotePiece:
    """Read a chunk of a stream. Errors: SteerError for a chunk of another form."""
    extension = (getattr(chunk, "model_extra", None) or {}).get("steering")
    choices = getattr(chunk, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(choice, "delta", None), "content", None)
    finish = getattr(choice, "finish_reason", None)
    if not isinstance(text, str | None) or not isinstance(finish, str | None) or not isinstance(extension, dict | None):
        raise SteerError(f"{url}: expected a reply in pieces, found a chunk of another kind; is it a steer server?")
    return RemotePiece(text or "", finish, extension)
