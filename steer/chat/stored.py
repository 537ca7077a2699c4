"""Conversations on disk: one JSON file each, written whole or not at all, read with every field checked."""

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

from steer.chat.conversation import Conversation, Ending, Message, Role, Stretch, Written
from steer.errors import SteerError, UsageError
from steer.files import parse_json, write_atomic
from steer.values.profile import Profile
from steer.values.small_files import read_small, shown
from steer.weights.fetch import home

SIZE_LIMIT = 50_000_000
"""Bytes of a chat's file."""
VERSION = 1


@dataclass(frozen=True)
class Stored:
    """What a chat's file holds."""

    conversation: Conversation
    model: str = ""
    """What it was held with, by name."""
    system: str | None = None
    profile: Profile | None = None
    """The sliders and the sampler of the page."""
    pinned: tuple[str, ...] = ()
    """Features among its sliders, by name."""
    on: bool = True
    """Whether the sliders move anything."""
    seed: int = 0


@dataclass(frozen=True)
class SavedChat:
    """A chat that is kept, as a list shows it."""

    place: Path
    title: str
    model: str
    messages: int
    changed: float = field(compare=False)
    """Seconds since 1970."""


def chats_folder() -> Path:
    """Where chats are kept."""
    return home() / "chats"


def new_place() -> Path:
    """A file for a new chat."""
    return chats_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.json"


def saved_chats() -> tuple[list[SavedChat], list[str]]:
    """Every chat that is kept, the latest first; and for each file that is none, which is passed over, a line that
    names it."""
    found = []
    for place in sorted(chats_folder().glob("*.json")):
        try:
            stat = place.stat()
        except OSError:  # deleted since
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
    """Delete a chat's file. Errors: SteerError where that cannot be done."""
    try:
        place.unlink(missing_ok=True)
    except OSError as e:
        raise SteerError(f"{place}: could not be deleted ({e.strerror}); check its permissions") from e


def save_chat(place: Path, stored: Stored) -> Path:
    """Write a chat's file: all of it or nothing. Errors: SteerError."""
    data = json.dumps(dump(stored), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half of a surrogate pair, which a user may have pasted, is no UTF-8.
    return write_atomic(place, data.encode("utf-8", "replace"))


def load_chat(place: Path) -> Stored:
    """Read a chat's file. Errors: SteerError naming the file for one that is missing, too large or no chat."""
    data = read_small(place, SIZE_LIMIT, "a chat")
    try:
        return parse(parse_json(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SteerError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
        raise SteerError(f"{place}: expected a chat that this program saved, found {what}; choose another") from e


def dump(stored: Stored) -> dict[str, Any]:
    """Plain data that `parse` reads back, fit for JSON."""
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
    """A chat from what `dump` made. Errors: those of Python for what is not there, or of another kind."""
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
        tuple(Stretch(int(start), _read_profile(profile)) for start, profile in made["stretches"]),
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
    """JSON has neither nan nor infinities."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
