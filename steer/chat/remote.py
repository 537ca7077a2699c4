"""Replies from a model behind `steer serve`, or llama-server, over OpenAI's API: the `ReplyBackend` of the option
`--server`.

`steer.chat.local` is its counterpart for a model in this process.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import openai
from pydantic import BaseModel, Field, FiniteFloat, RootModel, ValidationError

from steer.baking.certificate import CERTIFICATE, CONTROL_VECTOR, Certificate, SavedDirection
from steer.baking.llama_cpp import JOINT
from steer.chat.conversation import SettingsSpan
from steer.chat.writer import PendingReply, ReplyBackend, Task
from steer.core.profile import Profile, ProfileSlider
from steer.core.sampler import ORDER, TEMPERATURE_LAST, Sampler
from steer.core.slider import OPERATIONS, Operation, check_amount, neutral_amount, parse_name
from steer.core.thoughts import THINK, ThoughtSplitter
from steer.errors import SteerError, UnknownNameError, UnsupportedError, UsageError
from steer.measure.endpoint import answer_errors, client_of
from steer.model.sliders import Amounts
from steer.model.steering.receipts import Receipt, SliderReceipt
from steer.serve.llama_cpp.fields import lora, sampling

_FRESH = 5.0
"""Seconds for which the server's answer about its sliders is cached."""
_LOST = 2.0
"""Seconds after which scales are sent again: ik_llama.cpp sets them at once, and now and then never answers."""
_LONGEST = 2**20
"""How far back llama-server's penalties look, in tokens: over the whole text."""
_LATENT = re.compile(r"L(\d+)/\d+")


@dataclass(frozen=True)
class RemotePiece:
    """One piece of a streamed reply."""

    text: str
    thoughts: str
    finish: str | None
    """`stop` or `length` in the last piece, else None."""
    steering: Mapping[str, Any] | None
    """The server's `steering` extension (sliders, seed, receipt) in the last piece, else None."""


