"""One request for text, from its parsed body to its reply, whole or streamed; cancelled if its client hangs up.

The routes in `steer.serve.server` call `Replies.answer`. It plans the request (prompt, sampler, sliders, jobs),
submits the jobs through `steer.serve.writing`, and sends the updates as OpenAI's JSON.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from steer.core.edit import Edit
from steer.core.small_files import shown
from steer.errors import SteerError
from steer.model.sampling import breaker_ids
from steer.serve.engine import Engine, Job
from steer.serve.errors import ApiError, failed
from steer.serve.limits import Limits
from steer.serve.metrics import Metrics
from steer.serve.openai_json import ChatFormat, CompletionFormat, usage
from steer.serve.requests import (
    ChatRequest,
    CompletionRequest,
    Prompt,
    Steering,
    check,
    prompts_of,
    sampler_of,
    takes_tools,
    warnings_of,
)
from steer.serve.scoring import prompt_tokens
from steer.serve.steering import LiveSettings, Setting
from steer.serve.writing import Piece, Update, Writing

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

PLANNED = 4
"""How many requests are planned at the same time, each in a thread."""
KeepAlive = Literal["chunks", "comments"]
T = TypeVar("T")


@dataclass(frozen=True)
class RequestPlan:
    """The generation jobs that an HTTP request expands to, and how to turn their output into response chunks."""

    jobs: list[Job]
    prompts: list[Prompt]
    format: ChatFormat
    setting: Setting | None
    """The sliders of the request; None if it follows the live ones."""
    warnings: list[str]
    """What the request asks for and does not get."""


class Replies:
    """Answers requests for text from one model."""

    def __init__(
        self,
        model: SteeredModel,
        engine: Engine,
        settings: LiveSettings,
        metrics: Metrics,
        name: str,
        limits: Limits,
        any_name: bool = False,
        keep_alive: KeepAlive = "chunks",
    ) -> None:
        """`name`: the model's name for clients. `any_name`: whether unknown names mean it too."""
        self._model, self._engine, self._settings, self._metrics = model, engine, settings, metrics
        self._name, self._limits, self._any_name, self._keep_alive = name, limits, any_name, keep_alive
        # Planning (templates, tokenisation, looking up directions) runs in threads beside the event loop. Several
        # requests are planned at a time, so that one that takes seconds to tokenise does not delay the others.
        self._planning_limiter = anyio.CapacityLimiter(PLANNED)
        self._longest = max(map(len, model.tokenizer.get_vocab()), default=1)

    async def answer(self, http: HttpRequest, request: ChatRequest | CompletionRequest) -> Response:
        """Return the response to a request. Errors: ApiError."""
        plan = await _unless_hung_up(
            http, lambda: anyio.to_thread.run_sync(self._plan, request, limiter=self._planning_limiter)
        )
        if plan is None:
            return self._client_left()
        openings = [prompt.opening for prompt in plan.format.choices]
        ends = [self._model.end_text] if self._model.end_text and isinstance(request, ChatRequest) else []
        stop = [*(request.stop or ()), *ends]
        writing = Writing(self._engine, plan.jobs, openings, self._model.tokenizer, stop, self._metrics)
        self._metrics.prompt_tokens.inc(sum(len(p.ids) for p in plan.prompts))
        if request.stream:
            with_usage = bool(request.stream_options and request.stream_options.include_usage)
            return _Stream(self._chunks(plan, writing, with_usage), writing, self._metrics)
        try:
            reply = await _unless_hung_up(http, lambda: self._whole(plan, writing))
        except SteerError as e:
            raise failed(e) from e
        finally:
            writing.cancel()
        return reply or self._client_left()

    def _client_left(self) -> Response:
        self._metrics.hung_up.inc()
        return Response(status_code=499)  # nginx's code for a closed connection; only the metrics see it

    def profile_of(self, model: str | None) -> str | None:
        """Return the profile in a model's name, `noir` for `merged@noir`, or None for the plain model.

        Errors: ApiError for a model that the server does not have.
        """
        names = (self._name, self._model.name)
        if not model or model in names:
            return None
        base, _, profile = model.rpartition("@")
        if (base in names or self._any_name) and profile in self._settings.profiles:
            return profile
        if self._any_name and base not in names:
            return None
        known_names = ", ".join([self._name, *(f"{self._name}@{p}" for p in self._settings.profiles)])
        other = "" if self._any_name else ", or start the server with --any-model-name"
        message = f"model {shown(model)}: expected one of {known_names}; see GET /v1/models{other}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def _plan(self, request: ChatRequest | CompletionRequest) -> RequestPlan:
        model, limits, context = self._model, self._limits, self._engine.context
        check(request, limits, context, self._longest, takes_tools(model))
        setting = self._settings.setting_for(self.profile_of(request.model), request.steering or Steering())
        sampler = sampler_of(request, (setting or self._settings.live).sampler, limits, len(model.tokenizer), context)
        prompts = prompts_of(model, request, context)
        if sampler.dry_multiplier:
            breaker_ids(model.tokenizer, sampler.dry_sequence_breakers)  # fills its cache in this thread, not the loop

        def edit() -> Edit | None:
            return (setting or self._settings.live).sliders.current

        if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
            prompts = [replace(p, scored=prompt_tokens(model, p.ids, edit(), request.logprobs)) for p in prompts]
        if isinstance(request, ChatRequest):
            kind, top = ChatFormat, (request.top_logprobs or 0) if request.logprobs else None
        else:
            kind, top = CompletionFormat, request.logprobs
        one_request, n = object(), request.n or 1
        jobs = []
        for prompt in prompts:
            longest = min(sampler.max_new_tokens, context - len(prompt.ids))
            cut = replace(sampler, max_new_tokens=longest)
            jobs += [Job(prompt.ids, cut, edit, key, prompt.begun, top, one_request) for key in range(n)]
        choices = [prompt for prompt in prompts for _ in range(n)]
        shape = kind(request.model or self._name, model.tokenizer, choices, top is not None)
        return RequestPlan(jobs, prompts, shape, setting, warnings_of(model, request))

    async def _whole(self, plan: RequestPlan, writing: Writing) -> Response:
        """Return the whole reply once all choices have ended."""
        pieces: list[list[Piece]] = [[] for _ in plan.jobs]
        reasons = {}
        async for update in writing.updates():
            if update is not None:
                pieces[update.choice].append(update.piece)
                reasons[update.choice] = update.reason
        choices = [Update(i, _whole(parts), reasons[i]) for i, parts in enumerate(pieces)]
        summary = self._summary(plan, writing)
        return Response(
            await _formatted(plan, lambda: plan.format.whole(choices, summary)), media_type="application/json"
        )

    async def _chunks(self, plan: RequestPlan, writing: Writing, with_usage: bool) -> AsyncIterator[bytes]:
        """Yield the reply as server-sent events. If usage is asked for, it is sent in an extra chunk at the end."""
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            for chunk in await _formatted(plan, lambda: list(plan.format.opening(more))):
                yield _event(chunk)
            async for update in writing.updates():
                if update is None and self._keep_alive == "comments":
                    yield b": still here\n\n"
                    continue
                update = update or Update(next(c.number for c in writing.choices if c.open), Piece(""))
                if writing.finished and not with_usage:
                    more = {"steering": self._summary(plan, writing)["steering"]}
                yield _event(plan.format.chunk(update, more))
            if with_usage:
                yield _event(plan.format.chunk(None, self._summary(plan, writing)))
        except Exception as e:
            # The status has been sent already, so the error is sent as an event, as OpenAI's clients expect.
            yield _event(json.dumps(failed(e).body()))
        yield _event("[DONE]")

    def _summary(self, plan: RequestPlan, writing: Writing) -> dict[str, Any]:
        """Return what a reply reports at its end: its usage, and the extension `steering`, which holds its final
        sliders, what they did, and the seed to repeat it."""
        setting = plan.setting or self._settings.live
        receipts = [c.receipt for c in writing.choices]
        rows = [None if r is None else r.describe() for r in receipts]
        warnings = [note for prompt in plan.prompts for note in prompt.notes]
        warnings += [w for r in receipts if r is not None for w in r.warnings]
        steering = {
            "profile": setting.profile,
            "live": plan.setting is None,
            "sliders": dict(setting.sliders),
            "seed": plan.jobs[0].sampler.seed,
            "receipt": rows[0] if len(rows) == 1 else rows,
            "warnings": list(dict.fromkeys([*plan.warnings, *setting.warnings(), *warnings])),
        }
        return {"usage": usage(plan.prompts, sum(c.tokens for c in writing.choices)), "steering": steering}


async def _formatted(plan: RequestPlan, write: Callable[[], T]) -> T:
    """Return what `write` returns. The log-probabilities of long prompts take seconds to write, so a thread does it."""
    return await anyio.to_thread.run_sync(write) if any(p.scored for p in plan.prompts) else write()


async def _unless_hung_up(http: HttpRequest, work: Callable[[], Awaitable[T]]) -> T | None:
    """Return what `work` returns, or None if the client hangs up first, which cancels it. Errors: those of `work`."""
    result = problem = None
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            result = await work()
        except Exception as e:
            problem = e  # raised below, where the task group does not wrap it in an ExceptionGroup
        tasks.cancel_scope.cancel()
    if problem is not None:
        raise problem
    return result


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


def _whole(pieces: list[Piece]) -> Piece:
    tokens = tuple(t for p in pieces for t in p.tokens)
    return Piece("".join(p.text for p in pieces), tokens, "".join(p.thoughts for p in pieces))


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
