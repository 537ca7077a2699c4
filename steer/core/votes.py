"""Votes of a person on replies: of two replies the better one, or a thumb up or down for one.

A file of votes has one vote per line, as JSON with the fields of `Vote`, and only grows. Compare, the thumbs under
replies and `/good` and `/bad` write it; `steer find --votes` makes a direction of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from pydantic_core import to_json

from steer.core.small_files import read_small
from steer.core.validation import Bool, Text, Whole, checked, from_file
from steer.errors import SteerError, UsageError
from steer.files import append_line, one_line, parse_json

SIZE_LIMIT = 500_000_000
"""Most bytes of a file of votes."""
LEAST, LEAST_MESSAGES = 20, 5
"""Fewest votes that a direction is made of, and fewest messages that they are about: a vote is predicted from the votes
on other messages."""
Outcome = Literal["first", "second", "neither", "good", "bad", "withdrawn"]
"""Which of two replies is better; or what a single reply is, or that an earlier vote on it is withdrawn."""
_OUTCOMES: dict[int, tuple[Outcome, ...]] = {1: ("good", "bad", "withdrawn"), 2: ("first", "second", "neither")}


@checked
class VotedMessage:
    """A message before the replies."""

    role: Literal["system", "user", "assistant"]
    content: str


@checked
class VotedReply:
    """A reply as it was read, and under which settings it was written."""

    text: str
    setting: str = ""
    """Title of the settings; empty if they had none."""
    profile: dict[str, Any] | None = None
    """The sliders and the sampler; None if they are not known by name."""


@checked
class Vote:
    """What a person said of one reply, or of two replies to one chat."""

    model: Text
    """The model that wrote the replies."""
    chat: Annotated[tuple[VotedMessage, ...], Field(min_length=1)]
    """What both replies answer, with the system prompt."""
    replies: Annotated[tuple[VotedReply, ...], Field(min_length=1, max_length=2)]
    outcome: Outcome
    seed: Whole | None = None
    """Seed of the random draws; None if unknown."""
    blind: Bool = False
    """Whether the settings were hidden until the vote."""
    left: Literal[0, 1] = 0
    """Index of the reply that was shown on the left."""
    at: Text = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    """Time of the vote, with time zone."""

    def __post_init__(self) -> None:
        allowed = _OUTCOMES[len(self.replies)]
        if self.outcome not in allowed:
            raise ValueError(f"outcome: expected one of {', '.join(allowed)} for {len(self.replies)} replies, "
                             f"found {self.outcome!r}; mend it")  # fmt: skip

    @classmethod
    def of(cls, model: str, chat: Iterable[dict[str, str]], replies: tuple[VotedReply, ...], outcome: Outcome,
           **about: Any) -> Self:  # fmt: skip
        """Return a vote on replies to a chat in the form of chat templates."""
        return cls(model, tuple(VotedMessage(m["role"], m["content"]) for m in chat), replies, outcome, **about)  # pyright: ignore[reportArgumentType]

    @property
    def message(self) -> str:
        """The user's message that the replies answer."""
        return next((m.content for m in reversed(self.chat) if m.role == "user"), "")

    @property
    def liked(self) -> str | None:
        """The text of the reply that was preferred or called good; None if there is none."""
        return {"first": self.replies[0].text, "second": self.replies[-1].text, "good": self.replies[0].text}.get(
            self.outcome
        )

    @property
    def disliked(self) -> str | None:
        """The text of the other one of a pair, or of a reply that was called bad; None if there is none."""
        return {"first": self.replies[-1].text, "second": self.replies[0].text, "bad": self.replies[0].text}.get(
            self.outcome
        )


def append_vote(file: Path, vote: Vote) -> None:
    """Append a vote to a file; it is on the disk when this returns. Errors: SteerError if it cannot be written."""
    append_line(file, to_json(vote))


def read_votes(file: Path) -> list[Vote]:
    """Return all votes in a file, the oldest first. A last line that a crash cut off is left out.

    Errors: SteerError for a file that cannot be read, and with the number of a line that is not a vote.
    """
    votes = []
    for number, line in enumerate(read_small(file, SIZE_LIMIT, "votes").split(b"\n")[:-1], 1):
        try:
            if line.strip():
                votes.append(from_file(Vote, parse_json(line), "another line"))
        except (ValueError, SteerError) as e:
            raise SteerError(f"{file}, line {number}: expected a vote, found {one_line(e)}; take the line out") from e
    return votes


def counted(votes: Iterable[Vote]) -> list[Vote]:
    """Return the votes that prefer something: of several on the same replies the last, without ties, votes that were
    withdrawn, and pairs with the same text."""
    last = {(v.chat, *(r.text for r in v.replies)): v for v in votes}
    return [v for v in last.values() if v.liked != v.disliked]


def usable_votes(votes: str | Path | Sequence[Vote]) -> list[Vote]:
    """Return the votes that prefer something, of a file or of a list.

    Errors: UsageError for votes that no direction can be made of: fewer than `LEAST`, on fewer messages than
    `LEAST_MESSAGES`, or all for or all against; SteerError for a file that does not hold votes.
    """
    of_file = isinstance(votes, str | Path)
    usable, where = counted(read_votes(Path(votes)) if of_file else votes), str(votes) if of_file else "votes"
    if len(usable) < LEAST:
        raise UsageError(
            f"{where}: expected at least {LEAST} votes that prefer a reply, found {len(usable)}; "
            f"vote {LEAST - len(usable)} times more"
        )
    if (messages := len({v.message for v in usable})) < LEAST_MESSAGES:
        raise UsageError(
            f"{where}: expected votes on at least {LEAST_MESSAGES} different messages, found {messages}; "
            "vote on replies to others"
        )
    for key, missing in (("liked", "down"), ("disliked", "up")):
        if all(getattr(v, key) is None for v in usable):
            raise UsageError(
                f"{where}: expected replies of both kinds, found thumbs {missing} alone; vote on others too"
            )
    return usable
