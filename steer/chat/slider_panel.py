"""The sliders of a chat as rows of the page, and how much of the residual norm they move together at each site.

`SliderPanel` wraps the sliders of a `ReplyBackend`, local or remote; the page part `sliders` draws its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from steer.chat.writer import ReplyBackend
from steer.core.feature import Feature
from steer.core.profile import Profile
from steer.core.schedule import ALWAYS, Schedule
from steer.core.slider import OPERATIONS, Operation, Slider
from steer.errors import SteerError, UnsupportedError
from steer.model.sliders import BUDGET

Kind = Literal["trait", "feature"]
SAFE = 0.4
"""Share of the residual norm up to which an uncalibrated amount counts as safe: half of the share from which replies
tend to fall apart."""
FURTHEST = 2.0
"""Largest amount of an uncalibrated slider that counts as safe, however little it moves the stream."""
RED = 1.5
"""Length of a slider's track as a multiple of its safe range."""
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

    @property
    def red(self) -> bool:
        """Whether the amount is outside the safe range."""
        return not math.isnan(self.amount) and not self.safe[0] - 1e-9 <= self.amount <= self.safe[1] + 1e-9

    @property
    def moves(self) -> bool:
        """Whether the slider moves anything at its current amount."""
        return not math.isnan(self.amount) and self.amount != self.neutral


class SliderPanel:
    """The sliders of one chat."""

    def __init__(self, voice: ReplyBackend, pinned: Iterable[str] = ()) -> None:
        self._voice = voice
        self._pinned = dict.fromkeys(pinned)
        self.revision = 0
        """Increases when an amount changes other than by `set`. It is part of the widgets' keys, so that Streamlit
        draws them again with the new amounts."""

    @property
    def on(self) -> bool:
        """The master switch: if false, no slider moves anything. The amounts stay."""
        return self._voice.on

    @on.setter
    def on(self, on: bool) -> None:
        self._voice.on = bool(on)

    @property
    def pinned(self) -> list[str]:
        """Names of the sliders that the user added to the panel."""
        return list(self._pinned)

    def rows(self) -> list[SliderRow]:
        """Return the panel's rows: traits first, then features that are pinned, have an amount, or come from a server.

        A slider that does not exist any more is skipped.
        """
        sliders = self._voice.sliders
        known = sliders.known()
        traits = [n for n, s in known.items() if _kind(s) == "trait" and _has_target_name(s, n)]
        # A server's features cannot be searched, so all that it lists are shown.
        from_server = [n for n, s in known.items() if not isinstance(s, Slider)]
        names = dict.fromkeys([*traits, *from_server, *self._pinned, *sliders])
        rows = []
        for name in names:
            try:
                rows.append(self._row(name, known.get(name) or sliders.slider(name)))
            except SteerError:
                continue
        return sorted(rows, key=lambda r: r.kind == "feature")

    def offered(self) -> list[SliderRow]:
        """Return the named features that are not on the panel and could be pinned."""
        shown_names = {r.name for r in self.rows()}
        known = self._voice.sliders.known()
        return [self._row(n, s) for n, s in known.items() if n not in shown_names and _kind(s) == "feature"]

    def row(self, name: str) -> SliderRow:
        """Return one slider's row. Errors: UsageError for a name that this checkpoint does not have."""
        return self._row(name, self._voice.sliders.slider(name))

    def set(self, name: str, amount: float) -> None:
        """Move a slider; it affects a reply in progress. Errors: UsageError, and then nothing has changed."""
        sliders = self._voice.sliders
        if name not in set(sliders) and amount == sliders.slider(name).neutral:
            return  # a slider that was not touched must not be listed as having an amount
        if name not in set(sliders) or sliders[name] != amount:
            sliders[name] = amount

    def off(self, name: str) -> None:
        """Remove a slider's amount, so that it moves nothing. A clamp has no neutral amount and needs this."""
        if name in set(self._voice.sliders):
            del self._voice.sliders[name]
            self.revision += 1

    def reset(self, name: str) -> None:
        """Reset a slider, so that it moves nothing."""
        self.off(name)

    def reset_all(self) -> None:
        """Reset all sliders, so that none moves anything."""
        self._voice.sliders.reset()
        self.revision += 1

    def undo(self) -> bool:
        """Undo the last move. Return False if there is none."""
        return self._redrawn(self._voice.sliders.undo())

    def redo(self) -> bool:
        """Redo the last move that was undone. Return False if there is none."""
        return self._redrawn(self._voice.sliders.redo())

    def pin(self, name: str) -> SliderRow:
        """Add a slider to the panel: a latent, as in `L14/123`, or a named slider of a dictionary. Return its row.

        Errors: UsageError for a slider that this checkpoint does not have.
        """
        row = self.row(name)
        self._pinned[name] = None
        return self._row(name, self._voice.sliders.slider(name)) if not row.pinned else row

    def unpin(self, name: str) -> None:
        """Remove a slider from the panel; it moves nothing any more."""
        self.off(name)
        self._pinned.pop(name, None)

    def reshape(self, name: str, operation: Operation | None = None, when: Schedule | None = None) -> None:
        """Change a slider's operation or its schedule. It keeps its amount unless the operation changes.

        Errors: UsageError for an operation that its target does not allow; UnsupportedError for a server's sliders.
        """
        if "reshape" not in self._voice.can:
            raise UnsupportedError(
                f"{self._voice.name}: its server takes amounts alone; give it a profile: steer serve --profile FILE"
            )
        sliders = self._voice.sliders
        old = sliders.slider(name)
        new = Slider(old.target, operation or old.operation, when=old.when if when is None else when, label=name)
        if (new.operation, new.when) == (old.operation, old.when):
            return
        old_amount = sliders[name] if name in set(sliders) and new.operation == old.operation else None
        sliders.put(new, old_amount)
        if new.operation != old.operation:
            # The calibrated range was measured for the old operation.
            sliders.ranges.pop(name, None)
        self.revision += 1

    def use(self, profile: Profile) -> None:
        """Set a profile's sliders and no others, and pin its features. Errors: SteerError."""
        self._voice.use(profile)
        for name in self._voice.sliders:
            if _kind(self._voice.sliders.slider(name)) == "feature":
                self._pinned[name] = None
        self.revision += 1

    def budgets(self) -> list[Budget]:
        """Return how far the sliders move each site, with the limit, and titles in place of names."""
        found = budgets(self._voice.sliders, self.on)
        return [Budget(b.site, b.share, tuple((self._title(n), share) for n, share in b.parts), b.limit) for b in found]

    def warnings(self) -> list[str]:
        """Return one line for each site that is moved too far, and each slider beyond its calibrated range."""
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
    """Return the range of amounts that counts as safe for an uncalibrated slider."""
    if slider.operation != "add":
        return _TRACKS[slider.operation]
    furthest = amount_at(slider, SAFE)
    furthest = FURTHEST if furthest is None else _rounded(min(FURTHEST, furthest))
    return -furthest, furthest


