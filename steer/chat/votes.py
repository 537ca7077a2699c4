"""Which of two replies read better: a line a vote, with all it takes to write both again."""

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

from steer.errors import SteerError
from steer.files import parse_json
from steer.weights.fetch import home

Better = Literal["first", "second", "neither"]
_WRITING = threading.Lock()


@dataclass(frozen=True)
class Vote:
    """One comparison."""

    model: str
    message: str
    """What was replied to last."""
    seed: int
    sampler: dict[str, Any]
    titles: tuple[str, str]
    """The two settings, in the order they were given."""
    settings: tuple[dict[str, Any] | None, dict[str, Any] | None]
    """Their profiles; None for one without names."""
    better: Better
    blind: bool
    """Whether the voter did not know which was which."""
    left: int
    """Which of the two stood on the left: 0 or 1."""
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def votes_place() -> Path:
    """Where votes are kept."""
    return home() / "votes.jsonl"


def keep_vote(vote: Vote, place: Path | None = None) -> Path:
    """Append a vote. Errors: SteerError where that cannot be done."""
    place = place or votes_place()
    line = json.dumps(asdict(vote), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # In one write, at the end: other pages append as well.
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
    """Every vote that was kept. Errors: SteerError naming the line that is none."""
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
    """Setting -> (won, lost, neither), the blind and the open votes together."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for vote in votes:
        for place, title in enumerate(vote.titles):
            won = vote.better == ("first", "second")[place]
            counts[title][2 if vote.better == "neither" else 0 if won else 1] += 1
    return {title: (won, lost, neither) for title, (won, lost, neither) in counts.items()}
