"""The choices of one request while the engine writes them: engine callbacks become an asynchronous stream of updates.

`steer.serve.replies` makes a `Writing` from a request's jobs and sends its updates to the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from steer.errors import SteerError, UsageError
from steer.model.steering.receipts import Receipt
from steer.serve.engine import Busy, Engine, Event, Finished, Handle, Job, Token
from steer.serve.errors import ApiError, busy
from steer.serve.metrics import Metrics, RequestTimer
from steer.serve.texts import Piece, ReplyText

Reason = Literal["stop", "length"]
PING = 15.0
"""Seconds without an update after which a stream sends a keep-alive comment."""


@dataclass(frozen=True)
class Update:
    """New text of one choice, and why the choice ended if it did."""

    choice: int
    piece: Piece
    reason: Reason | None = None
    """Why the choice ended; None while it goes on."""


class _Choice:
    def __init__(self, job: Job, text: ReplyText, metrics: Metrics) -> None:
        self.job, self.text, self.watch = job, text, RequestTimer(metrics)
        self.tokens = 0
        self.handle: Handle | None = None
        self.receipt: Receipt | None = None
        self.open = True


class Writing:
    """Submits the jobs of one request to an engine and collects their events.

    The caller must call `cancel` in the end, also after an error. It does nothing to jobs that have ended.
    """

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], tokenizer: Any, stop: Sequence[str], metrics: Metrics
    ) -> None:
        """Submit all jobs, or none if one is refused. Must be called in the event loop.

        Errors: ApiError, with status 429 when the queue is full.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[_Choice, Event]] = asyncio.Queue()
        self._metrics = metrics
        self.failed = False
        """Whether the request ended with an error."""
        self._choices = [_Choice(job, ReplyText(tokenizer, job.prompt, stop), metrics) for job in jobs]
        try:
            for choice in self._choices:
                choice.handle = engine.submit(choice.job, self._listener(choice))
        except SteerError as e:
            self.cancel()
            if isinstance(e, Busy):
                raise busy(e) from e
            status = 400 if isinstance(e, UsageError) else 503
            raise ApiError(status, str(e), code="not_taken") from e

    @property
    def receipts(self) -> list[Receipt | None]:
        """What the sliders did, one entry per choice; None until the choice has ended."""
        return [c.receipt for c in self._choices]

    @property
    def tokens(self) -> int:
        """Tokens written so far in all choices, including end tokens and the tokens of stop strings."""
        return sum(c.tokens for c in self._choices)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return not any(c.open for c in self._choices)

    def cancel(self) -> None:
        """Cancel every job that has not ended."""
        for choice in self._choices:
            if choice.open and choice.handle is not None:
                choice.handle.cancel()

    async def updates(self) -> AsyncIterator[Update | None]:
        """Yield updates until every choice has ended, and None after PING seconds without one.

        Errors: SteerError when the engine fails, ApiError when the server stops.
        """
        while not self.finished:
            try:
                choice, event = await asyncio.wait_for(self._events.get(), PING)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                choice.open, self.failed = False, True
                raise event
            update = self._finish(choice, event) if isinstance(event, Finished) else self._write(choice, event)
            if update.piece.text or update.piece.tokens or update.reason:
                yield update

    def _write(self, choice: _Choice, token: Token) -> Update:
        index = self._choices.index(choice)
        if choice.text.stopped:
            # The job is cancelled already; this token was on its way.
            return Update(index, Piece(""))
        choice.tokens += 1
        choice.watch.token()
        piece = choice.text.add(token)
        if choice.text.stopped and choice.handle is not None:
            choice.handle.cancel()
        return Update(index, piece)

    def _finish(self, choice: _Choice, event: Finished) -> Update:
        choice.open, choice.receipt = False, event.receipt
        stopped, piece = choice.text.stopped, choice.text.end()
        if event.reason == "cancelled" and not stopped:
            self.failed = True
            raise ApiError(503, "the server is stopping; this reply is not whole", code="stopping")
        # The text that was held back may have completed a stop string.
        stopped = stopped or choice.text.stopped
        reason: Reason = "length" if event.reason == "length" and not stopped else "stop"
        return Update(self._choices.index(choice), piece, reason)

    def _listener(self, choice: _Choice) -> Any:
        def on_event(event: Event) -> None:
            with suppress(RuntimeError):  # the event loop is closed, so nobody reads the events
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

        return on_event
