"""Two replies to one message under two settings, blind or not, the words in which they differ, and the vote.

`steer.chat.chat.Chat.duel` starts a `Comparison`; the page part `compare` draws it. Both replies are decoded in one
batch with the same random draws, so only the sliders make them differ.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from steer.chat.conversation import Ending, SettingsSpan, Written
from steer.chat.local import LocalVoice
from steer.chat.votes import Better, Vote, keep_vote
from steer.chat.writer import Task, Writer
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.core.sampler import Sampler
from steer.errors import SteerError, UsageError
from steer.model.decode import Step, decode
from steer.model.detokenise import Detokeniser
from steer.model.profiles import as_profile, edit_of
from steer.model.steering.receipts import Tally

if TYPE_CHECKING:
    from steer.model.sliders import Sliders
    from steer.model.steered import SteeredModel

Place = Literal["left", "right"]


@dataclass(frozen=True)
class Side:
    """One of the two settings to compare."""

    title: str
    edit: Callable[[], Edit | None]
    """Returns the edit to apply for the next token."""
    profile: Profile | None
    """The sliders by name; None if they cannot be named."""


def plain_side(title: str = "without sliders") -> Side:
    """Return the setting without sliders."""
    return Side(title, lambda: None, Profile("none"))


def slider_side(sliders: Sliders, sampler: Sampler, title: str = "with these sliders") -> Side:
    """Return the current amounts of sliders as a setting. Moves after this call have no effect on it."""
    edit = sliders.current
    try:
        profile = as_profile("these", sliders, sampler)
    except SteerError:
        profile = None
    return Side(title, lambda: edit, profile)


def profile_side(model: SteeredModel, profile: Profile) -> Side:
    """Return the sliders of a profile as a setting.

    The profile's sampler is not used: both replies use the chat's, so that only the sliders differ.
    Errors: SteerError for sliders that this checkpoint does not have.
    """
    edit = edit_of(model, profile)
    return Side(profile.name, lambda: edit, profile)


@dataclass(frozen=True)
class Shown:
    """One of the two replies, as the page shows it."""

    title: str | None
    """The setting's title; None while it must stay hidden, before the vote of a blind comparison."""
    text: str
    spans: list[Span]
    """The text in parts, each with whether the other reply lacks it; one part until both are written."""
    tokens: int
    receipt: dict[str, Any] | None


class Comparison:
    """Two replies to one chat, written in a background thread."""

    def __init__(self, voice: LocalVoice, task: Task, sides: tuple[Side, Side], *, blind: bool = False) -> None:
        """Errors: as `ReplyBackend.draft`."""
        self.sides, self.blind, self.task = sides, blind, task
        self.model = voice.name
        self.left = secrets.randbelow(2) if blind else 0
        """Index of the side that is shown on the left: 0, or random if `blind`."""
        self.voted: Vote | None = None
        self.writer = Writer()
        self._draft = PairDraft(voice, task, sides)
        self.writer.start(self._draft)

    @property
    def running(self) -> bool:
        """Whether the replies are still being written."""
        return self.writer.running

    @property
    def error(self) -> str | None:
        """What went wrong, in one line; None if nothing did."""
        return self.writer.error

    def stop(self) -> bool:
        """Stop writing both replies; what is written stays. Return whether the thread ended in time."""
        return self.writer.stop()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until both are written. Return whether that happened in time."""
        return self.writer.wait(seconds)

    @property
    def hidden(self) -> bool:
        """Whether the titles must stay hidden: the comparison is blind and nobody has voted."""
        return self.blind and self.voted is None

    @property
    def shown(self) -> tuple[Shown, Shown]:
        """The left and the right reply, as far as they are written."""
        rows = self._draft.rows
        texts = [row.text for row in rows]
        spans: tuple[list[Span], list[Span]] = ([(texts[0], False)], [(texts[1], False)])
        if not self.running:
            spans = marked(texts[0], texts[1])
        out = [
            Shown(
                None if self.hidden else side.title, texts[i], spans[i], len(rows[i].ids),
                # A receipt would reveal which reply has which setting.
                None if self.hidden or self.running else self._draft.tally.receipt(i).describe(),
            )
            for i, side in enumerate(self.sides)
        ]  # fmt: skip
        return (out[1], out[0]) if self.left else (out[0], out[1])

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
        which: Better = "neither" if better == "neither" else ("first", "second")[self.side_at(better)]
        first, second = self.sides
        task = self.task
        vote = Vote(
            self.model, task.messages[-1]["content"], task.sampler.seed, asdict(task.sampler),
            (first.title, second.title), (_dumped(first), _dumped(second)), which, self.blind, self.left,
        )  # fmt: skip
        keep_vote(vote)
        self.voted = vote
        return vote

    def written(self, place: Place) -> tuple[str, Written]:
        """Return one reply's text, and the record of how it was written, to add it to a chat."""
        number = self.side_at(place)
        row, side = self._draft.rows[number], self.sides[number]
        stretch, receipt = SettingsSpan(0, side.profile, side.edit()), self._draft.tally.receipt(number).describe()
        ending: Ending = "ended" if row.ended else self._draft.ending
        return row.text, Written(
            self.task.sampler.seed, side.profile, (stretch,), tuple(row.ids), receipt, ending, self.writer.seconds,
            self.writer.first_token, self.writer.rate,
        )  # fmt: skip


