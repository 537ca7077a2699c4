"""The engine of `steer serve --engine llama.cpp`: a running llama-server writes the tokens.

Every job is a request to its `/completion`, with the prompt as token ids and a scale for every LoRA, so two jobs under
different sliders do not disturb each other. llama-server batches them and draws the tokens by its own samplers.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel

from steer.errors import MismatchError, SteerError, UnreachableError, UnsupportedError, UsageError
from steer.files import one_line
from steer.model.steering.receipts import Receipt
from steer.plain_text import plain_line
from steer.serve.engine import Busy, Event, Finished, Job, Token
from steer.serve.llama_cpp.adapters import Adapters, AdapterSteering
from steer.serve.llama_cpp.fields import differences, lora, sampling
from steer.serve.openai_json import token_bytes

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

_log = logging.getLogger(__name__)
_CHECK = "The old lighthouse keeper said: “It’s 3 o’clock already!” Then he walked down to the harbour for his bread."
"""What both tokenizers split, and what llama-server reads in the checks at the start."""
Scales = dict[int, float]
"""Id of a LoRA -> its scale."""


class _Row(BaseModel):
    """A LoRA in the answer to GET /lora-adapters."""

    id: int
    path: str
    scale: float


class _Size(BaseModel):
    n_ctx: int


class _Props(BaseModel):
    """The answer to GET /props."""

    total_slots: int
    model_path: str = ""
    default_generation_settings: _Size


class _Likely(BaseModel):
    id: int
    logprob: float


class _Step(_Likely):
    """The log-probabilities of a written token and of the likeliest ones in its place, before any sampler."""

    bytes: list[int] = []
    """The text of its event, with bytes that are no UTF-8."""
    top_logprobs: list[_Likely]


class _Chunk(BaseModel):
    """An event of a streamed /completion, or its whole answer."""

    content: str = ""
    tokens: list[int] = []
    tokens_predicted: int = 0
    """Tokens written so far. It grows by several where tokens before this one ended within a character: llama-server
    sends their text later and their ids never."""
    completion_probabilities: list[_Step] = []
    stop: bool = False
    stop_type: str = ""


@dataclass(eq=False)
class _Text:
    """A job that was accepted."""

    job: Job
    on_event: Callable[[Event], None]
    cancelled: bool = False
    begun: bool = False
    notes: dict[str, None] = field(default_factory=dict)
    """What the reply's receipt warns of, without repeats."""