class RemoteBackend(ReplyBackend):
    """`ReplyBackend` for one model of a server, with the amounts of one chat.

    The server keeps nothing between requests, so each request carries the chat and the amounts. If a slider moves
    during a reply, the server is asked again to continue from the text written so far. Errors of the server and of the
    connection are a SteerError of one line that names the address.
    """

    local = False
    slider_note = (
        "A slider that moves is felt within a few words: the server is asked to go on from there, and reads the chat "
        "again under the sliders of then."
    )

    def __init__(self, url: str, api_key: str | None = None, name: str | None = None) -> None:
        """`url`: the server's address, with or without /v1. `name`: one of its models, as in `merged@noir`; by default
        the first. Errors: SteerError if nothing answers, or if it is neither a steer server nor a llama-server."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.client = client_of(self.url, api_key)
        self._cached_answer: tuple[float, _SteeringAnswer] | None = None
        self.template_options: dict[str, Any] = {}
        """Options of the chat template that every request carries."""
        self.name = name or self._first_model()
        self.adapters: dict[str, int] | None = None
        """Slider -> id of its LoRA, on a llama-server; None for a steer server."""
        self.vectors: dict[str, LiveVector] | None = None
        """Slider -> its control vector, on a llama-server that moves them while it runs; None for all others."""
        self._scales: dict[int, float] = {}
        """Id of a LoRA -> its scale when this client came."""
        self.sliders = RemoteSliders(self)
        self.offered()
        if self.vectors is not None:
            self.slider_note += (
                " These are the LoRAs and the control vectors of llama-server, at scale 0 until you move them. It has "
                "one setting for all chats: yours holds while a reply to you is written."
            )
        elif self.adapters is not None:
            self.slider_note += (
                " These are the LoRAs of llama-server, at scale 0 until you move them. A control vector acts as "
                "llama-server was started with it; only a restart changes that."
            )

    @property
    def amounts(self) -> dict[str, float]:
        """The amounts that the next request carries."""
        return dict(self.sliders) if self.on else {}

    def draft(self, task: Task) -> RemoteDraft:
        return RemoteDraft(self, task)

    def profile(self, name: str, sampler: Sampler) -> Profile:
        entries = []
        for label, amount in self.sliders.items():
            base, operation = parse_name(label)
            entries.append(ProfileSlider(base, amount, operation, range=self.sliders.ranges.get(label)))
        return Profile(name, sampler=sampler, preset=None, sliders=tuple(entries))

    def use(self, profile: Profile) -> None:
        """See `ReplyBackend`. Errors: UsageError for what a request cannot express, files and schedules."""
        amounts: dict[str, float] = {}
        ranges: dict[str, tuple[float, float]] = {}
        for entry in profile.sliders:
            if entry.when is not None or profile.file_of(entry.slider) is not None:
                what = "a slider that acts at times" if entry.when is not None else f"the file {entry.slider!r}"
                raise UsageError(
                    f"profile {profile.name!r}: expected sliders by name and amount, which is what a request can ask "
                    f"{self.url} for, found {what}; start the server with it: steer serve MODEL --profile FILE"
                )
            name = entry.slider if entry.operation is None else f"{entry.slider}:{entry.operation}"
            if name not in self.sliders.known() and entry.operation == self.sliders.slider(entry.slider).operation:
                name = entry.slider
            if entry.enabled:
                amounts[name] = entry.amount
            if entry.range is not None:
                ranges[name] = entry.range
        self.sliders.replace(amounts)
        self.sliders.ranges |= ranges

    def reread(self) -> None:
        """Nothing to do: the server reads the chat anew for every reply."""

    def close(self) -> None:
        self.client.close()

    def offered(self) -> list[RemoteSlider]:
        """Return the server's sliders, cached for five seconds: `GET /v1/steering`, or llama-server's LoRAs."""
        if self._cached_answer is None or time.monotonic() - self._cached_answer[0] > _FRESH:
            answer = self._steering() if self.adapters is None else None
            if answer is None:
                with answer_errors(self.url):
                    found = self.client.get(f"{self.url}/lora-adapters", cast_to=object)
                    rows = _AdaptersAnswer.model_validate(found).root
                sliders = lora_sliders(rows)
                if self.adapters is None:
                    self.vectors = self._live_vectors(rows, sliders)
                    self._scales = {row.id: row.scale for row in rows}
                self.adapters = {name: row.id for name, row in zip(sliders, rows, strict=True)}
                others = fixed_sliders(rows) if self.vectors is None else [v.slider for v in self.vectors.values()]
                answer = _SteeringAnswer(sliders=[*sliders.values(), *(s for s in others if s.name not in sliders)])
            self._cached_answer = (time.monotonic(), answer)
        return self._cached_answer[1].sliders

    def _steering(self) -> _SteeringAnswer | None:
        """Return the answer of a steer server; None from one that has LoRAs instead, so is a llama-server."""
        with answer_errors(self.url):
            try:
                found = self.client.get("/steering", cast_to=object)
            except openai.NotFoundError:
                with suppress(openai.NotFoundError):
                    self.client.get(f"{self.url}/lora-adapters", cast_to=object)
                    return None
                raise
        try:
            return _SteeringAnswer.model_validate(found)
        except ValidationError as e:
            where = ".".join(map(str, e.errors()[0]["loc"]))[:60]
            raise SteerError(
                f"{self.url}: expected a steer server, found another (its answer to GET /v1/steering at "
                f"{where or 'its beginning'}: {e.errors()[0]['msg'][:80]}); start one with: steer serve MODEL"
            ) from e

    def _live_vectors(self, loras: Sequence[_Adapter], taken: Collection[str]) -> dict[str, LiveVector] | None:
        """Return slider -> its control vector, for those that are loaded and those beside the LoRAs. None from a server
        without ik_llama.cpp's endpoints for them. `taken`: names of other sliders."""
        with answer_errors(self.url):
            try:
                found = self.client.get(f"{self.url}/control-vectors", cast_to=object)
            except openai.NotFoundError:
                return None
            rows = {row.path: row for row in _VectorsAnswer.model_validate(found).root}
        for folder, added in _baked_adds(row.path for row in loras):
            path = str(folder / CONTROL_VECTOR)
            # In the layers after a vector's last one the server keeps the numbers of the vector before.
            rows.setdefault(path, _VectorRow(path=path, layer_end=max(d.site for d in added)))
        vectors: dict[str, LiveVector] = {}
        # The server adds them up in an array of the first one's length, so the longest is loaded first.
        for row in sorted(rows.values(), key=lambda row: -row.layer_end):
            vector = _live_vector(row, {*taken, *vectors})
            vectors[vector.slider.name] = vector
        return vectors

    @contextmanager
    def moved(self, amounts: Mapping[str, float]) -> Iterator[None]:
        """Hold the sliders at these amounts for the length of a block, then set them as this client found them.

        Only on a server that has one setting for all requests, see `vectors`; on others this does nothing.

            with backend.moved({"calm": 0.5}):
                ...  # acts on all that llama-server writes now

        Errors: SteerError with the server's message.
        """
        if self.vectors is None or self.adapters is None:
            yield
            return
        try:
            loras = {id: amounts.get(name, 0.0) for name, id in self.adapters.items()}
            self._set(loras, {name: amounts.get(name, 0.0) / v.unit for name, v in self.vectors.items()})
            yield
        finally:
            self._set(self._scales, {name: v.row.scale for name, v in self.vectors.items()})

    def _set(self, loras: Mapping[int, float], vectors: Mapping[str, float]) -> None:
        """Set the scales that a server holds for all requests: of LoRAs by id, of control vectors by slider."""
        client = self.client.with_options(timeout=_LOST, max_retries=5)
        with answer_errors(self.url):
            if loras:
                client.post(f"{self.url}/lora-adapters", cast_to=object, body=lora(loras)["lora"])
            for name, scale in vectors.items():
                row = (self.vectors or {})[name].row
                # Loads it, or moves it if it is loaded.
                body = row.model_dump() | {"scale": scale}
                client.post(f"{self.url}/control-vectors/load", cast_to=object, body=body)

    def forget_offered(self) -> None:
        """Make `offered` ask the server again, which has a new slider."""
        if self._cached_answer is not None:
            self._cached_answer = -math.inf, self._cached_answer[1]

    @property
    def finds(self) -> bool:
        """Whether the server's last answer lets clients search for new sliders."""
        return self._cached_answer is not None and self._cached_answer[1].allow_find

    def ask(self, method: Literal["get", "post", "delete"], path: str, body: Any = None) -> Any:
        """Send a request that OpenAI's API does not have, to a path below /v1 or an address. Return the answer's JSON.

        Errors: SteerError with the server's message.
        """
        with answer_errors(self.url):
            return getattr(self.client, method)(path, cast_to=object, **({} if body is None else {"body": body}))

    def write(
        self, messages: Sequence[Mapping[str, str]], sampler: Sampler, amounts: Mapping[str, float]
    ) -> Generator[RemotePiece]:
        """Yield the reply to a chat in pieces, under these amounts. Closing the generator ends the request.

        If the last message is the assistant's, the reply continues it.
        """
        body = self._fields(sampler, amounts)
        if self.template_options:
            body["chat_template_kwargs"] = self.template_options
        with self.moved(amounts):
            with answer_errors(self.url):
                stream = self.client.chat.completions.create(
                    model=self.name, messages=cast(Any, list(messages)), stream=True, extra_body=body
                )
            with stream:
                chunks = iter(stream)
                while True:
                    with answer_errors(self.url):
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    piece = _piece(chunk, self.url)
                    if piece.text or piece.thoughts or piece.finish or piece.steering:
                        yield piece

    def _fields(self, sampler: Sampler, amounts: Mapping[str, float]) -> dict[str, Any]:
        """Return the fields of a request that its sampler and its sliders are. A server ignores a seed below 0."""
        if self.adapters is not None:
            scales = {id: amounts.get(name, 0.0) for name, id in self.adapters.items()}
            length = {"max_tokens": sampler.max_new_tokens, "seed": abs(sampler.seed) % (2**32 - 1)}
            # What such a server has read before, it read under other amounts.
            anew = {} if self.vectors is None else {"cache_prompt": False}
            return sampling(sampler, _LONGEST) | length | lora(scales) | anew
        fields = asdict(sampler) | {"seed": abs(sampler.seed)}
        order = fields.pop("order")
        if order not in (ORDER, TEMPERATURE_LAST):
            raise UnsupportedError(f"{self.url}: order: expected the usual one, temperature last or not, found {order}")
        body = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        body |= {"temperature_last": sampler.temperature_last, "steering": {"sliders": dict(amounts)}}
        return body | {"logit_bias": {str(token): bias for token, bias in sampler.logit_bias}}

    def _first_model(self) -> str:
        with answer_errors(self.url):
            found = [getattr(m, "id", None) for m in self.client.models.list()]
        if not found or not isinstance(found[0], str):
            raise SteerError(f"{self.url}: expected a model, found none; start one with: steer serve MODEL")
        return found[0]


