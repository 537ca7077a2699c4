"""A new slider on a model behind `steer serve --allow-find`: the server searches, and this process polls it.

`steer.finding.new_slider` is its counterpart for a model of this process.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, ValidationError

from steer.chat.remote import RemoteBackend
from steer.chat.writer import PendingReply, ReplyBackend
from steer.core.sampler import Sampler
from steer.core.small_files import shown
from steer.core.trait import Trait
from steer.errors import SteerError
from steer.jobs import LatestPerSubject
from steer.model.loaded import Message

POLL = 0.5
"""Seconds for which the server's answer about a search is cached."""
_PATH = "/steering/sliders"


class _Answer(BaseModel):
    """A search, as the server describes it."""

    id: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    status: Literal["running", "done", "failed", "cancelled"]
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    error: str | None = None
    verdict: dict[str, Any] | None = None


class RemoteSearch(LatestPerSubject):
    """A search for a new slider that a server runs, with the attributes of `NewSliderJob` that the page uses. Its
    subject is a `RemoteBackend`.

    Example:
        search = RemoteSearch.start(backend, Trait.from_sentences("You answer in rhyming couplets.", name="rhymes"))
        while search.running:
            print(search.progress)
    """

    def __init__(self, backend: ReplyBackend, trait: Trait) -> None:
        """See `start`."""
        self.trait = trait
        self._backend = cast(RemoteBackend, backend)
        self._began = self._asked = time.monotonic()
        wanted = {"sentence": trait.with_instruction, "opposite": trait.without_instruction, "name": trait.name}
        self._answer = self._ask("post", _PATH, wanted)

    @classmethod
    def start(cls, backend: ReplyBackend, trait: Trait) -> RemoteSearch:
        """Ask the server to search for a trait's direction.

        Errors: SteerError with the server's reason: it allows no searches, runs another, or has a slider of that name.
        """
        return cls.begin(backend, backend, trait)

    @classmethod
    def key(cls, subject: ReplyBackend) -> str:
        """Return the server's address."""
        return cast(RemoteBackend, subject).url

    @classmethod
    def latest(cls, subject: ReplyBackend) -> RemoteSearch | None:
        """Return the search on a server that this process started last, running or ended; None if there is none."""
        search = super().latest(subject)
        if search is not None:
            search._backend = cast(RemoteBackend, subject)  # that of the chat which started it may be closed
        return search

    @property
    def running(self) -> bool:
        """Whether the server still searches; it is asked, if its last answer is older than `POLL`."""
        if self._answer.status == "running" and time.monotonic() - self._asked > POLL:
            try:
                self._answer = self._ask("get", self._place)
            except SteerError as e:
                self._answer = self._answer.model_copy(update={"status": "failed", "error": str(e)})
            self._asked = time.monotonic()
            if self._answer.status == "done":
                self._backend.forget_offered()
        return self._answer.status == "running"

    @property
    def done(self) -> bool:
        """Whether the slider was made."""
        return not self.running and self._answer.status == "done"

    @property
    def failed(self) -> bool:
        """Whether the search ended without a slider, other than by `cancel`."""
        return not self.running and self._answer.status == "failed"

    @property
    def progress(self) -> float:
        """How much is done, from 0 to 1."""
        return self._answer.progress

    @property
    def error(self) -> str | None:
        """Why no slider was made, in one line; None before that."""
        return self._answer.error

    @property
    def result(self) -> dict[str, Any] | None:
        """What was measured of the slider, under "verdict"; None before that."""
        return None if self._answer.verdict is None else {"verdict": self._answer.verdict}

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    name = property(lambda self: self.trait.name, doc="The slider's name.")
    sentence = property(lambda self: self.trait.with_instruction, doc="The instruction at the high end.")
    opposite = property(lambda self: self.trait.without_instruction, doc="The opposite sentence, or None.")

    def cancel(self) -> None:
        """Stop the search. Errors: SteerError if the server does not answer."""
        self._answer = self._ask("delete", self._place)

    def delete(self) -> None:
        """Make `latest` return None, once the user has seen how the search ended."""
        self.forget(self._backend)

    @property
    def _place(self) -> str:
        return f"{_PATH}/{self._answer.id}"

    def _ask(self, method: Literal["get", "post", "delete"], path: str, body: Any = None) -> _Answer:
        found = self._backend.ask(method, path, body)
        try:
            return _Answer.model_validate(found)
        except ValidationError as e:
            message = f"{self._backend.url}: expected the state of a search, found {shown(found)}; is it steer serve?"
            raise SteerError(message) from e


class RemoteReply:
    """One of the replies of a `RemoteBatch`, as far as it is written."""

    text = ""


class RemoteBatch(PendingReply):
    """Replies to several chats under no slider, which a server writes one after the other."""

    def __init__(self, backend: ReplyBackend, chats: Sequence[Sequence[Message]], sampler: Sampler) -> None:
        super().__init__()
        self.rows = tuple(RemoteReply() for _ in chats)
        self._steps = self._written(cast(RemoteBackend, backend), chats, sampler)

    def step(self) -> bool:
        """Wait for the next piece of the reply that is being written. Return False if all have ended."""
        return next(self._steps, None) is not None

    def close(self) -> None:
        """End the request."""
        self._steps.close()

    def _written(
        self, backend: RemoteBackend, chats: Sequence[Sequence[Message]], sampler: Sampler
    ) -> Generator[RemoteReply]:
        for row, chat in zip(self.rows, chats, strict=True):
            with closing(backend.write([dict(m) for m in chat], sampler, {})) as pieces:
                for piece in pieces:
                    row.text += piece.text
                    self.tokens += bool(piece.text)
                    yield row
