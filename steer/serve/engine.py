"""The interface between the HTTP server and the engine that makes tokens: values and one protocol, nothing else.

The server turns a request into jobs, one per choice, and receives the events of each job through a callback. It knows
nothing of batches, caches or schedulers. Any object with the methods of `Engine` can serve it;
`steer.serve.batching.BatchingEngine` is the one that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.model.steering.receipts import Receipt


@dataclass(frozen=True)
class Job:
    """One text to write: a prompt, a sampler, and the sliders to apply."""

    prompt: tuple[int, ...]
    """Token ids, including the BOS if the model expects one."""
    sampler: Sampler
    """`max_new_tokens` limits the text; `seed` and `key` select the random stream."""
    edit: Callable[[], Edit | None]
    """Called before every token, in the engine's thread, so that a slider that moves affects replies in progress."""
    key: int = 0
    """Number of the random stream within the seed; the choices of one request have different keys."""
    begun: int = 0
    """How many tokens at the end of the prompt are the beginning of the reply; 0 unless a reply is continued."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens to report at each step; 0 for the chosen one alone, None for no logprobs."""
    request: object = field(default_factory=object)
    """The same object for all jobs of one HTTP request. They share the places and pages that one request may take."""


@dataclass(frozen=True)
class Token:
    """Event: a token was written."""

    id: int
    logprob: float | None
    """Natural logarithm of its probability before any sampler stage; None unless the job asked for logprobs."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the likeliest tokens, the likeliest first."""
    end: bool
    """Whether the token is one of the model's end tokens."""


@dataclass(frozen=True)
class Finished:
    """Event: the job has ended; no further event follows."""

    reason: Literal["stop", "length", "cancelled"]
    """`stop`: an end token. `length`: the sampler's `max_new_tokens`, or the context."""
    receipt: Receipt | None
    """What the sliders did to the text; None if no slider moved anything."""


Event = Token | Finished | SteerError
"""What a job's callback receives. A SteerError ends the job, as `Finished` does."""


class Busy(SteerError):
    """The queue is full; the job was not accepted. There is likely to be room after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Engine(Protocol):
    """Writes texts for many jobs at once."""

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its reply together."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the engine accepts no more jobs, in one line; None while it accepts them."""
        ...

    @property
    def running(self) -> int:
        """Number of jobs that are being written."""
        ...

    @property
    def waiting(self) -> int:
        """Number of jobs that were accepted and have not begun."""
        ...

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Callable[[], None]:
        """Accept a job and return at once, with the function that cancels it.

        `on_event` is called from the engine's thread: once per Token, then once with the Finished or SteerError that
        ends the job. Cancelling stops the job after the current token; `Finished("cancelled")` follows unless it has
        ended by itself. It may be called from any thread, any number of times.

        Errors: Busy when the queue is full, UsageError for a job that can never fit, SteerError after `close`.
        """
        ...

    def close(self) -> None:
        """Cancel all jobs and end the engine's thread. Every open job receives `Finished("cancelled")`."""
        ...