class RemoteDraft(PendingReply):
    """A `PendingReply` that a server writes."""

    def __init__(self, backend: RemoteBackend, task: Task) -> None:
        super().__init__(task.text)
        self._backend, self._task = backend, task
        self._thinking = ThoughtSplitter(THINK, task.text).thinking
        """Whether the text so far ends within thoughts."""
        self._amounts: dict[str, float] = {}
        self._pieces: Generator[RemotePiece] | None = None
        self._steering: Mapping[str, Any] | None = None

    def step(self) -> bool:
        # A piece may be more than one token.
        amounts = self._backend.amounts
        if self._pieces is None or amounts != self._amounts:
            if self.tokens >= self._task.sampler.max_new_tokens:
                return False
            self._pieces = self._request(amounts)
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._steering = piece.steering or self._steering
        if piece.finish is not None:
            self.ending = "length" if piece.finish == "length" else "ended"
        self.text += self._with_marks(piece)
        self.tokens += bool(piece.text or piece.thoughts)
        return True

    def _with_marks(self, piece: RemotePiece) -> str:
        """Return a piece's text, with the marks of thoughts before their first and after their last."""
        text = ""
        if piece.thoughts:
            text = piece.thoughts if self._thinking else f"{THINK.open}\n{piece.thoughts}"
            self._thinking = True
        if piece.text:
            text += f"\n{THINK.close}\n\n{piece.text}" if self._thinking else piece.text
            self._thinking = False
        return text

    def close(self) -> None:
        if self._pieces is not None:
            with suppress(Exception):
                self._pieces.close()

    def receipt(self) -> Receipt:
        return receipt_of(self._steering, self.tokens)

    def _request(self, amounts: dict[str, float]) -> Generator[RemotePiece]:
        """Request the reply, or the rest of it."""
        self.close()
        task, backend = self._task, self._backend
        # Another seed for each continuation, or it would repeat the draws of the reply's beginning.
        sampler = replace(
            task.sampler,
            max_new_tokens=max(1, task.sampler.max_new_tokens - self.tokens),
            seed=task.sampler.seed + (self.tokens and 1_000_003 + self.tokens),
        )
        begun = ({"role": "assistant", "content": self.text},) if self.text else ()
        self._amounts = amounts
        profile = backend.profile("then", task.sampler) if backend.on else None
        self.stretches.append(SettingsSpan(self.tokens, profile))
        return backend.write((*task.messages, *begun), sampler, amounts)


