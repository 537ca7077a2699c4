"""The choices of one request while the engine writes them: its callbacks as an asynchronous stream of updates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from steer.errors import SteerError, UsageError
from steer.live.receipts import Receipt
from steer.live.serve.engine import Busy, Engine, Event, Finished, Handle, Job, Token
from steer.live.serve.errors import ApiError, busy
from steer.live.serve.metrics import Metrics, Stopwatch
from steer.live.serve.texts import Piece, ReplyText

Reason = Literal["stop", "length"]
PING = 15.0
"""Seconds of silence after which a stream says that it is still there."""


@dataclass(frozen=True)
class Update:
    """News of one choice."""

    choice: int
    piece: Piece
    reason: Reason | None = None
    """Why it ended; None while it goes on."""


class _Choice:
    def __init__(self, job: Job, text: ReplyText, metrics: Metrics) -> None:
        self.job, self.text, self.watch = job, text, Stopwatch(metrics)
        self.tokens = 0
        self.handle: Handle | None = None
        self.receipt: Receipt | None = None
        self.open = True


class Writing:
    """Jobs in the hands of an engine. Whoever makes one must `cancel` it in the end, come what may."""

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], tokenizer: Any, stop: Sequence[str], metrics: Metrics
    ) -> None:
        """To be called in the event loop. All jobs are taken, or none.

        Errors: ApiError, with status 429 when the queue is full.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[_Choice, Event]] = asyncio.Queue()
        self._metrics = metrics
        self.failed = False
        """Whether it ended with an error."""
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
        """What the sliders did, a choice each, once it ended."""
        return [c.receipt for c in self._choices]

    @property
    def tokens(self) -> int:
        """Written so far, the end tokens and those of a stop string among them."""
        return sum(c.tokens for c in self._choices)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return not any(c.open for c in self._choices)

    def cancel(self) -> None:
        """Stop what is still being written."""
        for choice in self._choices:
            if choice.open and choice.handle is not None:
                choice.handle.cancel()

    async def updates(self) -> AsyncIterator[Update | None]:
        """What happens, until every choice has ended; None after some seconds of silence. Errors: SteerError when the
        engine fails, ApiError when the server stops."""
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
            # The engine was told; these were under way.
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
        # What was held back may have held a stop string by now.
        stopped = stopped or choice.text.stopped
        reason: Reason = "length" if event.reason == "length" and not stopped else "stop"
        return Update(self._choices.index(choice), piece, reason)

    def _listener(self, choice: _Choice) -> Any:
        def on_event(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

        return on_event
