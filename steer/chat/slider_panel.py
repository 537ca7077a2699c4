"""The sliders of a chat as rows of the page, and how much of the residual norm they move together at each site.

`SliderPanel` wraps the sliders of a `ReplyBackend`, local or remote; the page part `sliders` draws its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from steer.chat.descriptions import PlainVerdict, description_of, ends_of, title_of, verdict_of
from steer.chat.writer import ReplyBackend
from steer.checkpoint.library import direction_place
from steer.core.feature import Feature
from steer.core.names import is_name
from steer.core.schedule import ALWAYS, Schedule
from steer.core.slider import OPERATIONS, Operation, Slider
from steer.core.trait import shipped_traits
from steer.errors import SteerError, UnsupportedError, UsageError
from steer.files import delete
from steer.model.sliders import BUDGET

if TYPE_CHECKING:  # openai takes long to import
    from steer.chat.remote import RemoteSlider

SAFE = 0.4
"""Share of the residual norm up to which an uncalibrated amount counts as safe: half of the share from which replies
tend to fall apart."""
FURTHEST = 2.0
"""Largest amount of an uncalibrated slider that counts as safe, however little it moves the stream."""
RED = 1.5
"""Length of a slider's track as a multiple of its safe range."""
Group = Literal["traits", "mine", "features"]
GROUPS: dict[Group, str] = {"traits": "Traits", "mine": "Mine", "features": "Features"}
"""Groups of sliders in their order, and their titles: traits that ship, directions of the user's own, and features."""
_TRACKS: dict[str, tuple[float, float]] = {"ablate": (0, 1), "scale": (0, 2), "clamp": (-1, 2), "cap": (-1, 2)}


@dataclass(frozen=True)
class SliderRow:
    """One slider of the page."""

    name: str
    title: str
    description: str
    kind: Literal["trait", "feature"]
    group: Group
    operation: Operation
    operations: tuple[Operation, ...]
    """The operations that its target allows."""
    amount: float
    """The current amount; nan if the slider is off. For a clamp or a cap, off is different from every amount."""
    neutral: float | None
    """The amount that moves nothing; None if the slider moves nothing only when it is off."""
    low: float
    """Smallest amount on the track."""
    high: float
    """Largest amount on the track."""
    safe: tuple[float, float]
    """Amounts between which replies stay coherent; the track is red beyond them."""
    calibrated: bool
    """Whether `safe` was measured by `steer calibrate`."""
    share: float
    """How far the slider moves the residual stream, as a share of the site's median norm; nan if unknown."""
    site: int | None
    when: Schedule
    pinned: bool
    """Whether the user pinned the slider to the panel."""
    ends: tuple[str, str] = ("less", "more")
    """What the model does at the low and at the high end, in a few words."""
    deletable: bool = False
    """Whether it is a direction that was found on this machine."""
    verdict: PlainVerdict | None = None
    """Whether it does what its name says, if that was measured."""
    fixed: str | None = None
    """Why it cannot be moved while the server runs; None if it can."""

    @property
    def red(self) -> bool:
        """Whether the amount is outside the safe range."""
        return not math.isnan(self.amount) and not self.safe[0] - 1e-9 <= self.amount <= self.safe[1] + 1e-9

    @property
    def moves(self) -> bool:
        """Whether the slider moves anything at its current amount."""
        return not math.isnan(self.amount) and self.amount != self.neutral

    def matches(self, words: str) -> bool:
        """Whether each of some words occurs in what the page says of the slider, in any case."""
        text = f"{self.name} {self.title} {self.description} {' '.join(self.ends)}".casefold()
        return all(word in text for word in words.casefold().split())


