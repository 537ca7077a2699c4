"""Two replies to one message under two settings, blind or not, the words in which they differ, and the vote.

`steer.chat.chat.Chat.compare` starts a `Comparison`; the page part `compare` draws it. Both replies are decoded in one
batch with the same random draws, so only the sliders make them differ. Votes go to the file of `steer.chat.voting`.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from steer.chat.batch_draft import BatchDraft
from steer.chat.conversation import Ending, SettingsSpan, Written
from steer.chat.local import LocalBackend
from steer.chat.voting import keep_vote
from steer.chat.writer import Task, Writer
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.core.thoughts import split_thoughts
from steer.core.votes import Vote
from steer.errors import UsageError

Place = Literal["left", "right"]


@dataclass(frozen=True)
class Side:
    """One of the two settings to compare."""

    title: str
    edit: Edit | None
    profile: Profile | None
    """The sliders by name; None if they cannot be named."""


@dataclass(frozen=True)
class Shown:
    """One of the two replies, as the page shows it."""

    title: str | None
    """The setting's title; None while it must stay hidden, before the vote of a blind comparison."""
    thoughts: str
    text: str
    """The reply without the thoughts before it."""
    spans: list[Span]
    """The text in parts, each with whether the other reply lacks it; one part until both are written."""
    tokens: int


class Comparison(Writer):
    """Writes two replies to one chat in a background thread, and stores which one reads better."""

    def __init__(
        self, backend: LocalBackend, task: Task, sides: tuple[Side, Side], asked: str, *, blind: bool = False
    ) -> None:
        """`asked`: the user's message, which need not be the task's last. Errors: as `ReplyBackend.draft`."""
        super().__init__()
        self.sides, self.blind, self.task, self.asked = sides, blind, task, asked
        self.model, self.marks = backend.name, backend.marks
        self.left = secrets.randbelow(2) if blind else 0
        """Index of the side that is shown on the left: 0, or random if `blind`."""
        self.voted: Vote | None = None
        prompt = backend.prompt(task)
        self._draft = BatchDraft(backend, [prompt, prompt], [side.edit for side in sides], task.sampler)
        self.start(self._draft)

    @property
    def hidden(self) -> bool:
        """Whether the titles must stay hidden: the comparison is blind and nobody has voted."""
        return self.blind and self.voted is None

    @property
    def shown(self) -> tuple[Shown, Shown]:
        """The left and the right reply, as far as they are written."""
        rows = self._draft.rows
        thoughts, texts = zip(*(split_thoughts(row.text, self.marks) for row in rows), strict=True)
        spans = [[(text, False)] for text in texts] if self.running else marked(*texts)
        out = [
            Shown(None if self.hidden else side.title, thoughts[i], texts[i], spans[i], len(rows[i].ids))
            for i, side in enumerate(self.sides)
        ]
        return out[self.left], out[1 - self.left]

    def side_at(self, place: Place) -> int:
        """Return the index of the side that is shown at a place."""
        return self.left if place == "left" else 1 - self.left

    def vote(self, better: Place | Literal["neither"]) -> Vote:
        """Store which reply reads better, and reveal the titles.

        Errors: UsageError before both are written, and for a second vote; SteerError if the vote cannot be stored.
        """
        if self.running:
            raise UsageError("vote: expected both replies to be whole; wait, or stop them")
        if self.voted is not None:
            raise UsageError("vote: expected one vote a comparison, found a second; compare again")
        which = "neither" if better == "neither" else ("first", "second")[self.side_at(better)]
        replies = [(row.text, side.title, side.profile) for row, side in zip(self._draft.rows, self.sides, strict=True)]
        vote = keep_vote(
            self.model,
            self.task.messages,
            replies,
            which,
            seed=self.task.sampler.seed,
            blind=self.blind,
            left=self.left,
        )
        self.voted = vote
        return vote

    def written(self, place: Place) -> tuple[str, Written]:
        """Return one reply's text, and the record of how it was written, to add it to a chat."""
        number = self.side_at(place)
        row, side = self._draft.rows[number], self.sides[number]
        ending: Ending = "ended" if row.ended else self._draft.ending
        span, receipt = SettingsSpan(0, side.profile, side.edit), self._draft.tally.receipt(number)
        return row.text, self.record(self.task.sampler.seed, [span], row.ids, receipt, ending)


def tally(votes: Iterable[Vote]) -> dict[str, tuple[int, int, int]]:
    """Return title of a setting -> (won, lost, neither) over votes on two replies, counting blind and open votes
    alike."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for vote in votes:
        for side, reply in zip(("first", "second"), vote.replies if len(vote.replies) == 2 else (), strict=False):
            counts[reply.setting][2 if vote.outcome == "neither" else 0 if vote.outcome == side else 1] += 1
    return {title: (won, lost, neither) for title, (won, lost, neither) in counts.items()}


Span = tuple[str, bool]
"""A part of a text, and whether the other text lacks it."""
_WORD = re.compile(r"\s+|\w+(?:['\u2019]\w+)*|[^\w\s]")
LONGEST = 4000
"""Most words of a text for a word-by-word comparison; in longer texts everything after the common beginning differs."""


def marked(first: str, second: str) -> tuple[list[Span], list[Span]]:
    """Split both texts into spans that do or do not differ. Joined, the spans give the texts.

    White space alone does not count as a difference.

    >>> marked("I like tea", "I like coffee")
    ([('I like ', False), ('tea', True)], [('I like ', False), ('coffee', True)])
    """
    a, b = _WORD.findall(first), _WORD.findall(second)
    if max(len(a), len(b)) > LONGEST:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return _spans(a, [i >= same for i in range(len(a))]), _spans(b, [i >= same for i in range(len(b))])
    words_a, words_b = ([i for i, word in enumerate(words) if not word.isspace()] for words in (a, b))
    matcher = difflib.SequenceMatcher(None, [a[i] for i in words_a], [b[i] for i in words_b], autojunk=False)
    differs_a, differs_b = [True] * len(a), [True] * len(b)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            differs_a[words_a[block.a + offset]] = differs_b[words_b[block.b + offset]] = False
    for words, differs in ((a, differs_a), (b, differs_b)):
        for i, word in enumerate(words):
            if word.isspace():  # a space differs if the words on both sides of it do; they are never spaces
                differs[i] = 0 < i < len(words) - 1 and differs[i - 1] and differs[i + 1]
    return _spans(a, differs_a), _spans(b, differs_b)


def _spans(words: Sequence[str], differs: Sequence[bool]) -> list[Span]:
    groups = groupby(zip(words, differs, strict=True), key=lambda pair: pair[1])
    return [("".join(word for word, _ in group), key) for key, group in groups]