class RemoteSlider(BaseModel, frozen=True):
    """A slider, as `GET /v1/steering` describes it."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    operation: str
    amount: FiniteFloat | None = None
    moved: Annotated[FiniteFloat | None, Field(alias="share")] = None
    unit_share: FiniteFloat | None = None
    """How far amount 1 moves the residual stream, as a share of its median norm; None if the server does not say."""
    range: tuple[FiniteFloat, FiniteFloat] | None = None
    site: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    kind: str | None = None
    """`feature` if the slider moves latents of a dictionary."""
    fixed: str | None = None
    """Why the slider stands at its amount as long as the server runs; None if it moves."""

    @property
    def neutral(self) -> float | None:
        """The amount at which the slider moves nothing; None if it moves nothing only when it is removed."""
        return neutral_amount(self.operation)

    def share(self, amount: float) -> float:
        """Return how far an amount moves the residual stream, as a share of its median norm; nan if unknown."""
        if amount == self.neutral:
            return 0.0
        unit = self.unit_share
        if unit is None and self.moved is not None and self.amount:
            unit = self.moved / abs(self.amount)
        return math.nan if self.operation != "add" or unit is None else abs(amount) * unit

    def check(self, amount: Any) -> float:
        """Return the amount as a number. Errors: UsageError if the slider cannot have it, or cannot be moved."""
        if self.fixed is not None:
            raise UsageError(f"slider {self.name!r}: expected one that moves; {self.fixed}")
        return check_amount(self.name, self.operation, amount)


class _SteeringAnswer(BaseModel):
    sliders: Annotated[list[RemoteSlider], Field(max_length=10_000, fail_fast=True)]
    allow_find: bool = False


class _Adapter(BaseModel):
    """A LoRA in llama-server's answer to GET /lora-adapters."""

    id: int
    path: str
    scale: float = 0.0