class LlamaCppEngine:
    """An `Engine` in front of llama-server. `model` is described: llama-server alone holds weights.

    If a slider moves during a reply, llama-server is asked to go on from the last token under the new scales, for which
    it reads the text so far again. A reply writes a token at least under each setting that it is asked for.
    """

    def __init__(
        self,
        model: SteeredModel,
        max_running: int = 16,
        max_waiting: int = 64,
        context: int | None = None,
        *,
        url: str,
        place: Path,
        baked: Sequence[Path] = (),
        api_key: str | None = None,
    ) -> None:
        """Read which sliders llama-server has, and check that they act. `max_running` and `context` are at most
        llama-server's own. `url`: its address. `place`: the checkpoint's directory. `baked`: as `Adapters` takes it.
        `api_key`: llama-server's.

            model = describe("merged")
            engine = LlamaCppEngine(model, url="http://127.0.0.1:8080", place=Path("merged"))

        Errors: UnreachableError if nothing answers, MismatchError for another tokenizer, UnsupportedError for a LoRA
        that changes nothing; those of `Adapters`.
        """
        self.model, self.url, self.max_waiting = model, url.rstrip("/").removesuffix("/v1"), max_waiting
        self.problem: str | None = None
        if not self.url.startswith(("http://", "https://")):
            raise SteerError(f"{url}: expected the address of a llama-server, as http://127.0.0.1:8080; add http://")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        with self._errors():
            props = _Props.model_validate(self._ask("GET", "/props"))
            self._loaded = self._lora_adapters()
        self.file = Path(props.model_path).name
        """Name of the GGUF that llama-server has loaded."""
        self.max_running = min(max_running, props.total_slots)
        sizes = (context, model.context, props.default_generation_settings.n_ctx)
        self.context = min(n for n in sizes if n is not None)
        self.adapters = Adapters(model, place, [row.model_dump() for row in self._loaded], baked)
        model.library, model.steering = lambda: self.adapters, AdapterSteering(model, self.adapters)
        with self._errors():
            self._check()
        self._lock = threading.Lock()
        self._open: set[_Text] = set()
        self._threads = ThreadPoolExecutor(self.max_running, "steer-llama-cpp")

    @property
    def running(self) -> int:
        """See `Engine`, as for the other public methods."""
        with self._lock:
            return sum(text.begun for text in self._open)

    @property
    def waiting(self) -> int:
        with self._lock:
            return sum(not text.begun for text in self._open)

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Callable[[], None]:
        length = len(job.prompt) + job.sampler.max_new_tokens
        if length > self.context:
            raise UsageError(
                f"expected at most {self.context} tokens of prompt and reply together, found {length}; shorten them"
            )
        text = _Text(job, on_event)
        with self._lock:
            if len(self._open) >= self.max_running + self.max_waiting:
                raise Busy(f"queue full: {len(self._open)} replies are being written or wait; ask again later", 5.0)
            try:
                self._threads.submit(self._write, text)
            except RuntimeError as e:  # the pool is shut down
                raise SteerError("the engine is closed; start another") from e
            self._open.add(text)

        def cancel() -> None:
            text.cancelled = True

        return cancel

    def close(self) -> None:
        with self._lock:
            for text in self._open:
                text.cancelled = True
        self._threads.shutdown()

    def logprobs(self, ids: Sequence[int], start: int, scales: Scales) -> list[float]:
        """Return the log-probability of each of `ids` from `start` on under the scales; nan for a token that ends
        within a character.

        llama-server scores no given text. So each token is asked for alone, and forced by a bias, which its
        log-probability does not have in it. Errors: as `submit`, by their one line.
        """
        found = []
        with self._errors():
            for at in range(start, len(ids)):
                step = self._step(ids[:at], scales, ids[at], cache_prompt=at > start)
                found.append(math.nan if step is None else step.logprob)
        return found

    # The methods below are called in a thread of the pool, one for each job that is being written

    def _write(self, text: _Text) -> None:
        text.begun = True
        end: Event
        try:
            with self._errors():
                end = self._reply(text)
        except SteerError as e:
            end = e
        except Exception as e:
            _log.error("a reply could not be written", exc_info=e)
            end = SteerError(f"the reply could not be written: {type(e).__name__}: {one_line(e)}")
        with self._lock:
            self._open.discard(text)
        text.on_event(end)

    def _reply(self, text: _Text) -> Finished:
        written: list[int] = []
        reason: Literal["stop", "length", "cancelled", "moved"] = "moved"
        if not text.cancelled:
            self._check_loaded()
        while reason == "moved":
            reason = "cancelled" if text.cancelled else self._continue(text, written)
        read = len(text.job.prompt) + len(written)
        return Finished(reason, Receipt(read, notes=(*text.notes, *differences(text.job.sampler))))

    def _continue(self, text: _Text, written: list[int]) -> Literal["stop", "length", "cancelled", "moved"]:
        """Write tokens until the reply ends, is cancelled, or has a token under sliders that have moved since."""
        job, first, seen = text.job, len(written), 0
        edit = job.edit()
        scales = self.adapters.scales(edit)
        if edit is not None:
            text.notes["receipt: llama.cpp does not report how far its LoRAs moved the reply"] = None
        with self._answer("POST", "/completion", self._body(job, written, scales)) as response:
            for chunk in self._chunks(response):
                if text.cancelled:
                    return "cancelled"
                for token in self._tokens(chunk, chunk.tokens_predicted - seen, job.top_logprobs, text.notes):
                    if len(written) > first and (now := job.edit()) is not edit and self.adapters.scales(now) != scales:
                        return "moved"
                    written.append(token.id)
                    text.on_event(token)
                    if token.end:
                        return "stop"
                if chunk.stop:
                    return "stop" if chunk.stop_type == "eos" else "length"
                seen = chunk.tokens_predicted
        raise UnreachableError(f"{self.url}: expected a whole reply, found one that breaks off; see llama-server's log")

    def _tokens(self, chunk: _Chunk, count: int, top_logprobs: int | None, notes: dict[str, None]) -> Iterator[Token]:
        """Yield the tokens of an event. `count`: how many there are, none in an event about the prompt. The ids of all
        but the last are found by their text, without log-probabilities."""
        for last in chunk.tokens if count else ():
            step = next(iter(chunk.completion_probabilities), None)
            for id in self._earlier_ids(chunk, count - 1):
                notes["tokens within a character: llama-server sends no ids and no log-probabilities"] = None
                yield Token(id, None, (), id in self.model.end_token_ids)
            top = () if step is None or not top_logprobs else tuple((t.id, t.logprob) for t in step.top_logprobs)
            logprob = None if step is None else step.logprob
            yield Token(last, logprob, top[:top_logprobs], last in self.model.end_token_ids)

    def _earlier_ids(self, chunk: _Chunk, count: int) -> list[int]:
        """Return `count` tokens with the text that an event has before its last token, or else one for each byte."""
        if not count:
            return []
        step = next(iter(chunk.completion_probabilities), None)
        # A byte that is no UTF-8 comes as U+FFFD, and is shown so in the end.
        text = chunk.content.encode().replace("\ufffd".encode(), b"\xff") if step is None else bytes(step.bytes)
        text = text.removesuffix(token_bytes(self.model.tokenizer, chunk.tokens[-1]))
        each = (self._vocabulary.get(bytes([byte])) for byte in text)
        return _split(text, count, self._vocabulary) or [id for id in each if id is not None]

    @cached_property
    def _vocabulary(self) -> dict[bytes, int]:
        tokenizer = self.model.tokenizer
        return {token_bytes(tokenizer, i): i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}

    def _body(self, job: Job, written: Sequence[int], scales: Scales) -> dict[str, Any]:
        """Return the request for the rest of a reply."""
        seed = np.random.SeedSequence([abs(job.sampler.seed), job.key, len(written)]).generate_state(1)[0]
        return {
            "prompt": [*job.prompt, *written],
            "n_predict": max(1, job.sampler.max_new_tokens - len(written)),
            "seed": min(int(seed), 2**32 - 2),  # the largest seed means any
            "n_probs": 0 if job.top_logprobs is None else max(1, job.top_logprobs),
            "stream": True,
            "return_progress": True,  # so that a job can be cancelled while its prompt is read
            "cache_prompt": self._reuses,
            **lora(scales),
            **sampling(job.sampler, self.context),
        }

    def _chunks(self, response: HTTPResponse) -> Iterator[_Chunk]:
        """Yield the events of a stream. Errors: SteerError for one that is an error."""
        rest = b""
        for data in iter(response.read1, b""):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                kind, _, value = line.partition(b": ")
                if kind == b"error" or value.startswith(b'{"error"'):
                    raise SteerError(f"{self.url}: {plain_line(value.decode(errors='replace'))[:200]}")
                if kind == b"data":
                    yield _Chunk.model_validate_json(value)

    # What is checked

    def _check_loaded(self) -> None:
        """Raise SteerError if llama-server is another than at the start: the ids of LoRAs would mean others."""
        try:
            with self._errors():
                found = self._lora_adapters()
            if [(r.id, r.path) for r in found] != [(r.id, r.path) for r in self._loaded]:
                raise SteerError(f"{self.url}: expected the LoRAs of its start, found others; start steer serve again")
        except SteerError as e:
            self.problem = str(e)
            raise
        self.problem = None

    def _check(self) -> None:
        """Check that both tokenizers agree, that every slider changes log-probabilities, and whether texts under
        different sliders share a cache. Errors: MismatchError, UnsupportedError."""
        asked = {"content": _CHECK, "add_special": False, "parse_special": True}
        ids = self.model.encode(_CHECK)
        if (found := _Chunk.model_validate(self._ask("POST", "/tokenize", asked)).tokens) != ids:
            raise MismatchError(
                f"{self.url}: expected the tokens of {self.model.name}, {ids[:5]}, found {found[:5]}; serve the "
                "checkpoint that the GGUF was made of"
            )
        ids = self.model.encode(_CHECK, frame=True)
        neutral = self.adapters.scales(None)
        plain, moved = self._logprobs(ids, neutral), {}
        for adapter in self.adapters.adapters:
            if adapter.slider is not None:
                moved[adapter.id] = _distance(plain, self._logprobs(ids, neutral | {adapter.id: 1.0}))
                if moved[adapter.id] < 1e-5:
                    raise UnsupportedError(
                        f"{self.url}: expected slider {adapter.slider!r} to change log-probabilities, found them equal "
                        "at scale 0 and 1; start llama-server with --lora and the files of the bake"
                    )
        # llama-server b11549 keeps prompts in RAM by their tokens alone, whatever the scales that they were read under.
        first = min(moved)
        self._logprobs(ids, neutral | {first: 1.0}, cache_prompt=True)
        self._logprobs(ids[::-1], neutral, cache_prompt=True)
        leaked = _distance(plain, self._logprobs(ids, neutral, cache_prompt=True))
        self._reuses = leaked < 0.1 * moved[first]
        """Whether llama-server may use what it has read before."""
        if not self._reuses:
            _log.warning(
                "%s: its cache mixes texts under different sliders, so every prompt is read anew; start llama-server "
                "with --cache-ram 0", self.url
            )  # fmt: skip

    def _logprobs(self, ids: Sequence[int], scales: Scales, cache_prompt: bool = False) -> dict[int, float]:
        """Return the log-probabilities of the likeliest tokens after `ids`."""
        step = self._step(ids, scales, self.model.encode(_CHECK)[-1], cache_prompt)
        return {} if step is None else {likely.id: likely.logprob for likely in step.top_logprobs}

    def _step(self, ids: Sequence[int], scales: Scales, token: int, cache_prompt: bool) -> _Step | None:
        """Return the log-probabilities after `ids`, before the bias by which `token` is written. llama-server gives
        none for a token that ends within a character."""
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": 10, "id_slot": 0}
        body |= {"samplers": ["temperature"], "logit_bias": [[token, 1e4]], "cache_prompt": cache_prompt}
        answer = _Chunk.model_validate(self._ask("POST", "/completion", body | lora(scales)))
        return next(iter(answer.completion_probabilities), None)

    def _lora_adapters(self) -> list[_Row]:
        return [_Row.model_validate(row) for row in self._ask("GET", "/lora-adapters")]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        with self._answer(method, path, body) as response:
            return json.load(response)

    @contextmanager
    def _answer(self, method: str, path: str, body: Any = None) -> Iterator[HTTPResponse]:
        """Yield llama-server's answer to a request. Errors: SteerError for a status that is an error."""
        at = urlsplit(self.url)
        # Python's own client takes 10 us of CPU time for each event of a stream, httpx2 36 us.
        with closing((HTTPSConnection if at.scheme == "https" else HTTPConnection)(at.netloc, timeout=5)) as connection:
            connection.connect()
            connection.sock.settimeout(600)
            headers = self._headers | {"Content-Type": "application/json"}
            connection.request(method, at.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise SteerError(
                    f"{self.url}: expected llama-server's answer to {path}, found status {response.status}: "
                    f"{plain_line(response.read().decode(errors='replace'))[:200]}"
                )
            yield response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPException) as e:
            raise UnreachableError(f"{self.url}: no llama-server answers ({one_line(e)}); start it") from e
        except ValueError as e:
            raise SteerError(f"{self.url}: expected a llama-server, found another answer ({one_line(e)})") from e


def _distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Return the largest difference of two steps' log-probabilities, inf if they have no token in common."""
    return max((abs(one[t] - other[t]) for t in one.keys() & other.keys()), default=math.inf)


def _split(data: bytes, count: int, vocabulary: dict[bytes, int]) -> list[int]:
    """Return `count` tokens with this text, long ones first; empty if there are none."""
    if count == 1:
        return [vocabulary[data]] if data in vocabulary else []
    for size in range(len(data) - count + 1, 0, -1):
        rest = _split(data[size:], count - 1, vocabulary) if data[:size] in vocabulary else []
        if rest:
            return [vocabulary[data[:size]], *rest]
    return []
