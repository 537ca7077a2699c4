"""The seam between the server and what makes its tokens: values and two protocols, nothing else.

The server turns a request into jobs, one a choice, and hears of each through a callback; it knows of no batch, cache or
scheduler. Whatever has `submit` can stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from steer.errors import SteerError
from steer.values.edit import Edit
from steer.values.sampler import Sampler

if TYPE_CHECKING:
    from steer.live.receipts import Receipt


@dataclass(frozen=True)
class Job:
    """One text to be written."""

    prompt: tuple[int, ...]
    """Token ids, the BOS included where the model wants one."""
    sampler: Sampler
    """Its `max_new_tokens` ends the text, its `seed` with `key` is the random stream."""
    edit: Callable[[], Edit | None]
    """Asked before every token, in the engine's thread: sliders that move are felt by replies that are running."""
    key: int = 0
    """The random stream within the seed: choices of one request differ by it."""
    begun: int = 0
    """How many tokens at the end of the prompt belong to the reply already: one that is continued."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens to tell at each step, 0 for the chosen one alone; None for no logprobs."""
    request: object = field(default_factory=object)
    """The same object for all jobs of one request, which share what one request may take while others wait."""


@dataclass(frozen=True)
class Token:
    """A token was written."""

    id: int
    logprob: float | None
    """Natural logarithm of its probability before any sampler stage; None unless the job asked for logprobs."""
    top: tuple[tuple[int, float], ...]
    """(token, logprob), the likeliest first."""
    end: bool
    """Whether it is one of the model's end tokens."""


@dataclass(frozen=True)
class Finished:
    """Nothing more comes for this job."""

    reason: Literal["stop", "length", "cancelled"]
    """`stop`: an end token. `length`: the sampler's `max_new_tokens`, or the context."""
    receipt: Receipt | None
    """What its sliders did; None where none was moved."""


Event = Token | Finished | SteerError
"""A SteerError ends a job as `Finished` does."""


class Busy(SteerError):
    """The queue is full."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which there is likely to be room."""


class Handle(Protocol):
    """A job that was taken."""

    def cancel(self) -> None:
        """Stop writing, within a token. `Finished("cancelled")` follows, unless the job ended by itself. From any
        thread, any number of times; returns at once."""
        ...


class Engine(Protocol):
    """What writes texts for many at once."""

    @property
    def context(self) -> int:
        """Tokens of a prompt and its reply together, at most."""
        ...

    @property
    def problem(self) -> str | None:
        """Why no job can be taken any more, in one line; None while they can."""
        ...

    @property
    def running(self) -> int:
        """Jobs being written."""
        ...

    @property
    def waiting(self) -> int:
        """Jobs that were taken and are not begun."""
        ...

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Handle:
        """Take a job; returns at once. `on_event` is called from the engine's thread, a Token at a time, then once
        with what ended it.

        Errors: Busy when the queue is full, UsageError for a job that can never fit.
        """
        ...

    def close(self) -> None:
        """End what is running and the engine's thread. Jobs hear `Finished("cancelled")`."""
        ...
