"""The sliders of a chat as a page shows them: their range, where they stand, and what they are in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from steer.chat.budget import Budget, amount_at, budgets
from steer.chat.voice import Voice
from steer.errors import SteerError, UnsupportedError
from steer.live.sliders import BUDGET
from steer.values.feature import Feature
from steer.values.move import OPERATIONS, Operation
from steer.values.profile import Profile
from steer.values.slider import Slider
from steer.values.when import ALWAYS, When

Kind = Literal["trait", "feature"]
SAFE = 0.4
"""The share of the residual norm up to which an amount that nobody calibrated counts as safe: half of where replies
tend to fall apart."""
FURTHEST = 2.0
"""The amount up to which a slider that nobody calibrated counts as safe, however little it moves."""
RED = 1.5
"""The track goes beyond what is safe by this much."""
_TRACKS: dict[str, tuple[float, float]] = {"ablate": (0, 1), "scale": (0, 2), "clamp": (-1, 2), "cap": (-1, 2)}


@dataclass(frozen=True)
class SliderRow:
    """One slider of the page."""

    name: str
    title: str
    description: str
    kind: Kind
    operation: Operation
    operations: tuple[Operation, ...]
    """Those that it can have."""
    amount: float
    """nan: it is off, which for a clamp or a cap is not the same as any amount."""
    neutral: float | None
    """The amount that moves nothing; None: only when it is off."""
    low: float
    """Of the track."""
    high: float
    safe: tuple[float, float]
    """Amounts between which replies hold together; beyond is the red zone."""
    calibrated: bool
    """Whether that was measured, by `steer calibrate`."""
    share: float
    """Of the site's median residual norm; nan where that is not known."""
    site: int | None
    when: When
    pinned: bool
    """Whether somebody put it among the sliders."""

    @property
    def red(self) -> bool:
        """Whether it stands beyond what is safe."""
        return not math.isnan(self.amount) and not self.safe[0] - 1e-9 <= self.amount <= self.safe[1] + 1e-9

    @property
    def moves(self) -> bool:
        """Whether it moves anything where it stands."""
        return not math.isnan(self.amount) and self.amount != self.neutral


class Board:
    """The sliders of one chat."""

    def __init__(self, voice: Voice, pinned: Iterable[str] = ()) -> None:
        self._voice = voice
        self._pinned = dict.fromkeys(pinned)
        self.revision = 0
        """Grows when amounts change by anything but `set`: widgets that remember theirs are to be drawn anew."""

    @property
    def on(self) -> bool:
        """Whether the sliders move anything: the master switch. They keep their places."""
        return self._voice.on

    @on.setter
    def on(self, on: bool) -> None:
        self._voice.on = bool(on)

    @property
    def pinned(self) -> list[str]:
        """Sliders beside the traits that somebody wants to have at hand."""
        return list(self._pinned)

    def rows(self) -> list[SliderRow]:
        """Traits first, then features that were pinned or stand somewhere, and a server's. One that is known no more is
        passed over."""
        sliders = self._voice.sliders
        known = sliders.known()
        traits = [n for n, s in known.items() if _kind(s) == "trait" and _own(s, n)]
        # A server's features cannot be looked for, so those that it names are at hand.
        told = [n for n, s in known.items() if not isinstance(s, Slider)]
        names = dict.fromkeys([*traits, *told, *self._pinned, *sliders])
        rows = []
        for name in names:
            try:
                rows.append(self._row(name, known.get(name) or sliders.slider(name)))
            except SteerError:
                continue
        return sorted(rows, key=lambda r: r.kind == "feature")

    def offered(self) -> list[SliderRow]:
        """Features with names that could be pinned and are not."""
        there = {r.name for r in self.rows()}
        known = self._voice.sliders.known()
        return [self._row(n, s) for n, s in known.items() if n not in there and _kind(s) == "feature"]

    def row(self, name: str) -> SliderRow:
        """One of them. Errors: UsageError for a name that means nothing on this checkpoint."""
        return self._row(name, self._voice.sliders.slider(name))

    def set(self, name: str, amount: float) -> None:
        """Move a slider; what is being written feels it. Errors: UsageError, and nothing has changed."""
        sliders = self._voice.sliders
        if name not in set(sliders) and amount == sliders.slider(name).neutral:
            return  # a slider that was not touched is not to be among those that stand somewhere
        if name not in set(sliders) or sliders[name] != amount:
            sliders[name] = amount

    def off(self, name: str) -> None:
        """Let a slider move nothing: the only way for a clamp."""
        if name in set(self._voice.sliders):
            del self._voice.sliders[name]
            self.revision += 1

    def reset(self, name: str) -> None:
        """Back to where a slider moves nothing."""
        self.off(name)

    def reset_all(self) -> None:
        """No slider moves anything."""
        self._voice.sliders.reset()
        self.revision += 1

    def undo(self) -> bool:
        """Take the last move back. False when there is none."""
        return self._redrawn(self._voice.sliders.undo())

    def redo(self) -> bool:
        """Do again what was taken back. False when there is none."""
        return self._redrawn(self._voice.sliders.redo())

    def pin(self, name: str) -> SliderRow:
        """Put a slider among those at hand: `L14/123`, or a name out of a dictionary's sliders.

        Errors: UsageError for one that this checkpoint does not have.
        """
        row = self.row(name)
        self._pinned[name] = None
        return self._row(name, self._voice.sliders.slider(name)) if not row.pinned else row

    def unpin(self, name: str) -> None:
        """Take a slider away from those at hand; it moves nothing any more."""
        self.off(name)
        self._pinned.pop(name, None)

    def reshape(self, name: str, operation: Operation | None = None, when: When | None = None) -> None:
        """Let a slider do something else, or at other times. It keeps its amount where the operation stays the same,
        else it moves nothing yet.

        Errors: UsageError for what its target cannot do; UnsupportedError where sliders cannot be changed.
        """
        if "reshape" not in self._voice.can:
            raise UnsupportedError(
                f"{self._voice.name}: its server takes amounts alone; give it a profile: steer serve --profile FILE"
            )
        sliders = self._voice.sliders
        old = sliders.slider(name)
        new = Slider(old.target, operation or old.operation, old.when if when is None else when, name)
        if (new.operation, new.when) == (old.operation, old.when):
            return
        kept = sliders[name] if name in set(sliders) and new.operation == old.operation else None
        sliders.put(new, kept)
        if new.operation != old.operation:
            # The range that was measured is another operation's.
            sliders.ranges.pop(name, None)
        self.revision += 1

    def use(self, profile: Profile) -> None:
        """Let a profile's sliders stand and no others; those that are features are pinned. Errors: SteerError."""
        self._voice.use(profile)
        for name in self._voice.sliders:
            if _kind(self._voice.sliders.slider(name)) == "feature":
                self._pinned[name] = None
        self.revision += 1

    def budgets(self) -> list[Budget]:
        """What is moved at each site, of what may be."""
        found = budgets(self._voice.sliders, self.on)
        return [Budget(b.site, b.share, tuple((self._title(n), share) for n, share in b.parts), b.limit) for b in found]

    def warnings(self) -> list[str]:
        """Sites that are moved too far, and sliders beyond what is safe by measure."""
        if not self.on:
            return []
        beyond = [
            f"{r.title} stands at {r.amount:g}, beyond its calibrated range {r.safe[0]:g} to {r.safe[1]:g}"
            for r in self.rows()
            if r.red and r.calibrated
        ]
        return [*self._voice.sliders.warnings(), *beyond]

    def _redrawn(self, changed: bool) -> bool:
        self.revision += changed
        return changed

    def _title(self, name: str) -> str:
        return title(self._voice.sliders.slider(name), name)

    def _row(self, name: str, slider: Any) -> SliderRow:
        sliders = self._voice.sliders
        amount = sliders[name] if name in set(sliders) else slider.neutral
        measured = sliders.ranges.get(name)
        safe = tuple(measured) if measured is not None else safe_range(slider)
        low, high = track(slider, safe)
        if amount is not None:
            low, high = min(low, amount), max(high, amount)
        return SliderRow(
            name, title(slider, name), described(slider), _kind(slider), slider.operation, operations(slider),
            math.nan if amount is None else amount, slider.neutral, low, high, safe, measured is not None,
            0.0 if amount is None else slider.share(amount), slider.site, getattr(slider, "when", ALWAYS),
            name in self._pinned,
        )  # fmt: skip


