"""The choices of one request while the engine writes them: from the engine's tokens to text that can be sent.

`ReplyText` makes whole characters of tokens and finds stop strings. `Writing` submits a request's jobs and turns the
engine's callbacks into an asynchronous stream of updates, which `steer.serve.replies` sends to the client.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from steer.core.stops import begun, find_stop
from steer.core.thoughts import ThoughtSplitter
from steer.errors import SteerError, UsageError
from steer.model.chat_template import marks_of
from steer.model.steering.receipts import Receipt
from steer.model.tokens import Detokeniser
from steer.serve.engine import Busy, Engine, Event, Finished, Job, Token
from steer.serve.errors import ApiError
from steer.serve.metrics import Metrics

Reason = Literal["stop", "length"]
PING = 15.0
"""Seconds without an update after which a stream sends a keep-alive."""


@dataclass(frozen=True)
class TokenText:
    """A written token and its place in the reply's text."""

    token: Token
    start: int
    """Place of the token's first character, in characters from the start of the reply. For a token inside a character,
    the place of that character."""


@dataclass(frozen=True)
class Piece:
    """Text that is final, and the tokens that begin in it."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    thoughts: str = ""
    """Text of the thoughts before the answer, where these are split off."""


class ReplyText:
    """The text of one reply, built token by token.

    A piece never ends within a character. Text that may be the beginning of a stop string is held back until that is
    decided. The reply ends before the first complete stop string, so no piece contains any part of one.

        text = ReplyText(tokenizer, prompt, stop=["\\n\\n"])
        for token in tokens:
            print(text.add(token).text, end="")
        print(text.end().text)
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = (), opening: str | None = None
    ) -> None:
        """`tokenizer`: a transformers tokenizer with a fast backend. `prompt`: the token ids before the reply.
        `opening`: what the reply has of thoughts already, if these are to be split off; see `Prompt`."""
        self._decoder = Detokeniser(tokenizer, prompt)
        self._splitter = None if opening is None else ThoughtSplitter(marks_of(tokenizer), opening)
        self._stop = tuple(stop)
        self._held = ""
        self._sent = 0
        self._tokens: list[TokenText] = []
        self.stopped = False
        """Whether a stop string has ended the reply; later tokens are ignored."""

    def add(self, token: Token) -> Piece:
        """Add a token and return the text that can be sent now. An end token adds nothing."""
        if self.stopped or token.end:
            return Piece("")
        self._tokens.append(TokenText(token, self._sent + len(self._held)))
        return self._take(self._decoder.add(token.id))

    def end(self) -> Piece:
        """Return the text that was held back; no more tokens follow."""
        return Piece("") if self.stopped else self._take(self._decoder.end(), last=True)

    def _take(self, text: str, last: bool = False) -> Piece:
        self._held += text
        cut = find_stop(self._held, self._stop)
        self.stopped = cut is not None
        if cut is None:
            cut = len(self._held) if last else len(self._held) - begun(self._held, self._stop)
        out, self._held = self._held[:cut], "" if self.stopped else self._held[cut:]
        self._sent += len(out)
        # A token that only begins a character is reported together with that character.
        ready = [t for t in self._tokens if t.start < self._sent or (last and not self.stopped)]
        self._tokens = self._tokens[len(ready) :]
        if self._splitter is None:
            return Piece(out, tuple(ready))
        split = [self._splitter.add(out), *([self._splitter.end()] if last or self.stopped else [])]
        return Piece("".join(s[1] for s in split), tuple(ready), "".join(s[0] for s in split))


@dataclass(frozen=True)
class Update:
    """New text of one choice, and why the choice ended if it did."""

    choice: int
    piece: Piece
    reason: Reason | None = None
    """None while the choice goes on."""


@dataclass(eq=False)
class Choice:
    """One text of a request while it is written."""

    number: int
    text: ReplyText
    since: float = field(default_factory=time.perf_counter)
    """When its last token came, or else when its job was submitted."""
    tokens: int = 0
    """How many were written, including an end token and the tokens of a stop string."""
    cancel: Callable[[], None] = lambda: None
    receipt: Receipt | None = None
    """What the sliders did; None until the choice has ended."""
    open: bool = True


class Writing:
    """Submits the jobs of one request to an engine and collects their events.

    The caller must call `cancel` in the end, also after an error. It does nothing to jobs that have ended.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        openings: Sequence[str | None],
        tokenizer: Any,
        stop: Sequence[str],
        metrics: Metrics,
    ) -> None:
        """Submit all jobs, or none if one is refused. Must be called in the event loop. `openings`: of each job, as
        `ReplyText` takes it.

        Errors: ApiError, with status 429 when the queue is full.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()
        self._metrics = metrics
        self.failed = False
        """Whether the request ended with an error."""
        self.choices = [
            Choice(i, ReplyText(tokenizer, job.prompt, stop, opening))
            for i, (job, opening) in enumerate(zip(jobs, openings, strict=True))
        ]
        try:
            for choice, job in zip(self.choices, jobs, strict=True):
                choice.cancel = engine.submit(job, partial(self._receive, choice))
        except Busy as e:
            self.cancel()
            after = str(max(1, math.ceil(e.retry_after)))
            raise ApiError(429, str(e), code="queue_full", headers={"Retry-After": after}) from e
        except SteerError as e:
            self.cancel()
            raise ApiError(400 if isinstance(e, UsageError) else 503, str(e), code="not_taken") from e

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return not any(c.open for c in self.choices)

    def cancel(self) -> None:
        """Cancel every job that has not ended."""
        for choice in self.choices:
            if choice.open:
                choice.cancel()

    async def updates(self) -> AsyncIterator[Update | None]:
        """Yield updates until every choice has ended, and None after PING seconds without one.

        Errors: SteerError when the engine fails, ApiError when the server stops.
        """
        while not self.finished:
            try:
                async with asyncio.timeout(PING):  # wait_for makes a task of every token
                    choice, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                choice.open, self.failed = False, True
                raise event
            update = self._finish(choice, event) if isinstance(event, Finished) else self._write(choice, event)
            if update.piece.text or update.piece.thoughts or update.piece.tokens or update.reason:
                yield update

    def _receive(self, choice: Choice, event: Event) -> None:
        with suppress(RuntimeError):  # the event loop is closed, so nobody reads the events
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

    def _write(self, choice: Choice, token: Token) -> Update:
        if choice.text.stopped:  # the job is cancelled already; this token was on its way
            return Update(choice.number, Piece(""))
        now = time.perf_counter()
        self._metrics.token(now - choice.since, first=not choice.tokens)
        choice.since, choice.tokens = now, choice.tokens + 1
        piece = choice.text.add(token)
        if choice.text.stopped:
            choice.cancel()
        return Update(choice.number, piece)

    def _finish(self, choice: Choice, event: Finished) -> Update:
        choice.open, choice.receipt = False, event.receipt
        if event.reason == "cancelled" and not choice.text.stopped:
            self.failed = True
            raise ApiError(503, "the server is stopping; this reply is not whole", code="stopping")
        # The text that was held back may complete a stop string.
        piece = choice.text.end()
        stopped = choice.text.stopped or event.reason != "length"
        return Update(choice.number, piece, "stop" if stopped else "length")
