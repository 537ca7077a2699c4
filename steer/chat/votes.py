"""The votes of blind and open comparisons: one JSON line per vote, with everything needed to write both replies again.

`steer.chat.comparison` appends to $STEER_HOME/votes.jsonl; the page part `compare` shows the tally.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from steer.checkpoint.fetch import home
from steer.errors import SteerError
from steer.files import parse_json

Better = Literal["first", "second", "neither"]
_WRITING = threading.Lock()


@dataclass(frozen=True)
class Vote:
    """The result of one comparison."""

    model: str
    message: str
    """The message that both replies answer."""
    seed: int
    sampler: dict[str, Any]
    titles: tuple[str, str]
    """Titles of the two settings, first and second."""
    settings: tuple[dict[str, Any] | None, dict[str, Any] | None]
    """Profiles of the two settings; None for sliders that cannot be named."""
    better: Better
    blind: bool
    """Whether the titles were hidden until the vote."""
    left: int
    """Index of the setting whose reply was on the left: 0 or 1."""
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    """Time of the vote, with time zone."""


def votes_place() -> Path:
    """Return the file of votes."""
    return home() / "votes.jsonl"


def keep_vote(vote: Vote, place: Path | None = None) -> Path:
    """Append a vote to the file and return the file. Errors: SteerError if it cannot be written."""
    place = place or votes_place()
    line = json.dumps(asdict(vote), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode, because other pages may append at the same time.
        with _WRITING:
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
    except OSError as e:
        raise SteerError(f"{place}: could not be written ({e.strerror}); free some space, or set STEER_HOME") from e
    return place


def read_votes(place: Path | None = None) -> list[Vote]:
    """Return all votes of the file. Errors: SteerError with the number of a line that is not a vote."""
    place = place or votes_place()
    if not place.is_file():
        return []
    out = []
    for number, line in enumerate(place.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            first, second = row["titles"]
            one, other = row["settings"]
            out.append(Vote(**{**row, "titles": (first, second), "settings": (one, other)}))
        except (ValueError, TypeError, KeyError) as e:
            raise SteerError(f"{place}, line {number}: expected a vote, found {e}; take the line out") from e
    return out


def tally(votes: Iterable[Vote]) -> dict[str, tuple[int, int, int]]:
    """Return title of a setting -> (won, lost, neither), counting blind and open votes alike."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for vote in votes:
        for place, title in enumerate(vote.titles):
            won = vote.better == ("first", "second")[place]
            counts[title][2 if vote.better == "neither" else 0 if won else 1] += 1
    return {title: (won, lost, neither) for title, (won, lost, neither) in counts.items()}
