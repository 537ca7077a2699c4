"""Writing a reply in the background: the protocols of a backend and its replies, and the thread that runs a reply.

`steer.chat.local` and `steer.chat.remote` implement `ReplyBackend` and `PendingReply`. `steer.chat.talk` starts a
`Writer` for each reply, and the page polls it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from steer.chat.conversation import Ending, Message, SettingsSpan
from steer.core.sampler import Sampler
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.core.profile import Profile


@dataclass(frozen=True)
class Task:
    """A reply to write."""

    messages: tuple[dict[str, str], ...]
    """The chat to reply to, with the system prompt first if there is one."""
    sampler: Sampler
    """How tokens are drawn; its seed is the reply's seed."""
    text: str = ""
    """The text so far of a reply that is to be continued."""
    ids: tuple[int, ...] = ()
    """The token ids of `text`; empty if unknown."""
    nudge: bool = False
    """Whether the first token must not be an end token, because the model had ended the reply and is asked for more."""


class PendingReply(Protocol):
    """A reply that is being written. Used by one thread."""

    ending: Ending
    """Why the reply ended, after it has."""

    @property
    def text(self) -> str:
        """The text so far, including the text with which the task began; characters are complete."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens written so far."""
        ...

    def step(self) -> bool:
        """Write another token, or wait for one. Return False when the reply has ended. Errors: SteerError."""
        ...

    def close(self) -> None:
        """Free the reply's resources. Always called at the end, also after an error."""
        ...

    @property
    def ids(self) -> Sequence[int]:
        """All token ids of the reply; empty if unknown."""
        ...

    @property
    def stretches(self) -> Sequence[SettingsSpan]:
        """All slider settings that applied so far, in order."""
        ...

    def receipt(self) -> dict[str, Any] | None:
        """Return what the sliders did to the reply; None if unknown."""
        ...


class ReplyBackend(Protocol):
    """Writes the replies of one chat, with a model in this process or a server. It may hold the chat's KV cache."""

    name: str
    """The model's name."""
    can: frozenset[str]
    """The optional functions that it offers, of `inside`, `duel`, `bake`, `features`, `reread` and `reshape`."""
    felt: str
    """A sentence for the page: what a slider that moves during a reply does to it."""
    sliders: Any
    """Amounts by name, with the interface of `steer.model.sliders.Sliders`."""
    on: bool
    """If false, the sliders keep their amounts and move nothing."""
    left_out: int
    """How many messages at the beginning of the last chat did not fit into the context."""

    def draft(self, task: Task) -> PendingReply:
        """Begin a reply. Errors: SteerError for a chat that cannot be replied to; then nothing was begun."""
        ...

    def profile(self, name: str, sampler: Sampler) -> Profile:
        """Return the current sliders and a sampler as a profile. Errors: UsageError for a slider without a name."""
        ...

    def use(self, profile: Profile) -> None:
        """Set a profile's sliders and no others. Errors: SteerError."""
        ...

    def reread(self) -> None:
        """Read the whole chat again under the current sliders, before the next token."""
        ...

    def close(self) -> None:
        """Free the backend's resources."""
        ...


def as_chat(messages: Sequence[Message], system: str | None = None) -> tuple[dict[str, str], ...]:
    """Return messages in the form that chat templates expect, with alternating roles.

    Successive messages of the same role are joined into one. `system`: put first, if not empty.
    """
    out: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for m in messages:
        if out and out[-1]["role"] == m.role:
            out[-1] = {"role": m.role, "content": f"{out[-1]['content']}\n\n{m.text}"}
        else:
            out.append({"role": m.role, "content": m.text})
    return tuple(out)


_log = logging.getLogger(__name__)


class Writer:
    """Writes one draft at a time in a background thread. A page may poll it; the thread does not need the page."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._draft: PendingReply | None = None
        self._text = ""
        self._began = self._ended = 0.0
        self._first: float | None = None
        self.message_id: int | None = None
        """Id of the message that is being written, or was written last."""
        self.running = False
        """Whether a draft is being written."""
        self.error: str | None = None
        """What went wrong with the last reply, in one line; None if nothing did."""
        self.tokens = 0
        """Number of tokens written so far."""

    @property
    def text(self) -> str:
        """The text of the reply so far."""
        return self._text

    @property
    def seconds(self) -> float:
        """Seconds since the start of the draft, or from its start to its end."""
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
        on_text: Callable[[PendingReply], None] = lambda draft: None,
        on_end: Callable[[PendingReply], None] = lambda draft: None,
    ) -> None:
        """Start to write a draft and return at once.

        `on_text` is called in the writing thread after every token. `on_end` is called there once, after the reply has
        ended or failed: `error`, `seconds` and the rates are final then, and `running` is still true.

        Errors: SteerError while another draft is being written.
        """
        with self._news:
            if self.running:
                raise SteerError("a reply is being written; stop it first, or wait for its end")
            self.running, self.error, self.message_id = True, None, message_id
            self.tokens, self._text, self._first = 0, draft.text, None
            self._began = self._ended = time.monotonic()
            self._draft = draft
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._run, args=(draft, on_text, on_end), name="steer-writer", daemon=True
            )
        self._thread.start()

    def stop(self, wait: float | None = 30.0) -> bool:
        """Stop after the current token; the text so far stays. Return whether the thread ended in `wait` seconds."""
        self._stop.set()
        return self.wait(wait)

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called for this draft."""
        return self._stop.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the draft has ended. Return whether that happened in time."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(seconds)
            return not thread.is_alive()
        return not self.running

    def follow(self, every: float = 0.05) -> Iterator[str]:
        """Yield the text so far when it has grown, at most once in `every` seconds, until the draft has ended.

        Closing the generator does not stop the draft.
        """
        shown: str | None = None
        while True:
            with self._news:
                if self._text == shown and self.running:
                    self._news.wait(1.0)
                text, running = self._text, self.running
            if text != shown:
                yield text
                shown = text
            if not running:
                return
            time.sleep(every)

    def _run(
        self, draft: PendingReply, on_text: Callable[[PendingReply], None], on_end: Callable[[PendingReply], None]
    ) -> None:
        try:
            while not self._stop.is_set():
                more = draft.step()
                self._note(draft, on_text)
                if not more:
                    break
            else:
                draft.ending = "stopped"
        except Exception as e:
            self._fail(draft, e)
        try:
            draft.close()
            self._note(draft, on_text)
        except Exception as e:
            self._fail(draft, e)
        self._ended = time.monotonic()
        try:
            on_end(draft)
        except Exception as e:
            self._fail(draft, e)
        with self._news:
            # Drop the draft, so that its memory is freed: chats stay open for days.
            self.running, self._draft = False, None
            self._news.notify_all()

    def _note(self, draft: PendingReply, on_text: Callable[[PendingReply], None]) -> None:
        if draft.tokens and self._first is None:
            self._first = time.monotonic()
        on_text(draft)
        with self._news:
            self.tokens, self._text = draft.tokens, draft.text
            self._news.notify_all()

    def _fail(self, draft: PendingReply, e: Exception) -> None:
        draft.ending = "error"
        if not isinstance(e, SteerError):
            _log.exception("a reply could not be written")
        message = " ".join(str(e).split()) or "no word of why"
        self.error = (
            message if isinstance(e, SteerError) else f"the reply broke off: {type(e).__name__}: {message}"[:500]
        )
