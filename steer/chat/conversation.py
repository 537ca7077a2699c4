"""A conversation as a tree: a message may have alternatives, and one path from the root is shown on the page.

`steer.chat.chat` adds messages to it and `steer.chat.stored` saves it. Nothing here knows of models or sliders, except
that a reply carries a record of how it was written (`Written`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from steer.chat.voting import Thumb
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.errors import UsageError
from steer.plain_text import shortened

Role = Literal["user", "assistant"]
Ending = Literal["ended", "length", "stopped", "error"]
"""Why a reply ended: the model ended it; it reached the length limit; the user stopped it; an error occurred."""
TITLE = 60
"""Most characters of a title."""


@dataclass(frozen=True)
class SettingsSpan:
    """Slider settings, and the token of a reply from which they applied."""

    start: int
    """Index in the reply of the first token that was chosen under these settings."""
    profile: Profile | None
    """The sliders by name; None if they cannot be named."""
    edit: Edit | None = field(default=None, compare=False, repr=False)
    """The edit that was applied. It is not saved to disk; there the profile replaces it."""


def _from_pairs(spans: Any) -> Any:
    """The spans in a chat's file are pairs of a token and a profile."""
    pairs = isinstance(spans, list) and all(isinstance(s, list) and len(s) == 2 for s in spans)
    return [dict(zip(("start", "profile"), span, strict=True)) for span in spans] if pairs else spans


@dataclass(frozen=True)
class Written:
    """How a reply was written: seed, settings, tokens, speed."""

    seed: int
    """Seed of the random draws."""
    profile: Profile | None
    """The sampler, and the sliders at the end of the reply."""
    stretches: Annotated[tuple[SettingsSpan, ...], Field(fail_fast=True), BeforeValidator(_from_pairs)] = ()
    """All settings that applied while it was written, in order."""
    ids: Annotated[tuple[int, ...], Field(fail_fast=True)] = ()
    """Token ids; empty if unknown, for a reply that was edited or that a server wrote."""
    receipt: Mapping[str, Any] | None = None
    """What the sliders did to the reply, as from `Receipt.describe`."""
    ending: Ending = "ended"
    seconds: float = 0.0
    """Seconds from the start to the end of writing."""
    first_token: float | None = None
    """Seconds from the start to the first token."""
    rate: float | None = None
    """Tokens per second after the first token."""


@dataclass
class Message:
    """One message. The text of a reply grows while it is being written."""

    id: int
    role: Role
    text: str
    parent: int | None
    """Id of the message that it follows; None for a first message."""
    written: Written | None = None
    """How the model wrote it; None if no model did."""
    edited: bool = False
    """Whether the user changed the text afterwards."""
    thumb: Thumb | None = None
    """What the user said of this text of a reply; None if nothing."""


class Conversation:
    """A tree of messages. Safe to read while another thread writes.

    >>> chat = Conversation()
    >>> question = chat.add("user", "Tea?", None)
    >>> first, second = (chat.add("assistant", text, question.id) for text in ("Yes.", "No."))
    >>> [m.text for m in chat.path()]
    ['Tea?', 'No.']
    >>> chat.choose(first.id)
    >>> [m.text for m in chat.path()]
    ['Tea?', 'Yes.']
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._messages: dict[int, Message] = {}
        self._below: dict[int | None, list[int]] = {}
        self._chosen: dict[int | None, int] = {}
        """Message id -> id of the message after it that is on the page; the key None has the first message."""
        self._next = 0

    def __len__(self) -> int:
        """Number of all messages, on the page or not."""
        return len(self._messages)

    def __getitem__(self, message: int) -> Message:
        """Return a message by id. Errors: UsageError for an id that does not exist."""
        if message not in self._messages:
            raise UsageError(f"message {message}: expected one of this chat, found none; it may have been deleted")
        return self._messages[message]

    def path(self) -> list[Message]:
        """Return the messages on the page, first to last."""
        with self.lock:
            out: list[Message] = []
            at: int | None = None
            while (at := self._chosen.get(at)) is not None:
                out.append(self._messages[at])
            return out

    def upto(self, message: int) -> list[Message]:
        """Return the path from a first message to this one, whether it is on the page or not."""
        with self.lock:
            out = [self[message]]
            while (parent := out[-1].parent) is not None:
                out.append(self._messages[parent])
            return out[::-1]

    @property
    def last(self) -> Message | None:
        """The last message on the page; None for an empty chat."""
        path = self.path()
        return path[-1] if path else None

    @property
    def title(self) -> str:
        """The beginning of the user's first message on the page, or of the first message if the user said nothing."""
        path = self.path()
        first = next((m for m in path if m.role == "user"), path[0] if path else None)
        return shortened(" ".join(first.text.split()), TITLE) if first is not None else ""

    def alternatives(self, message: int) -> list[Message]:
        """Return a message and its alternatives, in the order in which they were added."""
        with self.lock:
            return [self._messages[i] for i in self._below[self[message].parent]]

    def below(self, message: int | None) -> list[Message]:
        """Return all messages that directly follow a message, alternatives of each other; None for first messages."""
        with self.lock:
            return [self._messages[i] for i in self._below.get(message, [])]

    def add(self, role: Role, text: str, parent: int | None, written: Written | None = None) -> Message:
        """Add a message after `parent`, as an alternative to those that are there already, and show it on the page."""
        with self.lock:
            if parent is not None:
                self[parent]
            message = Message(self._next, role, text, parent, written)
            self.put(message)
            self.choose(message.id)
            return message

    def put(self, message: Message) -> None:
        """Insert a message with its id, after its alternatives.

        Errors: UsageError if the id exists already or the parent does not exist.
        """
        with self.lock:
            if message.id in self._messages or (message.parent is not None and message.parent not in self._messages):
                raise UsageError(f"message {message.id}: expected a new one that follows another, found {message}")
            self._messages[message.id] = message
            self._below.setdefault(message.parent, []).append(message.id)
            self._chosen.setdefault(message.parent, message.id)
            self._next = max(self._next, message.id + 1)

    def choose(self, message: int) -> None:
        """Show a message on the page, with the path that leads to it."""
        with self.lock:
            for m in self.upto(message):
                self._chosen[m.parent] = m.id

    def change(self, message: int, text: str) -> None:
        """Replace a message's text. The record of how it was written stays, without the token ids."""
        with self.lock:
            m = self[message]
            if text != m.text:
                m.text, m.edited, m.thumb = text, True, None
                m.written = None if m.written is None else replace(m.written, ids=())

    def remove(self, message: int) -> None:
        """Remove a message and everything after it. The alternative before it takes its place on the page."""
        with self.lock:
            m = self[message]
            beside = self._below[m.parent]
            index = beside.index(message)
            beside.remove(message)
            if self._chosen[m.parent] == message:
                del self._chosen[m.parent]
                if beside:
                    self._chosen[m.parent] = beside[max(index - 1, 0)]
            removed = [message]
            for at in removed:  # which grows by those below it
                removed += self._below.pop(at, [])
                self._chosen.pop(at, None)
                del self._messages[at]

    def all(self) -> list[Message]:
        """Return every message, each after its parent."""
        with self.lock:
            return [self._messages[i] for i in sorted(self._messages)]
