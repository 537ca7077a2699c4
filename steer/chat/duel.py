"""Side by side: one message answered under two settings with the same random numbers, both written at once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from steer.chat.conversation import Ending, Stretch, Written
from steer.chat.differences import Span, marked
from steer.chat.local import LocalVoice
from steer.chat.voice import Task
from steer.chat.votes import Better, Vote, keep_vote
from steer.chat.writer import Writer
from steer.errors import SteerError, UsageError
from steer.live.decode import Step, decode
from steer.live.profiles import as_profile, edit_of
from steer.live.receipts import Tally
from steer.live.serve.engine import Token
from steer.live.serve.texts import ReplyText
from steer.values.edit import Edit
from steer.values.profile import Profile
from steer.values.sampler import Sampler

if TYPE_CHECKING:
    from steer.live.model import SteeredModel
    from steer.live.sliders import Sliders

Place = Literal["left", "right"]


@dataclass(frozen=True)
class Side:
    """One of the two settings."""

    title: str
    edit: Callable[[], Edit | None]
    """What the next token goes by."""
    profile: Profile | None
    """What it is by name; None where it has none."""


def plain_side(title: str = "without sliders") -> Side:
    """The model as it is."""
    return Side(title, lambda: None, Profile("none"))


def slider_side(sliders: Sliders, sampler: Sampler, title: str = "with these sliders") -> Side:
    """Sliders as they stand now: what moves them later is not part of the comparison."""
    edit = sliders.current
    try:
        profile = as_profile("these", sliders, sampler)
    except SteerError:
        profile = None
    return Side(title, lambda: edit, profile)


def profile_side(model: SteeredModel, profile: Profile) -> Side:
    """The sliders of a profile; how tokens are drawn is the chat's, or the sliders would not be all that differs.

    Errors: SteerError for sliders that this checkpoint does not have.
    """
    edit = edit_of(model, profile)
    return Side(profile.name, lambda: edit, profile)


@dataclass(frozen=True)
class Shown:
    """One of the two replies, as a page shows it."""

    title: str | None
    """None: not to be told before the vote."""
    text: str
    spans: list[Span]
    """The text in parts, and which of them the other lacks; one part until both are written."""
    tokens: int
    receipt: dict[str, Any] | None


class Duel:
    """Two replies to one chat, being written in a thread of their own."""

    def __init__(self, voice: LocalVoice, task: Task, sides: tuple[Side, Side], *, blind: bool = False) -> None:
        """Errors: as `Voice.draft`."""
        self.sides, self.blind, self.task = sides, blind, task
        self.model = voice.name
        self.left = secrets.randbelow(2) if blind else 0
        """Which of the sides stands on the left; with `blind` as a coin fell."""
        self.voted: Vote | None = None
        self.writer = Writer()
        self._draft = PairDraft(voice, task, sides)
        self.writer.start(self._draft)

    @property
    def running(self) -> bool:
        """Whether something is still being written."""
        return self.writer.running

    @property
    def error(self) -> str | None:
        """What went wrong, in a line."""
        return self.writer.error

    def stop(self) -> bool:
        """Leave both as they are."""
        return self.writer.stop()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end of both."""
        return self.writer.wait(seconds)

    @property
    def hidden(self) -> bool:
        """Whether it is not to be told yet which is which."""
        return self.blind and self.voted is None

    @property
    def shown(self) -> tuple[Shown, Shown]:
        """Left and right, as far as they have come."""
        rows = self._draft.rows
        texts = [row.text for row in rows]
        spans: tuple[list[Span], list[Span]] = ([(texts[0], False)], [(texts[1], False)])
        if not self.running:
            spans = marked(texts[0], texts[1])
        out = [
            Shown(
                None if self.hidden else side.title, texts[i], spans[i], len(rows[i].ids),
                # What the sliders did would give away which is which.
                None if self.hidden or self.running else self._draft.tally.receipt(i).describe(),
            )
            for i, side in enumerate(self.sides)
        ]  # fmt: skip
        return (out[1], out[0]) if self.left else (out[0], out[1])

    def side_at(self, place: Place) -> int:
        """Which of the sides stands there."""
        return self.left if place == "left" else 1 - self.left

    def vote(self, better: Place | Literal["neither"]) -> Vote:
        """Keep which of the two reads better, which also tells which is which.

        Errors: UsageError before both are written, and for a second vote; SteerError where it cannot be kept.
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
        """One of the replies, to be taken into a chat, and what it was written under."""
        number = self.side_at(place)
        row, side = self._draft.rows[number], self.sides[number]
        stretch, receipt = Stretch(0, side.profile, side.edit()), self._draft.tally.receipt(number).describe()
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
        self.pieces = ReplyText(model.tokenizer, [])


class PairDraft:
    """Two replies in one batch, each under its own edit, with the same draws. A `Draft` of both."""

    ending: Ending = "length"
    """Of those that did not end by themselves."""
    ids: tuple[int, ...] = ()
    stretches: tuple[Stretch, ...] = ()

    def __init__(self, voice: LocalVoice, task: Task, sides: tuple[Side, Side]) -> None:
        model = voice.model
        prompt = voice.prompt(task, 0)
        self.tally = Tally()
        self.rows = (_Row(model), _Row(model))
        self.tokens = 0
        self._voice, self._sides = voice, sides
        room = voice.context - len(prompt)
        sampler = replace(task.sampler, max_new_tokens=max(1, min(task.sampler.max_new_tokens, room)))
        # One key for both: while the two agree they draw the same, and what differs is the sliders' doing.
        self._steps: Generator[Step] = decode(model, [prompt, prompt], sampler, [0, 0], tally=self.tally)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def text(self) -> str:
        """Both, for whoever waits for more of either."""
        return f"{self.rows[0].text}\0{self.rows[1].text}"

    def step(self) -> bool:
        """A token for each that is still being written."""
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
                row.text += row.pieces.end().text
                row.ended = True
            else:
                row.ids.append(token)
                row.text += row.pieces.add(Token(token, None, (), False)).text
                self.tokens += 1
        return True

    def close(self) -> None:
        """Stop decoding."""
        self._steps.close()

    def receipt(self) -> dict[str, Any] | None:
        """They have one each: `tally`."""
        return None


def _dumped(side: Side) -> dict[str, Any] | None:
    return None if side.profile is None else side.profile.dump()