class SliderPanel:
    """The sliders of one chat."""

    def __init__(self, backend: ReplyBackend, pinned: Iterable[str] = ()) -> None:
        self._backend, self._sliders = backend, backend.sliders
        self._pinned = dict.fromkeys(pinned)
        self.revision = 0
        """Increases when an amount changes other than by `set`. It is part of the widgets' keys, so that Streamlit
        draws them again with the new amounts."""

    @property
    def on(self) -> bool:
        """The master switch: if false, no slider moves anything. The amounts stay."""
        return self._backend.on

    @on.setter
    def on(self, on: bool) -> None:
        self._backend.on = on

    @property
    def pinned(self) -> list[str]:
        """Names of the sliders that the user added to the panel."""
        return list(self._pinned)

    def rows(self) -> list[SliderRow]:
        """Return the panel's rows by group: traits, the user's own, then features that are pinned, have an amount, or
        come from a server.

        A slider with another name than its direction is shown only if it has an amount. A slider that does not exist
        any more is skipped.
        """
        known = self._sliders.known()
        # A server's features cannot be searched, so all that it lists are shown.
        listed = [
            n for n, s in known.items()
            if not isinstance(s, Slider) or (n == s.target.name and not _moves_latents(s))
        ]  # fmt: skip
        rows = []
        for name in dict.fromkeys([*listed, *self._pinned, *self._sliders]):
            try:
                rows.append(self._row(name, known.get(name) or self._sliders.slider(name)))
            except SteerError:
                continue
        return sorted(rows, key=lambda r: list(GROUPS).index(r.group))

    def row(self, name: str) -> SliderRow:
        """Return one slider's row. Errors: UsageError for a name that this checkpoint does not have."""
        return self._row(name, self._sliders.slider(name))

    def set(self, name: str, amount: float) -> None:
        """Move a slider; it affects a reply in progress. Errors: UsageError, and then nothing has changed."""
        # A slider that was not touched must not be listed as having an amount.
        if self._sliders[name] != amount:
            self._sliders[name] = amount

    def off(self, name: str) -> None:
        """Remove a slider's amount, so that it moves nothing. A clamp has no neutral amount and needs this."""
        if name in self._sliders:
            del self._sliders[name]
            self.revision += 1

    def reset_all(self) -> None:
        """Reset all sliders, so that none moves anything."""
        self._sliders.reset()
        self.revision += 1

    def undo(self) -> bool:
        """Undo the last move. Return False if there is none."""
        done = self._sliders.undo()
        self.revision += done
        return done

    def redo(self) -> bool:
        """Redo the last move that was undone. Return False if there is none."""
        done = self._sliders.redo()
        self.revision += done
        return done

    def pin(self, name: str) -> SliderRow:
        """Add a slider to the panel: a latent, as in `L14/123`, or a named slider of a dictionary. Return its row.

        Errors: UsageError for a slider that this checkpoint does not have.
        """
        row = self.row(name)
        self._pinned[name] = None
        return replace(row, pinned=True)

    def unpin(self, name: str) -> None:
        """Remove a slider from the panel; it moves nothing any more."""
        self.off(name)
        self._pinned.pop(name, None)

    def delete(self, name: str) -> None:
        """Delete a direction of the user's own, with its file. Errors: UsageError for any other slider."""
        file = self._own_file(name)
        if file is None:
            raise UsageError(f"slider {name!r}: expected one that was made on this machine, found another; keep it")
        delete(file)
        self._sliders.forget(name)
        self._pinned.pop(name, None)
        self.revision += 1

    def _own_file(self, name: str) -> Path | None:
        """Return the file of a direction that was found on this machine; None for other sliders."""
        file = direction_place(self._sliders.model.sketch(), name) if self._backend.local and is_name(name) else None
        return file if file is not None and file.is_file() else None

    def pin_used(self) -> None:
        """Pin the features that have an amount, after the sliders of a profile were set."""
        self._pinned |= {name: None for name in self._sliders if _moves_latents(self._sliders.slider(name))}
        self.revision += 1

    def reshape(self, name: str, operation: Operation | None = None, when: Schedule | None = None) -> None:
        """Change a slider's operation or its schedule. It keeps its amount unless the operation changes.

        Errors: UsageError for an operation that its target does not allow; UnsupportedError for a server's sliders.
        """
        if not self._backend.local:
            raise UnsupportedError(
                f"{self._backend.name}: its server takes amounts alone; give it a profile: steer serve --profile FILE"
            )
        sliders = self._sliders
        old = sliders.slider(name)
        new = Slider(old.target, operation or old.operation, when=old.when if when is None else when, label=name)
        if (new.operation, new.when) == (old.operation, old.when):
            return
        sliders.put(new, sliders.get(name) if new.operation == old.operation else None)
        if new.operation != old.operation:
            # The calibrated range was measured for the old operation.
            sliders.ranges.pop(name, None)
        self.revision += 1

    def budgets(self) -> list[Budget]:
        """Return how far the sliders move each site that has some, by site. If `on` is false, all shares are 0."""
        parts: dict[int, list[tuple[str, float]]] = {}
        for name, amount in self._sliders.items():
            slider = self._sliders.slider(name)
            share = slider.share(amount) if self.on else 0.0
            if slider.site is not None:
                named_share = _title(slider, name), 0.0 if math.isnan(share) else share
                parts.setdefault(slider.site, []).append(named_share)
        return [
            Budget(site, self._sliders.share(site) if self.on else 0.0, tuple(sorted(found, key=lambda p: -p[1])))
            for site, found in sorted(parts.items())
        ]

    def warnings(self) -> list[str]:
        """Return one line for each site that is moved too far, and each slider beyond its calibrated range."""
        if not self.on:
            return []
        beyond = [
            f"{r.title} is at {r.amount:g}, beyond its calibrated range {r.safe[0]:g} to {r.safe[1]:g}"
            for r in self.rows()
            if r.red and r.calibrated
        ]
        return [*self._sliders.warnings(), *beyond]

    def _row(self, name: str, slider: Slider | RemoteSlider) -> SliderRow:
        amount, measured = self._sliders.get(name, slider.neutral), self._sliders.ranges.get(name)
        fixed = None if isinstance(slider, Slider) else slider.fixed
        if fixed is not None:
            amount = slider.amount
        safe = _safe_range(slider) if measured is None else tuple(measured)
        low, high = _track(slider, safe)
        if amount is not None:
            low, high = min(low, amount), max(high, amount)
        description, when, ends, verdict = "A slider of the server's.", ALWAYS, ("less", "more"), None
        if isinstance(slider, Slider):
            description, when, ends = description_of(slider), slider.when, ends_of(slider)
            verdict = verdict_of(slider)
        return SliderRow(
            name, _title(slider, name), description,
            "feature" if _moves_latents(slider) else "trait", _group(slider, name),
            cast(Operation, slider.operation), _operations(slider),
            math.nan if amount is None else amount, slider.neutral, low, high, safe, measured is not None,
            0.0 if amount is None else slider.share(amount), slider.site, when,
            name in self._pinned, ends, self._own_file(name) is not None, verdict, fixed,
        )  # fmt: skip


