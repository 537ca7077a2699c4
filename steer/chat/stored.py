"""Conversations on disk, under $STEER_HOME/chats: one JSON file per chat, written atomically.

`steer.chat.chat` saves and loads chats with it; the page's list of old chats is `saved_chats`. Every field is checked
when a file is read.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from steer.chat.conversation import Conversation, Ending, Message, Role, SettingsSpan, Written
from steer.checkpoint.fetch import home
from steer.core.profile import Profile
from steer.core.small_files import read_small, shown
from steer.errors import SteerError, UsageError
from steer.files import parse_json, write_atomic

SIZE_LIMIT = 50_000_000
"""Most bytes of a chat's file."""
VERSION = 1


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


def delete_chat(place: Path) -> None:
    """Delete a chat's file. Errors: SteerError if it cannot be deleted."""
    try:
        place.unlink(missing_ok=True)
    except OSError as e:
        raise SteerError(f"{place}: could not be deleted ({e.strerror}); check its permissions") from e


def save_chat(place: Path, stored: Stored) -> Path:
    """Write a chat's file atomically and return it. Errors: SteerError."""
    data = json.dumps(dump(stored), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A user may have pasted a lone surrogate, which UTF-8 cannot encode.
    return write_atomic(place, data.encode("utf-8", "replace"))


def load_chat(place: Path) -> Stored:
    """Read a chat's file. Errors: SteerError with the file's name if it is missing, too large or not a chat."""
    data = read_small(place, SIZE_LIMIT, "a chat")
    try:
        return parse(parse_json(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SteerError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
        raise SteerError(f"{place}: expected a chat that this program saved, found {what}; choose another") from e


def dump(stored: Stored) -> dict[str, Any]:
    """Return a chat as plain data for JSON, which `parse` reads back."""
    c = stored.conversation
    with c.lock:
        return {
            "steer_chat": VERSION,
            "model": stored.model,
            "system": stored.system,
            "seed": stored.seed,
            "profile": _profile(stored.profile),
            "pinned": list(stored.pinned),
            "on": stored.on,
            "messages": [_message(m) for m in c.all()],
            "page": [m.id for m in c.path()],
        }


def parse(data: Any) -> Stored:
    """Make a chat from the data of `dump`. Errors: Python's own, for missing fields and wrong types."""
    if not isinstance(data, Mapping) or data.get("steer_chat") != VERSION:
        raise UsageError(f"{shown(data)} where the chat should be")
    c = Conversation()
    for row in data["messages"]:
        c.put(_read_message(row))
    page = [int(i) for i in data["page"]]
    if page:
        c.choose(page[-1])
    system, profile = data.get("system"), data.get("profile")
    return Stored(
        c,
        str(data["model"]),
        None if system is None else str(system),
        None if profile is None else Profile.parse(profile, "profile"),
        tuple(str(n) for n in data.get("pinned", ())),
        bool(data.get("on", True)),
        int(data.get("seed", 0)),
    )


def _message(m: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"id": m.id, "parent": m.parent, "role": m.role, "text": m.text}
    if m.edited:
        out["edited"] = True
    if (w := m.written) is not None:
        out["written"] = {
            "seed": w.seed,
            "profile": _profile(w.profile),
            "stretches": [[s.start, _profile(s.profile)] for s in w.stretches],
            "ids": list(w.ids),
            "receipt": _finite(w.receipt),
            "ending": w.ending,
            "seconds": round(w.seconds, 3),
            "first_token": None if w.first_token is None else round(w.first_token, 3),
            "rate": None if w.rate is None else round(w.rate, 2),
        }
    return out


def _read_message(row: Mapping[str, Any]) -> Message:
    role, parent, made = row["role"], row["parent"], row.get("written")
    if role not in get_args(Role) or not isinstance(row["text"], str):
        raise UsageError(f"a message with role {shown(role)} and text {shown(row['text'])}")
    written = None if made is None else _read_written(made)
    place = None if parent is None else int(parent)
    return Message(int(row["id"]), role, row["text"], place, written, bool(row.get("edited")))


def _read_written(made: Mapping[str, Any]) -> Written:
    if made["ending"] not in get_args(Ending):
        raise UsageError(f"the ending {shown(made['ending'])}")
    first, rate = made.get("first_token"), made.get("rate")
    return Written(
        int(made["seed"]),
        _read_profile(made["profile"]),
        tuple(SettingsSpan(int(start), _read_profile(profile)) for start, profile in made["stretches"]),
        tuple(int(i) for i in made["ids"]),
        made.get("receipt"),
        made["ending"],
        float(made["seconds"]),
        None if first is None else float(first),
        None if rate is None else float(rate),
    )


def _profile(profile: Profile | None) -> dict[str, Any] | None:
    return None if profile is None else profile.dump()


def _read_profile(data: Any) -> Profile | None:
    return None if data is None else Profile.parse(data, "profile")


def _finite(value: Any) -> Any:
    """Replace nan and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