class _AdaptersAnswer(RootModel[list[_Adapter]]):
    pass


class _VectorRow(BaseModel):
    """A control vector in the answer to GET /control-vectors, and in a request to POST /control-vectors/load."""

    path: str
    scale: float = 0.0
    layer_start: int = 1
    layer_end: int


class _VectorsAnswer(RootModel[list[_VectorRow]]):
    pass


@dataclass(frozen=True)
class LiveVector:
    """A control vector that llama-server moves while it runs."""

    slider: RemoteSlider
    unit: float
    """The slider's amount at scale 1."""
    row: _VectorRow
    """The control vector as the client found it."""


def lora_sliders(rows: Sequence[_Adapter]) -> dict[str, RemoteSlider]:
    """Return a slider for each LoRA of llama-server by name, in their order.

    A LoRA that `steer bake` wrote is `NAME:ablate`. An amount is its scale.
    """
    sliders: dict[str, RemoteSlider] = {}
    for row in rows:
        path = Path(row.path)
        base = path.stem.removeprefix("ablate-")
        ablates = base != path.stem or path.name == JOINT
        name = f"{base}:ablate" if ablates else base
        while name in sliders:
            name += f" ({row.id})"
        sliders[name] = RemoteSlider(name=name, operation="ablate" if ablates else "add")
    return sliders


def fixed_sliders(rows: Sequence[_Adapter]) -> list[RemoteSlider]:
    """Return a slider that does not move for each direction of the control vectors beside the LoRAs."""
    sliders = []
    for folder, added in _baked_adds(row.path for row in rows):
        why = f"llama-server reads {folder / CONTROL_VECTOR} when it starts; start it again to change it"
        sliders += [RemoteSlider(name=d.name, operation="add", amount=d.amount, site=d.site, fixed=why) for d in added]
    return sliders


def _baked_adds(files: Iterable[str]) -> list[tuple[Path, list[SavedDirection]]]:
    """Return the folders of these files in which `steer bake` wrote a control vector, each with what it adds."""
    folders = [f for f in dict.fromkeys(Path(file).parent for file in files) if (f / CERTIFICATE).is_file()]
    adds = [(f, [d for d in Certificate.load(f).directions if d.amount is not None]) for f in folders]
    return [(folder, added) for folder, added in adds if added]


