"""One request from its body to its reply, whole or streamed, and what happens when its client hangs up."""

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

from steer.errors import SteerError
from steer.files import without_nan
from steer.live.dry import breaker_ids
from steer.live.serve.engine import Engine, Job
from steer.live.serve.errors import ApiError, failed, invalid
from steer.live.serve.limits import Limits
from steer.live.serve.metrics import Metrics
from steer.live.serve.prompts import Prompt, chat_prompt, check_size, completion_prompts, room_for, sampler_of
from steer.live.serve.schemas import ChatRequest, CompletionRequest
from steer.live.serve.shapes import ChatShape, CompletionShape, Shape, usage
from steer.live.serve.steering import Board, Steered
from steer.live.serve.writing import Update, Writing
from steer.values.small_files import shown

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

PLANNED = 4
"""Requests that are planned at a time."""
_PING = b": still here\n\n"
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Plan:
    """What a request comes to: jobs, and how their texts are told."""

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
        self, model: SteeredModel, engine: Engine, board: Board, metrics: Metrics, *, name: str, limits: Limits
    ) -> None:
        """`name`: the model's, as clients know it."""
        self._model, self._engine, self._board, self._metrics = model, engine, board, metrics
        self.name = name
        self._limits = limits
        # Templates, tokenisation and the library of directions, beside the event loop: for a few requests at a time, so
        # that one whose texts take seconds to tokenise keeps no other waiting.
        self._few = anyio.CapacityLimiter(PLANNED)
        self._longest = max(map(len, model.tokenizer.get_vocab()), default=1)

    async def answer(self, http: HttpRequest, request: ChatRequest | CompletionRequest) -> Response:
        """The reply. Errors: ApiError."""
        plan = await self._planned(http, request)
        if plan is None:
            return self._left()
        writing = Writing(self._engine, plan.jobs, self._model.tokenizer, plan.stop, self._metrics)
        self._metrics.prompt_tokens.inc(sum(len(p.ids) for p in plan.prompts))
        if plan.stream:
            return _Stream(self._chunks(plan, writing), writing, self._metrics)
        try:
            return await self._whole(http, plan, writing)
        finally:
            writing.cancel()

    async def _planned(self, http: HttpRequest, request: ChatRequest | CompletionRequest) -> Plan | None:
        """The plan; None where the client hung up before its turn came, which then costs nothing. Errors: ApiError."""
        plan: Plan | None = None
        problem: ApiError | None = None
        async with _until_hung_up(http) as scope:
            try:
                plan = await anyio.to_thread.run_sync(self._plan, request, limiter=self._few)
            except ApiError as e:
                problem = e
            scope.cancel()
        if problem is not None:
            raise problem
        return plan

    def _left(self) -> Response:
        self._metrics.hung_up.inc()
        return Response(status_code=499)  # nginx's number for it; nobody reads this, but metrics count it

    def profile_of(self, model: str | None) -> str | None:
        """The profile in the name of a model, as in `merged@noir`. Errors: ApiError for a model that is not here."""
        if not model or model in (self.name, self._model.name):
            return None
        base, at, profile = model.rpartition("@")
        if at and base in (self.name, self._model.name) and profile in self._board.profiles:
            return profile
        there = ", ".join([self.name, *(f"{self.name}@{p}" for p in self._board.profiles)])
        raise ApiError(
            404,
            f"model {shown(model)}: expected one of {there}; see GET /v1/models",
            param="model",
            code="model_not_found",
        )

    def _plan(self, request: ChatRequest | CompletionRequest) -> Plan:
        model, limits = self._model, self._limits
        check_size(request, limits, self._engine.context, self._longest)
        steered = self._board.steered(self.profile_of(request.model), request.steering)
        sampler = sampler_of(request, steered.setting.sampler, limits, len(model.tokenizer))
        top, prompts, kind = self._read(request)
        if sampler.dry_multiplier:
            breaker_ids(model.tokenizer, sampler.dry_sequence_breakers)  # here, beside the event loop
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
        return Plan(
            jobs,
            prompts,
            kind(request.model or self.name, model.tokenizer, choices, top is not None),
            steered,
            request.stop or [],
            bool(request.stream),
            bool(options and options.include_usage),
        )

    def _read(self, request: ChatRequest | CompletionRequest) -> tuple[int | None, list[Prompt], type[Shape]]:
        """How many logprobs are wanted, the prompts, and the kind of reply."""
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

    async def _whole(self, http: HttpRequest, plan: Plan, writing: Writing) -> Response:
        """The reply in one, unless its client hangs up first."""
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
            return self._left()
        told = {"usage": usage(plan.prompts, writing.tokens), "steering": self._steering(plan, writing)}
        return JSONResponse(plan.shape.whole(choices, told))

    async def _chunks(self, plan: Plan, writing: Writing) -> AsyncIterator[bytes]:
        """Server-sent events. With usage asked for, it comes in a chunk of its own behind the last choice."""
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
                told = {"usage": usage(plan.prompts, writing.tokens), "steering": self._steering(plan, writing)}
                yield _event(shape.chunk(None, told))
        except Exception as e:
            # The status is long sent: the error comes as an event, as OpenAI's clients expect.
            yield _event(failed(e).body())
        yield _DONE

    def _steering(self, plan: Plan, writing: Writing) -> dict[str, Any]:
        """The extension of a reply: what it went by at its end, what that did, and how to get it again."""
        setting = plan.steered.setting
        receipts = writing.receipts
        warnings = [w for r in receipts if r is not None for w in r.warnings]
        told = [without_nan(r.describe()) if r is not None else None for r in receipts]
        return {
            "profile": setting.profile,
            "live": plan.steered.live,
            "sliders": dict(setting.sliders),
            "seed": plan.jobs[0].sampler.seed,
            "receipt": told[0] if len(told) == 1 else told,
            "warnings": list(dict.fromkeys([*setting.warnings(), *warnings])),
        }


@asynccontextmanager
async def _until_hung_up(http: HttpRequest) -> AsyncIterator[anyio.CancelScope]:
    """Ends the block when the client hangs up. Cancel what it gives at the end of the block."""
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        yield tasks.cancel_scope


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends it, no job is left behind."""

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
    # In ASCII: a line separator in a text would end the line of the event for some readers.
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