def _safe_range(slider: Slider | RemoteSlider) -> tuple[float, float]:
    """Return the range of amounts that counts as safe for an uncalibrated slider."""
    if slider.operation != "add":
        return _TRACKS[slider.operation]
    furthest = _amount_at(slider, SAFE)
    furthest = FURTHEST if furthest is None else _rounded(min(FURTHEST, furthest))
    return -furthest, furthest


def _track(slider: Slider | RemoteSlider, safe: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of a slider's track: beyond the safe range, but within what the operation and site allow."""
    if slider.operation == "ablate":
        return 0.0, 1.0
    room = (RED - 1) * max(safe[1] - safe[0], 0.5) / 2
    low, high = _rounded(safe[0] - room), _rounded(safe[1] + room)
    if slider.operation == "scale":
        low = max(low, 0.0)
    most = _amount_at(slider, RED * BUDGET)
    if most is not None and -most <= safe[0] and safe[1] <= most:
        low, high = max(low, -_rounded(most)), min(high, _rounded(most))
    neutral = slider.neutral
    return (low, high) if neutral is None else (min(low, neutral), max(high, neutral))


def _amount_at(slider: Slider | RemoteSlider, share: float) -> float | None:
    """Return the amount at which a slider moves the residual stream by a share of its median norm.

    None for operations other than `add`, and if the slider's share is unknown.
    """
    unit_share = slider.share(1.0) if slider.operation == "add" else math.nan
    return share / unit_share if math.isfinite(unit_share) and unit_share > 0 else None


def _rounded(value: float) -> float:
    """Round to a step of the slider widget."""
    size = abs(value)
    step = 0.5 if size >= 4 else 0.05 if size >= 0.5 else 0.01 if size >= 0.1 else 0.001
    return round(round(value / step) * step, 3)


def _operations(slider: Slider | RemoteSlider) -> tuple[Operation, ...]:
    """Return the operations that a slider's target allows; of a server's slider, only the current one."""
    if not isinstance(slider, Slider) or (isinstance(slider.target, Feature) and min(slider.target.units) < 0):
        return (cast(Operation, slider.operation),)
    found = []
    for operation in OPERATIONS:
        with suppress(SteerError):
            found.append(Slider(slider.target, operation).operation)
    return tuple(found)


def _title(slider: Slider | RemoteSlider, name: str) -> str:
    """Return a slider's title on the page. `name`: its name in the panel."""
    if not isinstance(slider, Slider):
        return name.removesuffix(f":{slider.operation}").replace("-", " ")
    if name == slider.target.name:
        return title_of(slider)
    # Two sliders on one direction need different titles.
    return f"{title_of(slider)} ({name.removeprefix(slider.target.name).strip(' :()')})"


def _group(slider: Slider | RemoteSlider, name: str) -> Group:
    target = slider.target.name if isinstance(slider, Slider) else name.partition(":")[0]
    return "features" if _moves_latents(slider) else "traits" if target in shipped_traits() else "mine"


def _moves_latents(slider: Slider | RemoteSlider) -> bool:
    return isinstance(slider.target, Feature) if isinstance(slider, Slider) else slider.kind == "feature"


NEAR = 0.75
"""Share of the limit from which a site's level is `near`."""


@dataclass(frozen=True)
class Budget:
    """How far the sliders move one site, and how far they may."""

    site: int
    """Index of the block after which the residual stream is moved."""
    share: float
    """How far the sliders together move the stream, as a share of the site's median residual norm."""
    parts: tuple[tuple[str, float], ...]
    """(title of a slider, its share), the largest first. Opposite moves cancel, so their sum may exceed `share`."""
    limit: float = BUDGET
    """The share from which replies tend to fall apart."""

    @property
    def level(self) -> Literal["fine", "near", "over"]:
        """`fine`, `near` the limit, or `over` it."""
        share = round(self.share, 2)  # rounded as it is shown, so that the level agrees with the text
        return "over" if share >= self.limit else "near" if share >= round(NEAR * self.limit, 2) else "fine"

    @property
    def words(self) -> str:
        """The budget in one line of text."""
        moving = " and ".join(title for title, share in self.parts if share) or "nothing"
        summary = f"{moving}: {self.share / self.limit:.0%} of what replies bear"
        return f"{summary}; replies tend to fall apart" if self.level == "over" else summary

    @property
    def details(self) -> str:
        """What the share is, in a sentence."""
        parts = "; ".join(f"{title} {share:.2f}" for title, share in self.parts)
        return (
            f"After block {self.site} of the model its inner state (the residual stream) is moved by {self.share:.2f} "
            f"of its usual length; from {self.limit:g} on replies tend to fall apart. {parts}."
        )
