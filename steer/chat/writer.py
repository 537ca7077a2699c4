"""Writing a reply: the interface of backends and of the replies that they write, and the thread that runs a reply.

`steer.chat.local` and `steer.chat.remote` implement `ReplyBackend` and `PendingReply`. A `Session` runs its replies
itself; the page's `Chat` starts a `Writer` for each, and the page polls it.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from steer.chat.conversation import Ending, Message, SettingsSpan, Written
from steer.core.profile import Profile
from steer.core.sampler import Sampler
from steer.core.thoughts import THINK, ThoughtMarks
from steer.errors import SteerError
from steer.files import one_line
from steer.model.chat_template import joined
from steer.model.steering.receipts import Receipt

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Task:
    """A reply to write."""

    messages: Messages
    """The chat to reply to, with the system prompt first if there is one."""
    sampler: Sampler
    """How tokens are drawn; its seed is the reply's seed."""
    text: str = ""
    """The text so far of a reply that is to be continued."""
    ids: tuple[int, ...] = ()
    """The token ids of `text`; empty if unknown."""
    nudge: bool = False
    """Whether the first token must not be an end token, because the model had ended the reply and is asked for more."""


class PendingReply(ABC):
    """A reply that is being written. Used by one thread."""

    ending: Ending = "length"
    """Why the reply ended, after it has."""

    def __init__(self, text: str = "", ids: Sequence[int] = ()) -> None:
        self.text = text
        """The text so far, including the text with which the task began; characters are complete."""
        self.ids = list(ids)
        """All token ids of the reply; empty if unknown."""
        self.tokens = 0
        """Number of tokens written so far."""
        self.prompt_tokens: int | None = None
        """Number of tokens before the reply; None if unknown."""
        self.stretches: list[SettingsSpan] = []
        """All slider settings that applied so far, in order."""

    @abstractmethod
    def step(self) -> bool:
        """Write another token, or wait for one. Return False when the reply has ended. Errors: SteerError."""

    @abstractmethod
    def close(self) -> None:
        """Free the reply's resources. Always called at the end, also after an error."""

    def rest(self) -> str:
        """Return the incomplete character at the end, as U+FFFD, of a reply that nobody will continue; often empty."""
        return ""

    def receipt(self) -> Receipt | None:
        """Return what the sliders did to the reply; None if unknown."""
        return None


