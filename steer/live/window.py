"""What of a chat fits into the model's context, when it has grown longer than that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steer.errors import UsageError

FILLED = 0.75
"""The share of the context that is kept when something must go: more than the next reply needs, so that the chat is
not read anew at every turn."""
ROOM = 0.25
"""The share that a reply is promised; a longer one takes what is left."""

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Fitted:
    """A chat that fits."""

    ids: list[int]
    """The prompt."""
    left_out: int
    """Messages that went from its beginning; the system prompt stays."""
    room: int
    """Tokens that are left for the reply."""


def fit(
    messages: Messages,
    count: Callable[[Messages], list[int]],
    context: int,
    wanted: int,
    begun: int = 0,
    left_out: int = 0,
) -> Fitted:
    """The prompt of a chat, without its oldest messages where it would not fit with its reply.

    `count` makes prompts; `wanted` tokens are asked for, `begun` are there already; `left_out` messages went the last
    time, and go again where that is enough, since what stays was read without them.
    Errors: UsageError where the last message alone is too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else ()
    rest = messages[len(head) :]
    promised = min(wanted, int(ROOM * context))

    def tried(cut: int, most: float) -> Fitted | None:
        ids = count((*head, *rest[cut:]))
        room = context - len(ids) - begun
        return Fitted(ids, cut, room) if len(ids) + begun <= most and room >= 1 else None

    most = context - promised
    starts = _starts(rest)
    for cut, limit in ((0, most), (left_out if left_out in starts else 0, most)):
        if found := tried(cut, limit):
            return found
    for cut in starts:
        if found := tried(cut, min(most, FILLED * context)):
            return found
    if found := tried(starts[-1], context - 1):
        return found
    found = len(count((*head, *rest[starts[-1] :]))) + begun
    raise UsageError(
        f"the last message: expected at most {context - 1} tokens with the system prompt and the reply so far, as much "
        f"as the model can read, found {found}; shorten it"
    )


def _starts(messages: Sequence[dict[str, str]]) -> list[int]:
    """Where a chat may begin: chat templates want the user first. All of it is one such place."""
    return [0, *(i for i, m in enumerate(messages) if i and m["role"] == "user")]
