"""One request for text, from its parsed body to its reply, whole or streamed; cancelled if its client hangs up.

`Replies.answer` is what the routes in `steer.serve.app` call. It plans the request (prompt, sampler, sliders, jobs),
submits the jobs through `steer.serve.writing`, and sends the updates as OpenAI's JSON.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from steer.core.small_files import shown
from steer.errors import SteerError
from steer.files import without_nan
from steer.model.sampling import breaker_ids
from steer.serve.engine import Engine, Job
from steer.serve.errors import ApiError, failed, invalid
from steer.serve.limits import Limits
from steer.serve.metrics import Metrics
from steer.serve.openai_json import ChatShape, CompletionShape, Shape, usage
from steer.serve.prompts import Prompt, chat_prompt, check_size, completion_prompts, room_for, sampler_of
from steer.serve.schemas import ChatRequest, CompletionRequest
from steer.serve.steering import LiveSettings, Steered
from steer.serve.writing import Update, Writing

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

PLANNED = 4
"""How many requests are planned at the same time, each in a thread."""
_PING = b": still here\n\n"
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class RequestPlan:
    """The generation jobs that an HTTP request expands to, and how to turn their output into response chunks."""

    jobs: list[Job]
    prompts: list[Prompt]
    shape: Shape
    steered: Steered
    stop: list[str]
    stream: bool
    stream_usage: bool


class Replies:
    """Answers requests for text from one model."""

    def __init__(
        self, model: SteeredModel, engine: Engine, board: LiveSettings, metrics: Metrics, *, name: str, limits: Limits
    ) -> None:
        """`name`: the model's name for clients."""
        self._model, self._engine, self._board, self._metrics = model, engine, board, metrics
        self.name = name
        self._limits = limits
        # Planning (templates, tokenisation, looking up directions) runs in threads beside the event loop. Several
        # requests are planned at a time, so that one that takes seconds to tokenise does not delay the others.
        self._planning_limiter = anyio.CapacityLimiter(PLANNED)
        self._longest = max(map(len, model.tokenizer.get_vocab()), default=1)

    async def answer(self, http: HttpRequest, request: ChatRequest | CompletionRequest) -> Response:
        """Return the response to a request. Errors: ApiError."""
        plan = await self._planned(http, request)
        if plan is None:
            return self._client_left()
        writing = Writing(self._engine, plan.jobs, self._model.tokenizer, plan.stop, self._metrics)
        self._metrics.prompt_tokens.inc(sum(len(p.ids) for p in plan.prompts))
        if plan.stream:
            return _Stream(self._chunks(plan, writing), writing, self._metrics)
        try:
            return await self._whole(http, plan, writing)
        finally:
            writing.cancel()

    async def _planned(self, http: HttpRequest, request: ChatRequest | CompletionRequest) -> RequestPlan | None:
        """Plan a request in a thread. Return None if the client hung up before its turn came. Errors: ApiError."""
        plan: RequestPlan | None = None
        problem: ApiError | None = None
        async with _until_hung_up(http) as scope:
            try:
                plan = await anyio.to_thread.run_sync(self._plan, request, limiter=self._planning_limiter)
            except ApiError as e:
                problem = e
            scope.cancel()
        if problem is not None:
            raise problem
        return plan

    def _client_left(self) -> Response:
        self._metrics.hung_up.inc()
        return Response(status_code=499)  # nginx's code for a closed connection; only the metrics see it

    def profile_of(self, model: str | None) -> str | None:
        """Return the profile in a model's name, `noir` for `merged@noir`, or None for the plain model.

        Errors: ApiError for a model that the server does not have.
        """
        if not model or model in (self.name, self._model.name):
            return None
        base, at, profile = model.rpartition("@")
        if at and base in (self.name, self._model.name) and profile in self._board.profiles:
            return profile
        known_names = ", ".join([self.name, *(f"{self.name}@{p}" for p in self._board.profiles)])
        raise ApiError(
            404,
            f"model {shown(model)}: expected one of {known_names}; see GET /v1/models",
            param="model",
            code="model_not_found",
        )

    def _plan(self, request: ChatRequest | CompletionRequest) -> RequestPlan:
        model, limits = self._model, self._limits
        check_size(request, limits, self._engine.context, self._longest)
        steered = self._board.steered(self.profile_of(request.model), request.steering)
        sampler = sampler_of(request, steered.setting.sampler, limits, len(model.tokenizer))
        top, prompts, kind = self._read(request)
        if sampler.dry_multiplier:
            breaker_ids(model.tokenizer, sampler.dry_sequence_breakers)  # fills its cache in this thread, not the loop
        n = request.n or 1
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        one_request = object()
        jobs = [
            Job(
                prompt.ids,
                replace(
                    sampler, max_new_tokens=min(sampler.max_new_tokens, room_for(prompt, self._engine.context, param))
                ),
                steered.edit,
                key,
                prompt.begun,
                top,
                one_request,
            )
            for prompt in prompts
            for key in range(n)
        ]
        choices = [prompt for prompt in prompts for _ in range(n)]
        options = request.stream_options
        return RequestPlan(
            jobs,
            prompts,
            kind(request.model or self.name, model.tokenizer, choices, top is not None),
            steered,
            request.stop or [],
            bool(request.stream),
            bool(options and options.include_usage),
        )

    def _read(self, request: ChatRequest | CompletionRequest) -> tuple[int | None, list[Prompt], type[Shape]]:
        """Return the number of logprobs (None for none), the prompts, and the class that writes the response."""
        if isinstance(request, ChatRequest):
            if request.top_logprobs and not request.logprobs:
                raise invalid("top_logprobs", "logprobs true beside it", "none")
            top = (request.top_logprobs or 0) if request.logprobs else None
            return top, [chat_prompt(self._model, request)], ChatShape
        if request.suffix:
            raise invalid("suffix", "none, as gaps are not filled", "a text", "unsupported_value")
        if request.echo and request.logprobs is not None:
            raise invalid("echo", "no logprobs beside it, as a prompt's are not told", "both", "unsupported_value")
        return request.logprobs, completion_prompts(self._model, request, self._engine.context), CompletionShape

    async def _whole(self, http: HttpRequest, plan: RequestPlan, writing: Writing) -> Response:
        """Wait for all choices and return the whole reply, unless the client hangs up first."""
        choices: list[list[Update]] = [[] for _ in plan.jobs]
        problem = None
        async with _until_hung_up(http) as scope:
            try:
                async for update in writing.updates():
                    if update is not None:
                        choices[update.choice].append(update)
            except (SteerError, ApiError) as e:
                problem = e
            scope.cancel()
        if problem is not None:
            raise failed(problem)
        if not writing.finished:
            return self._client_left()
        extra = {"usage": usage(plan.prompts, writing.tokens), "steering": self._steering(plan, writing)}
        return JSONResponse(plan.shape.whole(choices, extra))

    async def _chunks(self, plan: RequestPlan, writing: Writing) -> AsyncIterator[bytes]:
        """Yield the reply as server-sent events. If usage is asked for, it is sent in an extra chunk at the end."""
        shape, last = plan.shape, {"usage": None} if plan.stream_usage else {}
        try:
            for chunk in shape.opening():
                yield _event(chunk | last)
            async for update in writing.updates():
                if update is None:
                    yield _PING
                elif writing.finished and not plan.stream_usage:
                    yield _event(shape.chunk(update, {"steering": self._steering(plan, writing)}))
                else:
                    yield _event(shape.chunk(update, last))
            if plan.stream_usage:
                last_fields = {"usage": usage(plan.prompts, writing.tokens), "steering": self._steering(plan, writing)}
                yield _event(shape.chunk(None, last_fields))
        except Exception as e:
            # The status has been sent already, so the error is sent as an event, as OpenAI's clients expect.
            yield _event(failed(e).body())
        yield _DONE

    def _steering(self, plan: RequestPlan, writing: Writing) -> dict[str, Any]:
        """Return the extension `steering` of a reply: its final sliders, what they did, and the seed to repeat it."""
        setting = plan.steered.setting
        receipts = writing.receipts
        warnings = [w for r in receipts if r is not None for w in r.warnings]
        receipt_rows = [without_nan(r.describe()) if r is not None else None for r in receipts]
        return {
            "profile": setting.profile,
            "live": plan.steered.live,
            "sliders": dict(setting.sliders),
            "seed": plan.jobs[0].sampler.seed,
            "receipt": receipt_rows[0] if len(receipt_rows) == 1 else receipt_rows,
            "warnings": list(dict.fromkeys([*setting.warnings(), *warnings])),
        }


@asynccontextmanager
async def _until_hung_up(http: HttpRequest) -> AsyncIterator[anyio.CancelScope]:
    """Cancel the block when the client hangs up. The block must cancel the yielded scope at its own end."""
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        yield tasks.cancel_scope


class _Stream(StreamingResponse):
    """A response of server-sent events that cancels its jobs however it ends."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], writing: Writing, metrics: Metrics) -> None:
        super().__init__(chunks, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._writing, self._metrics = writing, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._writing.finished and not self._writing.failed:
                self._metrics.hung_up.inc()
            self._writing.cancel()


def _event(chunk: dict[str, Any]) -> bytes:
    # ASCII only: some readers take a Unicode line separator in a text for the end of the event's line.
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