class _Row:
    ended = False

    def __init__(self, model: SteeredModel) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.pieces = Detokeniser(model.tokenizer, [])


class PairDraft:
    """Two replies in one batch, each under its own edit, with the same random draws. A `PendingReply` for both."""

    ending: Ending = "length"
    """Why a reply ended that the model did not end itself."""
    ids: tuple[int, ...] = ()
    stretches: tuple[SettingsSpan, ...] = ()

    def __init__(self, voice: LocalVoice, task: Task, sides: tuple[Side, Side]) -> None:
        model = voice.model
        prompt = voice.prompt(task, 0)
        self.tally = Tally()
        self.rows = (_Row(model), _Row(model))
        self.tokens = 0
        self._voice, self._sides = voice, sides
        room = voice.context - len(prompt)
        sampler = replace(task.sampler, max_new_tokens=max(1, min(task.sampler.max_new_tokens, room)))
        # Both replies have the same key: as long as their texts agree they make the same draws, so only the sliders
        # cause a difference.
        self._steps: Generator[Step] = decode(model, [prompt, prompt], sampler, [0, 0], tally=self.tally)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def text(self) -> str:
        """Both texts, joined, so that a change in either is noticed."""
        return f"{self.rows[0].text}\0{self.rows[1].text}"

    def step(self) -> bool:
        """Write one token of each reply that has not ended. Return False if both have ended."""
        model = self._voice.model
        with self._voice.turns.turn():
            rows = [side.edit() for side in self._sides]
            with model.steering.alone(rows):
                step = next(self._steps, None)
        if step is None:
            return False
        for number, token in zip(step.rows, step.tokens, strict=True):
            row = self.rows[number]
            if token in model.end_token_ids:
                row.text += row.pieces.end()
                row.ended = True
            else:
                row.ids.append(token)
                row.text += row.pieces.add(token)
                self.tokens += 1
        return True

    def close(self) -> None:
        """Stop decoding."""
        self._steps.close()

    def receipt(self) -> dict[str, Any] | None:
        """Return None: each reply has its own receipt, in `tally`."""
        return None


def _dumped(side: Side) -> dict[str, Any] | None:
    return None if side.profile is None else side.profile.dump()


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
    words_a, words_b = [i for i, w in enumerate(a) if not w.isspace()], [i for i, w in enumerate(b) if not w.isspace()]
    matcher = difflib.SequenceMatcher(None, [a[i] for i in words_a], [b[i] for i in words_b], autojunk=False)
    differs = [True] * len(a), [True] * len(b)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            differs[0][words_a[block.a + offset]] = differs[1][words_b[block.b + offset]] = False
    return _spans(a, _joined(a, differs[0])), _spans(b, _joined(b, differs[1]))


def _joined(words: Sequence[str], differs: list[bool]) -> list[bool]:
    """Mark a space as differing if the words on both sides of it differ."""
    out = list(differs)
    for i, word in enumerate(words):
        if word.isspace():
            out[i] = 0 < i < len(words) - 1 and differs[i - 1] and differs[i + 1]
    return out


def _spans(words: Sequence[str], differs: Sequence[bool]) -> list[Span]:
    out: list[Span] = []
    for word, differs_here in zip(words, differs, strict=True):
        if out and out[-1][1] == differs_here:
            out[-1] = (out[-1][0] + word, differs_here)
        else:
            out.append((word, differs_here))
    return out
