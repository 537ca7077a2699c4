"""Conversations on disk, under $STEER_HOME/chats: one JSON file per chat, written atomically.

`steer.chat.chat` saves and loads chats with it; the page's list of old chats is `saved_chats`. Every field is checked
when a file is read.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_jsonable_python

from steer.chat.conversation import Conversation, Message, Written
from steer.chat.lore import Lore
from steer.checkpoint.fetch import home
from steer.core.profile import Profile
from steer.core.small_files import read_small
from steer.core.validation import error_line
from steer.errors import SteerError
from steer.files import one_line, parse_json, without_nan, write_atomic

SIZE_LIMIT = 50_000_000
"""Most bytes of a chat's file."""


@dataclass(frozen=True)
class Stored:
    """What a chat's file holds."""

    conversation: Conversation
    model: str = ""
    """Name of the model."""
    system: str | None = None
    """System prompt."""
    profile: Profile | None = None
    """The sliders and the sampler when the chat was saved."""
    pinned: tuple[str, ...] = ()
    """Names of the sliders that the user pinned."""
    on: bool = True
    """Whether the sliders move anything."""
    seed: int = 0
    lore: Lore = field(default_factory=Lore)
    """The lorebooks."""


@dataclass(frozen=True)
class SavedChat:
    """One saved chat in the list of old chats."""

    place: Path
    title: str
    model: str
    messages: int
    changed: float = field(compare=False)
    """Seconds since 1970."""


def chats_folder() -> Path:
    """Return the directory of saved chats."""
    return home() / "chats"


def new_place() -> Path:
    """Return a file name for a new chat, with the time and a random part."""
    return chats_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.json"


def saved_chats() -> tuple[list[SavedChat], list[str]]:
    """Return every saved chat, the latest first, and one error line for each file that could not be read as a chat."""
    found = []
    for place in sorted(chats_folder().glob("*.json")):
        try:
            stat = place.stat()
        except OSError:  # deleted in the meantime
            continue
        found.append(_listed(place, stat.st_mtime_ns, stat.st_size))
    chats = sorted((c for c in found if isinstance(c, SavedChat)), key=lambda c: c.changed, reverse=True)
    return chats, [line for line in found if isinstance(line, str)]


@lru_cache(maxsize=512)
def _listed(place: Path, stamp: int, size: int) -> SavedChat | str:
    try:
        stored = load_chat(place)
    except SteerError as e:
        return str(e)
    c = stored.conversation
    return SavedChat(place, c.title or "(empty)", stored.model, len(c.path()), stamp / 1e9)


class _Chat(BaseModel, arbitrary_types_allowed=True):
    """The contents of a chat's file."""

    steer_chat: Literal[1]
    """Version of the format."""
    model: str
    system: str | None = None
    profile: Profile | None = None
    pinned: tuple[str, ...] = ()
    on: bool = True
    seed: int = 0
    lore: Lore = Field(default_factory=Lore)
    messages: Annotated[list[Message], Field(fail_fast=True)]
    page: list[int]
    """Ids of the messages that are shown."""


def save_chat(place: Path, stored: Stored) -> Path:
    """Write a chat's file atomically and return it. Errors: SteerError."""
    c = stored.conversation
    with c.lock:
        chat = {name: getattr(stored, name) for name in ("model", "system", "seed", "pinned", "on")}
        chat |= {
            "steer_chat": 1,
            "lore": to_jsonable_python(stored.lore),
            "profile": _profile(stored.profile),
            "page": [m.id for m in c.path()],
        }
        chat["messages"] = [vars(m) | {"written": m.written and _written(m.written)} for m in c.all()]
        data = json.dumps(chat, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A user may have pasted a lone surrogate, which UTF-8 cannot encode.
    return write_atomic(place, data.encode("utf-8", "replace"))


def _written(w: Written) -> dict[str, Any]:
    spans = [(s.start, _profile(s.profile)) for s in w.stretches]
    return vars(w) | {"profile": _profile(w.profile), "stretches": spans, "receipt": without_nan(w.receipt)}


def _profile(profile: Profile | None) -> dict[str, Any] | None:
    return None if profile is None else profile.dump()


def load_chat(place: Path) -> Stored:
    """Read a chat's file. Errors: SteerError with the file's name if it is missing, too large or not a chat."""
    data = read_small(place, SIZE_LIMIT, "a chat")
    c = Conversation()
    try:
        chat = _Chat.model_validate(parse_json(data))
        for message in chat.messages:
            c.put(message)
        if chat.page:
            c.choose(chat.page[-1])
    except (ValueError, SteerError) as e:
        found = error_line(e) if isinstance(e, ValidationError) else one_line(e)
        raise SteerError(
            f"{place}: expected a chat that this program saved, found another file ({found}); choose another"
        ) from e
    return Stored(c, chat.model, chat.system, chat.profile, chat.pinned, chat.on, chat.seed, chat.lore)