def track(slider: Any, safe: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of a slider's track: beyond the safe range, but within what the operation and site allow."""
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
    """Return the operations that a slider's target allows."""
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
    """Return a slider's title on the page. `name`: its name in the panel."""
    from steer.chat.descriptions import title_of

    if not isinstance(slider, Slider):
        return name.replace("-", " ")
    target_title = title_of(slider)
    # Two sliders on one direction need different titles.
    return (
        target_title
        if name == slider.target.name
        else f"{target_title} ({name.removeprefix(slider.target.name).strip(' :()')})"
    )


def described(slider: Any) -> str:
    """Describe what a slider moves, in words."""
    from steer.chat.descriptions import description_of

    return description_of(slider) if isinstance(slider, Slider) else "A slider of the server's."


def _kind(slider: Any) -> Kind:
    moves_latents = isinstance(slider.target, Feature) if isinstance(slider, Slider) else slider.feature
    return "feature" if moves_latents else "trait"


def _has_target_name(slider: Any, name: str) -> bool:
    """Return whether a slider has its target's name; a slider with another name is shown only if it has an amount."""
    return not isinstance(slider, Slider) or name == slider.target.name


def _rounded(value: float) -> float:
    """Round to a step of the slider widget."""
    size = abs(value)
    step = 0.5 if size >= 4 else 0.05 if size >= 0.5 else 0.01 if size >= 0.1 else 0.001
    return round(round(value / step) * step, 3)


Level = Literal["fine", "near", "over"]
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
    """(slider, its share), the largest first. Their sum may exceed `share`, because opposite moves cancel."""
    limit: float = BUDGET
    """The share from which replies tend to fall apart."""

    @property
    def level(self) -> Level:
        """`fine`, `near` the limit, or `over` it."""
        share = round(self.share, 2)  # rounded as it is shown, so that the level agrees with the text
        return "over" if share >= self.limit else "near" if share >= round(NEAR * self.limit, 2) else "fine"

    @property
    def words(self) -> str:
        """The budget in one line of text."""
        summary = f"block {self.site}: {self.share:.2f} of {self.limit:g}"
        return f"{summary}; replies tend to fall apart" if self.level == "over" else summary


def budgets(sliders: Any, on: bool = True) -> list[Budget]:
    """Return the budget of each site that has sliders, by site. `sliders`: as `steer.model.sliders.Sliders`.

    If `on` is false, all shares are 0.
    """
    parts: dict[int, list[tuple[str, float]]] = {}
    for name in sliders:
        slider, amount = sliders.slider(name), sliders[name]
        share = 0.0 if slider.is_neutral(amount) else slider.share(amount)
        if slider.site is not None:
            parts.setdefault(slider.site, []).append((name, 0.0 if math.isnan(share) or not on else share))
    return [
        Budget(site, sliders.share(site) if on else 0.0, tuple(sorted(site_parts, key=lambda p: -p[1])))
        for site, site_parts in sorted(parts.items())
    ]


def amount_at(slider: Any, share: float) -> float | None:
    """Return the amount at which a slider moves the residual stream by a share of its median norm.

    None for operations other than `add`, and if the slider's share is unknown.
    """
    if slider.operation != "add":
        return None
    unit_share = slider.share(1.0)
    return share / unit_share if math.isfinite(unit_share) and unit_share > 0 else None
