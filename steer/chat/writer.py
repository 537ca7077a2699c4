"""The background thread that writes a reply, whoever may be watching, or nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from steer.chat.voice import Draft
from steer.errors import SteerError

_log = logging.getLogger(__name__)


class Writer:
    """Writes one draft at a time in a thread of its own. A page looks at it as often as it likes, and may go away."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._draft: Draft | None = None
        self._text = ""
        self._began = self._ended = 0.0
        self._first: float | None = None
        self.message_id: int | None = None
        """The message that is being written, or was the last time."""
        self.running = False
        """Whether it is at work."""
        self.error: str | None = None
        """What went wrong with the last reply, in a line."""
        self.tokens = 0
        """Written so far."""

    @property
    def text(self) -> str:
        """The reply so far."""
        return self._text

    @property
    def seconds(self) -> float:
        """How long it has been, or was, at work."""
        return (time.monotonic() if self.running else self._ended) - self._began

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token was there; None before."""
        return None if self._first is None else self._first - self._began

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one; None before the second."""
        if self._first is None or self.tokens < 2:
            return None
        passed = (time.monotonic() if self.running else self._ended) - self._first
        return (self.tokens - 1) / passed if passed > 0 else None

    def start(
        self,
        draft: Draft,
        message_id: int | None = None,
        *,
        on_text: Callable[[Draft], None] = lambda draft: None,
        on_end: Callable[[Draft], None] = lambda draft: None,
    ) -> None:
        """Write a draft; returns at once. `on_text` and `on_end` are called in the thread that writes, the latter once
        with whatever there is by then, when `error` and the figures are known and `running` still holds.

        Errors: SteerError while another one is being written.
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
        """Stop after the token that is being made; what is there by then is kept. Whether it has stopped in time."""
        self._stop.set()
        return self.wait(wait)

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stop.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end. Whether it came in time."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(seconds)
            return not thread.is_alive()
        return not self.running

    def follow(self, every: float = 0.05) -> Iterator[str]:
        """The text so far each time it has grown, `every` seconds at most, until it is done. To stop looking stops
        nothing."""
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

    def _run(self, draft: Draft, on_text: Callable[[Draft], None], on_end: Callable[[Draft], None]) -> None:
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
            # Nothing of a reply is held once it is written: chats stay open for days.
            self.running, self._draft = False, None
            self._news.notify_all()

    def _note(self, draft: Draft, on_text: Callable[[Draft], None]) -> None:
        if draft.tokens and self._first is None:
            self._first = time.monotonic()
        on_text(draft)
        with self._news:
            self.tokens, self._text = draft.tokens, draft.text
            self._news.notify_all()

    def _fail(self, draft: Draft, e: Exception) -> None:
        draft.ending = "error"
        if not isinstance(e, SteerError):
            _log.exception("a reply could not be written")
        told = " ".join(str(e).split()) or "no word of why"
        self.error = told if isinstance(e, SteerError) else f"the reply broke off: {type(e).__name__}: {told}"[:500]