def safe_range(slider: Any) -> tuple[float, float]:
    """Amounts that count as safe for a slider that nobody calibrated."""
    if slider.operation != "add":
        return _TRACKS[slider.operation]
    far = amount_at(slider, SAFE)
    far = FURTHEST if far is None else _rounded(min(FURTHEST, far))
    return -far, far


def track(slider: Any, safe: tuple[float, float]) -> tuple[float, float]:
    """How far a slider goes: beyond what is safe, and no further than makes sense."""
    if slider.operation == "ablate":
        return 0.0, 1.0
    room = (RED - 1) * max(safe[1] - safe[0], 0.5) / 2
    low, high = _rounded(safe[0] - room), _rounded(safe[1] + room)
    if slider.operation == "scale":
        low = max(low, 0.0)
    most = amount_at(slider, RED * BUDGET)
    if most is not None and -most <= safe[0] and safe[1] <= most:
        low, high = max(low, -_rounded(most)), min(high, _rounded(most))
    neutral = slider.neutral
    return (low, high) if neutral is None else (min(low, neutral), max(high, neutral))


def operations(slider: Any) -> tuple[Operation, ...]:
    """What a slider's target can be done to it."""
    target = getattr(slider, "target", None)
    if target is None or (isinstance(target, Feature) and min(target.units) < 0):
        return (slider.operation,)
    found = []
    for operation in OPERATIONS:
        try:
            Slider(target, operation)
        except SteerError:
            continue
        found.append(operation)
    return tuple(found)


def title(slider: Any, name: str) -> str:
    """What a page calls a slider."""
    from steer.chat.words import title_of

    if not isinstance(slider, Slider):
        return name.replace("-", " ")
    told = title_of(slider)
    # Two sliders on one direction need two names.
    return told if name == slider.target.name else f"{told} ({name.removeprefix(slider.target.name).strip(' :()')})"


def described(slider: Any) -> str:
    """What a slider moves, for people."""
    from steer.chat.words import description_of

    return description_of(slider) if isinstance(slider, Slider) else "A slider of the server's."


def _kind(slider: Any) -> Kind:
    moves_latents = isinstance(slider.target, Feature) if isinstance(slider, Slider) else slider.feature
    return "feature" if moves_latents else "trait"


def _own(slider: Any, name: str) -> bool:
    """Whether a known slider is the one of its target's name: others show where they stand somewhere."""
    return not isinstance(slider, Slider) or name == slider.target.name


def _rounded(value: float) -> float:
    """To a step that a slider can have."""
    size = abs(value)
    step = 0.5 if size >= 4 else 0.05 if size >= 0.5 else 0.01 if size >= 0.1 else 0.001
    return round(round(value / step) * step, 3)