class ReplyBackend(ABC):
    """Writes the replies of one chat, with a model in this process or a server. It may hold the chat's KV cache."""

    local: ClassVar[bool]
    """Whether the model is in this process. A server offers no comparisons, readouts, features and bakes."""
    slider_note: str
    """A sentence for the page: what a slider that moves during a reply does to it."""
    name: str
    """The model's name."""
    sliders: Any
    """Amounts by name, with the interface of `steer.model.sliders.Sliders`."""
    finds = False
    """Whether it can search for new sliders."""
    on = True
    """If false, the sliders keep their amounts and move nothing."""
    marks: ThoughtMarks = THINK
    """The marks around thoughts in its replies."""
    left_out = 0
    """How many messages at the beginning of the last chat did not fit into the context."""

    @property
    def context(self) -> int | None:
        """How many tokens the model can read; None if unknown."""
        return None

    def count(self, text: str) -> int:
        """Return how many tokens a text has; by default an estimate, one for four characters."""
        return -(-len(text) // 4)

    @abstractmethod
    def draft(self, task: Task) -> PendingReply:
        """Begin a reply. Errors: SteerError for a chat that cannot be replied to; then nothing was begun."""

    @abstractmethod
    def profile(self, name: str, sampler: Sampler) -> Profile:
        """Return the current sliders and a sampler as a profile. Errors: UsageError for a slider without a name."""

    @abstractmethod
    def use(self, profile: Profile) -> None:
        """Set a profile's sliders and no others. Errors: SteerError."""

    @abstractmethod
    def reread(self) -> None:
        """Read the whole chat again under the current sliders, before the next token."""

    @abstractmethod
    def close(self) -> None:
        """Free the backend's resources."""


def as_chat(messages: Sequence[Message], system: str | None = None) -> Messages:
    """Return messages in the form that chat templates expect, with alternating roles.

    Successive messages of the same role are joined into one. `system`: put first, if not empty.
    """
    written = [{"role": m.role, "content": m.text} for m in messages]
    return tuple(joined([{"role": "system", "content": system}, *written] if system else written))


_log = logging.getLogger(__name__)
_Callback = Callable[[PendingReply], None]


class Writer:
    """Writes one reply at a time in a background thread. A page may poll it; the thread does not need the page."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = self._ended = 0.0
        self._first: float | None = None
        self.message_id: int | None = None
        """Id of the message that is being written, or was written last."""
        self.running = False
        """Whether a reply is being written."""
        self.error: str | None = None
        """What went wrong with the last reply, in one line; None if nothing did."""
        self.tokens = 0
        """Number of tokens written so far."""

    @property
    def seconds(self) -> float:
        """Seconds since the start of the reply, or from its start to its end."""
        return (time.monotonic() if self.running else self._ended) - self._began

    @property
    def first_token(self) -> float | None:
        """Seconds from the start to the first token; None before it."""
        return None if self._first is None else self._first - self._began

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token; None before the second."""
        if self._first is None or self.tokens < 2:
            return None
        passed = (time.monotonic() if self.running else self._ended) - self._first
        return (self.tokens - 1) / passed if passed > 0 else None

    def start(
        self,
        draft: PendingReply,
        message_id: int | None = None,
        *,
        on_text: _Callback = lambda draft: None,
        on_end: _Callback = lambda draft: None,
    ) -> None:
        """Start to write a reply and return at once.

        `on_text` is called in the writing thread after every token. `on_end` is called there once, after the reply has
        ended or failed: `error`, `seconds` and the rates are final then, and `running` is still true.

        Errors: SteerError while another reply is being written.
        """
        with self._starting:
            if self.running:
                raise SteerError("a reply is being written; stop it first, or wait for its end")
            self.running, self.error, self.message_id = True, None, message_id
            self.tokens, self._first = 0, None
            self._began = self._ended = time.monotonic()
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._run, args=(draft, on_text, on_end), name="steer-writer", daemon=True
            )
            self._thread.start()

    def stop(self, wait: float | None = 30.0) -> bool:
        """Stop after the current token; the text so far stays. Return whether the thread ended in `wait` seconds."""
        self._stop.set()
        return self.wait(wait)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the reply has ended. Return whether that happened in time."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(seconds)
        return not self.running

    def record(
        self, seed: int, spans: Sequence[SettingsSpan], ids: Sequence[int], receipt: Receipt | None, ending: Ending
    ) -> Written:
        """Return how the last reply, or one of several that were written together, was written."""
        return Written(
            seed, spans[-1].profile if spans else None, tuple(spans), tuple(ids),
            None if receipt is None else receipt.describe(), ending, self.seconds, self.first_token, self.rate,
        )  # fmt: skip

    def _run(self, draft: PendingReply, on_text: _Callback, on_end: _Callback) -> None:
        with self._reported(draft):
            more = True
            while more and not self._stop.is_set():
                more = draft.step()
                self.tokens = draft.tokens
                if self.tokens and self._first is None:
                    self._first = time.monotonic()
                on_text(draft)
            if more:
                draft.ending = "stopped"
        with self._reported(draft):
            draft.close()
        self._ended = time.monotonic()
        with self._reported(draft):
            on_end(draft)
        self.running = False

    @contextmanager
    def _reported(self, draft: PendingReply) -> Iterator[None]:
        """Put an error of the block into `error`, in one line."""
        try:
            yield
        except Exception as e:
            draft.ending = "error"
            self.error = " ".join(str(e).split())
            if not isinstance(e, SteerError):
                _log.exception("a reply could not be written")
                self.error = f"the reply broke off: {type(e).__name__}: {one_line(e)}"
