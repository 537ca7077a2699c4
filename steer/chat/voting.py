"""The file that votes in chats go to, $STEER_HOME/votes.jsonl; `steer.core.votes` has its format."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from steer.checkpoint.fetch import home
from steer.core.profile import Profile
from steer.core.small_files import stamp
from steer.core.votes import Vote, VotedReply, append_vote, read_votes
from steer.plain_text import without_surrogates

Thumb = Literal["good", "bad"]


def votes_place() -> Path:
    """Return the file of votes."""
    return home() / "votes.jsonl"


def kept_votes() -> list[Vote]:
    """Return all votes that were kept. Errors: as `read_votes`."""
    place = votes_place()
    return list(_votes_in(place, stamp(place))) if place.exists() else []


@lru_cache(maxsize=1)
def _votes_in(place: Path, stamp: tuple[int, ...]) -> list[Vote]:
    """The page reads the file each time that it draws Compare, and most of the time nothing is new."""
    return read_votes(place)


def keep_vote(
    model: str,
    chat: Iterable[dict[str, str]],
    replies: Iterable[tuple[str, str, Profile | None]],
    outcome: str,
    **about: Any,
) -> Vote:
    """Append a vote to the file and return it.

    `chat`: what the replies answer, in the form of chat templates. `replies`: of each its text, the title of its
    settings and their profile. `about`: the other fields of `Vote`. Errors: SteerError if it cannot be written.
    """
    voted = [VotedReply(without_surrogates(t), s, None if p is None else p.dump()) for t, s, p in replies]
    cleaned = [{"role": m["role"], "content": without_surrogates(m["content"])} for m in chat]
    vote = Vote.of(model, cleaned, tuple(voted), outcome, **about)  # pyright: ignore[reportArgumentType]
    append_vote(votes_place(), vote)
    return vote
