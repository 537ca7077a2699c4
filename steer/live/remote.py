"""A chat with a model behind `steer serve`, over OpenAI's API."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import openai
from pydantic import BaseModel, FiniteFloat, ValidationError

from steer.errors import SteerError, UnsupportedError, UsageError
from steer.files import one_line
from steer.live.memory import Memory
from steer.live.receipts import Receipt, SliderReceipt
from steer.live.remote_sliders import RemoteSliders, Told, remote_profile, use_remote
from steer.live.session import Session
from steer.values.move import Operation
from steer.values.profile import Profile
from steer.values.sampler import CHAT, ORDER, TEMPERATURE_LAST, Sampler

_FRESH = 5.0
"""Seconds for which what the server said of its sliders is believed."""
_STANDARD = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")
"""Fields of a sampler that OpenAI's API has by the same name."""


@dataclass(frozen=True)
class RemotePiece:
    """Some of a reply."""

    text: str
    finish: str | None = None
    """`stop` or `length`, in the last one."""
    steering: Mapping[str, Any] | None = None
    """What the server tells of the sliders, in the last one."""


class RemoteModel:
    """A model behind a server. Errors of its methods: SteerError, one line that names the address."""

    def __init__(self, url: str, api_key: str | None = None, name: str | None = None) -> None:
        """`url`: with or without the /v1. `name`: one of the server's models, as in `merged@noir`; its first one
        without. Errors: SteerError where nothing answers, or something else does."""
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self.client = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=api_key or "none", timeout=openai.Timeout(120.0, connect=5.0)
            )
        except (openai.OpenAIError, ValueError) as e:
            raise SteerError(f"{url}: expected the address of a server, found {e}; give http://HOST:PORT") from e
        self._told: tuple[float, Told] | None = None
        self.name = name or self._first_model()
        self.steering()

    def steering(self) -> Told:
        """What the server says of its sliders: `GET /v1/steering`."""
        if self._told is None or time.monotonic() - self._told[0] > _FRESH:
            with self._errors():
                found = self.client.get("/steering", cast_to=object)
            try:
                told = Told.model_validate(found)
            except ValidationError as e:
                where = ".".join(map(str, e.errors()[0]["loc"]))[:60]
                raise SteerError(
                    f"{self.url}: expected a steer server, found another (its answer to GET /v1/steering at "
                    f"{where or 'its beginning'}: {e.errors()[0]['msg'][:80]}); start one with: steer serve MODEL"
                ) from e
            self._told = (time.monotonic(), told)
        return self._told[1]

    def write(
        self, messages: Sequence[Mapping[str, str]], sampler: Sampler, steering: Mapping[str, Any]
    ) -> Generator[RemotePiece]:
        """The reply to a chat, or what follows one that its last message begins, in pieces. To close it hangs up.

        `steering`: as `POST /v1/chat/completions` takes it.
        """
        fields = asdict(sampler)
        biases, order = fields.pop("logit_bias"), fields.pop("order")
        if order not in (ORDER, TEMPERATURE_LAST):
            raise UnsupportedError(f"{self.url}: order: expected the usual one, temperature last or not, found {order}")
        # Below 0 a server takes a seed for none.
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
            told = e.body.get("message") if isinstance(e.body, dict) else None
            raise SteerError(f"{self.url}: {' '.join(str(told or e.message).split())[:500]}") from e
        except openai.APIConnectionError as e:
            why = " ".join(str(e.__cause__ or e).split())
            raise SteerError(f"{self.url}: no server answers ({why}); start one with: steer serve MODEL") from e
        except openai.OpenAIError as e:
            raise SteerError(f"{self.url}: {' '.join(str(e).split())[:500]}") from e
        except UnicodeEncodeError as e:  # of what is sent, which comes from this side
            what = "a key in ASCII" if e.encoding == "ascii" else "text that is Unicode, in the messages and names sent"
            raise UsageError(f"{self.url}: expected {what}, found {e.object[e.start]!r}; convert it to UTF-8") from e
        except (
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as e:  # the client takes what it is sent on trust
            raise SteerError(f"{self.url}: expected a steer server, found one that sends {one_line(e)}") from e


class RemoteSession(Session):
    """A `Session` whose replies come from a server. A slider that moves acts from the next reply on; the server reads
    the whole chat for each."""

    def __init__(self, model: RemoteModel, *, system: str | None = None, sampler: Sampler = CHAT) -> None:
        self.model, self.sliders = cast(Any, model), cast(Any, RemoteSliders(model))
        self.system, self.sampler = system, sampler
        self.messages: list[dict[str, str]] = []
        self.receipts: list[Receipt] = []
        self.memory = Memory()

    def reply(self, text: str) -> Generator[str]:
        """As `Session.reply`."""
        sampler = replace(self.sampler, seed=self.sampler.seed + len(self.messages) // 2)
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        said, told, count = "", None, 0
        model = cast(RemoteModel, self.model)
        pieces = model.write([*system, *self.messages], sampler, {"sliders": dict(self.sliders)})
        try:
            for piece in pieces:
                said, told, count = said + piece.text, piece.steering or told, count + 1
                if piece.text:
                    yield piece.text
        finally:
            with suppress(Exception):
                pieces.close()
            if said:
                self.messages.append({"role": "assistant", "content": said})
                self.receipts.append(receipt_of(told, count))
            else:
                self.messages.pop()

    def use(self, profile: Profile) -> None:
        """As `Session.use`. Errors: UsageError for what a server cannot be asked for."""
        use_remote(cast(Any, self.sliders), profile)
        mine = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=mine.max_new_tokens, seed=mine.seed)

    def profile(self, name: str) -> Profile:
        """As `Session.profile`."""
        return remote_profile(name, cast(Any, self.sliders), self.sampler)


def receipt_of(told: Mapping[str, Any] | None, tokens: int) -> Receipt:
    """What a server told of a reply; of one that was broken off, or of a server that tells something else, how many
    pieces came."""
    try:
        row = _ToldReceipt.model_validate((told or {}).get("receipt"))
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


class _ToldSlider(BaseModel):
    name: str
    operation: Operation
    amount: FiniteFloat
    tokens: int
    mean_share: FiniteFloat | None = None


class _ToldReceipt(BaseModel):
    tokens: int | None = None
    sliders: list[_ToldSlider] = []


def _piece(chunk: Any, url: str) -> RemotePiece:
    """What a chunk of a stream holds. Errors: SteerError for one that is none."""
    told = (getattr(chunk, "model_extra", None) or {}).get("steering")
    choices = getattr(chunk, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(choice, "delta", None), "content", None)
    finish = getattr(choice, "finish_reason", None)
    if not isinstance(text, str | None) or not isinstance(finish, str | None) or not isinstance(told, dict | None):
        raise SteerError(f"{url}: expected a reply in pieces, found a chunk of another kind; is it a steer server?")
    return RemotePiece(text or "", finish, told)
