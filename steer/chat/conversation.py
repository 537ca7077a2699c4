"""A conversation as a tree: every message has alternatives beside it, and one path through them is on the page."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from steer.errors import UsageError
from steer.values.edit import Edit
from steer.values.profile import Profile

Role = Literal["user", "assistant"]
Ending = Literal["ended", "length", "stopped", "error"]
"""The model ended the reply itself; it was as long as replies may get; somebody stopped it; something went wrong."""
TITLE = 60
"""Characters of a title at most."""


@dataclass(frozen=True)
class Stretch:
    """From which token of a reply the sliders stood where."""

    start: int
    """The first token that was chosen under them."""
    profile: Profile | None
    """The sliders by name; None where they have no names to be found by."""
    edit: Edit | None = field(default=None, compare=False, repr=False)
    """What they did. Not kept on disk, where the profile says it."""


@dataclass(frozen=True)
class Written:
    """What a reply was written under, and how."""

    seed: int
    """Of its random stream."""
    profile: Profile | None
    """The sliders as they stood at its end, and its sampler."""
    stretches: tuple[Stretch, ...] = ()
    """Every setting that it met, in order."""
    ids: tuple[int, ...] = ()
    """Its tokens; none where they are not known: a reply that was edited, or written elsewhere."""
    receipt: Mapping[str, Any] | None = None
    """What the sliders did to it: `Receipt.describe`."""
    ending: Ending = "ended"
    seconds: float = 0.0
    first_token: float | None = None
    """Seconds until its first token was there."""
    rate: float | None = None
    """Tokens a second after the first one."""


@dataclass
class Message:
    """One message. Its text grows while it is being written."""

    id: int
    role: Role
    text: str
    parent: int | None
    """What it follows; None for a first message."""
    written: Written | None = None
    """None for what no model wrote."""
    edited: bool = False
    """Whether somebody changed what was written."""


class Conversation:
    """Messages that follow each other, with alternatives. Safe to be read while another thread writes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._messages: dict[int, Message] = {}
        self._below: dict[int | None, list[int]] = {}
        self._chosen: dict[int | None, int] = {}
        """Of the messages that follow one, the one on the page."""
        self._next = 0

    def __len__(self) -> int:
        """All messages, those that are not on the page as well."""
        return len(self._messages)

    def __contains__(self, message: int) -> bool:
        return message in self._messages

    def __getitem__(self, message: int) -> Message:
        """Errors: UsageError for a message that is not there."""
        if message not in self._messages:
            raise UsageError(f"message {message}: expected one of this chat, found none; it may have been deleted")
        return self._messages[message]

    def path(self) -> list[Message]:
        """What is on the page, first to last."""
        with self.lock:
            out: list[Message] = []
            at: int | None = None
            while (at := self._chosen.get(at)) is not None:
                out.append(self._messages[at])
            return out

    def upto(self, message: int) -> list[Message]:
        """A message and what it follows, first to last, wherever the page is."""
        with self.lock:
            out = [self[message]]
            while (parent := out[-1].parent) is not None:
                out.append(self._messages[parent])
            return out[::-1]

    @property
    def last(self) -> Message | None:
        """The end of the page."""
        path = self.path()
        return path[-1] if path else None

    @property
    def title(self) -> str:
        """The beginning of what was said first, by the user where the user said anything."""
        path = self.path()
        first = next((m for m in path if m.role == "user"), path[0] if path else None)
        text = " ".join(first.text.split()) if first is not None else ""
        return text if len(text) <= TITLE else text[: TITLE - 1] + "\u2026"

    def alternatives(self, message: int) -> list[Message]:
        """It and what stands beside it, in the order they came."""
        with self.lock:
            return [self._messages[i] for i in self._below[self[message].parent]]

    def below(self, message: int | None) -> list[Message]:
        """What follows a message, its alternatives all; None for first messages."""
        with self.lock:
            return [self._messages[i] for i in self._below.get(message, [])]

    def add(self, role: Role, text: str, parent: int | None, written: Written | None = None) -> Message:
        """A new message after `parent`, put on the page beside those there may be."""
        with self.lock:
            if parent is not None:
                self[parent]
            message = Message(self._next, role, text, parent, written)
            self.put(message)
            self.choose(message.id)
            return message

    def put(self, message: Message) -> None:
        """Take a message as it is, behind its alternatives. Errors: UsageError for one that is there, or follows
        none."""
        with self.lock:
            if message.id in self._messages or (message.parent is not None and message.parent not in self._messages):
                raise UsageError(f"message {message.id}: expected a new one that follows another, found {message}")
            self._messages[message.id] = message
            self._below.setdefault(message.parent, []).append(message.id)
            self._chosen.setdefault(message.parent, message.id)
            self._next = max(self._next, message.id + 1)

    def choose(self, message: int) -> None:
        """Put a message on the page, and what it follows."""
        with self.lock:
            for m in self.upto(message):
                self._chosen[m.parent] = m.id

    def change(self, message: int, text: str) -> None:
        """Another text in place of one. What it was written under stays known, its tokens do not."""
        with self.lock:
            m = self[message]
            if text != m.text:
                m.text, m.edited = text, True
                m.written = None if m.written is None else replace(m.written, ids=())

    def remove(self, message: int) -> None:
        """Take a message out, and all that follows it; the alternative before it takes its place on the page."""
        with self.lock:
            m = self[message]
            beside = self._below[m.parent]
            at = beside.index(message)
            beside.remove(message)
            if self._chosen.get(m.parent) == message:
                if beside:
                    self._chosen[m.parent] = beside[max(at - 1, 0)]
                else:
                    del self._chosen[m.parent]
            for gone in list(self._tree(message)):
                del self._messages[gone]
                self._below.pop(gone, None)
                self._chosen.pop(gone, None)

    def clear(self) -> None:
        """No messages."""
        with self.lock:
            self._messages.clear()
            self._below.clear()
            self._chosen.clear()

    def all(self) -> list[Message]:
        """Every message, each after the one that it follows."""
        with self.lock:
            return [self._messages[i] for i in sorted(self._messages)]

    def _tree(self, message: int) -> Iterator[int]:
        open_ = [message]
        while open_:
            at = open_.pop()
            open_ += self._below.get(at, [])
            yield at