def _live_vector(row: _VectorRow, taken: Collection[str]) -> LiveVector:
    """Return a control vector with its slider, under a name that is not taken.

    A direction that was baked alone has the bake's amount at scale 1. Several in one file, and a file that `steer bake`
    did not write, have their scale as amount.
    """
    path = Path(row.path)
    added = next((found for _, found in _baked_adds([row.path])), []) if path.name == CONTROL_VECTOR else []
    name = "+".join(d.name for d in added) or path.stem
    while name in taken:
        name += " (2)"
    site, unit = (added[0].site, added[0].amount) if len(added) == 1 else (None, None)
    return LiveVector(RemoteSlider(name=name, operation="add", site=site), unit or 1.0, row)


class RemoteSliders(Amounts):
    """The amounts of one chat, which each of its requests carries. Other chats of the server are not affected."""

    _bound = "up to "

    def __init__(self, backend: RemoteBackend) -> None:
        super().__init__()
        self._backend = backend

    def known(self) -> dict[str, RemoteSlider]:
        """Return name -> every slider that the server offers. Errors: SteerError if it does not answer."""
        known = {s.name: s for s in self._backend.offered() if s.operation in OPERATIONS}
        for slider in known.values():
            if slider.range is not None:
                self.ranges.setdefault(slider.name, slider.range)
        return known

    def slider(self, name: str) -> RemoteSlider:
        """Return a slider by name: one that the server offers, the same with another operation, or a latent.

        Whether a latent exists is known only to the server. Errors: UnknownNameError, a UsageError.
        """
        known = self.known()
        if name in known:
            return known[name]
        base, operation = parse_name(name)
        if match := _LATENT.fullmatch(base):
            return RemoteSlider(name=name, operation=operation or "add", site=int(match[1]), kind="feature")
        if base in known:
            return known[base].model_copy(update={"name": name, "operation": operation or known[base].operation})
        known_names = ", ".join(known) or "none"
        raise UnknownNameError(f"slider {name!r}: expected one that {self._backend.url} offers, found {known_names}")

    def share(self, site: int) -> float:
        """Return how far the sliders move the residual stream at a site at most: the sum of their shares."""
        shares = [self.slider(n).share(a) for n, a in self._amounts.items() if self.slider(n).site == site]
        return sum(s for s in shares if not math.isnan(s))

    def replace(self, amounts: Mapping[str, float]) -> None:
        self._change({n: self.slider(n).check(a) for n, a in amounts.items()})

    def _change(self, amounts: dict[str, float]) -> None:
        before, self._amounts = self._amounts, amounts
        self._remember(before)

    def _state(self) -> dict[str, float]:
        return self._amounts

    def _restore(self, state: dict[str, float]) -> None:
        self._amounts = state


def receipt_of(steering: Mapping[str, Any] | None, tokens: int) -> Receipt:
    """Return the receipt in a server's `steering` extension.

    If the reply broke off, or the extension has another form, the receipt has only `tokens`, the number of pieces.
    """
    try:
        row = _ReceiptAnswer.model_validate((steering or {}).get("receipt"))
    except ValidationError:
        return Receipt(tokens)
    sliders = [(s, math.nan if s.mean_share is None else s.mean_share) for s in row.sliders]
    return Receipt(
        tokens if row.tokens is None else row.tokens,
        tuple(SliderReceipt(s.name, s.operation, s.amount, s.tokens, share) for s, share in sliders),
    )


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
    delta = getattr(choice, "delta", None)
    text, thoughts = getattr(delta, "content", None), getattr(delta, "reasoning_content", None)
    finish = getattr(choice, "finish_reason", None)
    if not all(isinstance(x, str | None) for x in (text, thoughts, finish)) or not isinstance(extension, dict | None):
        raise SteerError(f"{url}: expected a reply in pieces, found a chunk of another kind; is it a steer server?")
    return RemotePiece(text or "", thoughts or "", finish, extension)
