"""The live sliders of a model: a mapping from names to amounts, felt by the next token."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import UnknownNameError
from steer.live.fit_check import warn_of_poor_fits
from steer.live.library import Library
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.move import Move
from steer.values.slider import Slider

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

BUDGET = 0.8
"""Share of the residual norm, summed over the sliders of a site, from which replies tend to fall apart."""
_STEPS = 200
"""Changes that can be undone."""
_KNOWN = 1000
"""Sliders that a copy takes along, beside those that stand: every name that a client asks for is one."""
_State = dict[str, tuple[Slider, float]]


class Amounts(MutableMapping[str, float]):
    """Names of sliders to the amounts that were set.

    As in a defaultdict, reading a slider that is known and was not set gives its neutral amount and sets nothing;
    `in`, `get`, `pop`, `del` and iteration know those that were set.
    """

    _amounts: dict[str, float]

    @abstractmethod
    def slider(self, name: str) -> Any:
        """The slider of that name. Errors: UnknownNameError, which is a UsageError and a KeyError."""

    def __getitem__(self, name: str) -> float:
        """Where a slider stands: neutral if it was not set, nan if it has no neutral amount. Errors: as `slider`."""
        if name in self._amounts:
            return self._amounts[name]
        neutral = self.slider(name).neutral
        return math.nan if neutral is None else neutral

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._amounts))

    def __contains__(self, name: object) -> bool:
        return name in self._amounts

    def __len__(self) -> int:
        return len(self._amounts)

    def get(self, name: str, default: Any = None) -> Any:
        """The amount of a slider that was set; `default` for any other name, known or not."""
        return self._amounts.get(name, default)

    def setdefault(self, name: str, default: float = 0.0) -> float:
        """Set a slider that was not set yet; its amount."""
        if name not in self._amounts:
            self[name] = default
        return self._amounts[name]

    def pop(self, name: str, *default: Any) -> Any:
        """Take away a slider that was set; its amount, or `default`. Errors: KeyError without one."""
        if default and name not in self._amounts:
            return default[0]
        amount = self._set(name)
        del self[name]
        return amount

    def _set(self, name: str) -> float:
        if name not in self._amounts:
            raise UnknownNameError(f"slider {name!r}: expected one that is set, found {', '.join(self) or 'none'}")
        return self._amounts[name]


class Sliders(Amounts):
    """`model.sliders["moralizing"] = -0.5`. Names are directions and features known for this checkpoint, with another
    operation as in `moralizing:cap`, or sliders given to `put`. Deleting a slider leaves the model as it was, and so
    does the amount at which it is neutral: 0 for add and ablate, 1 for scale. A clamp or a cap has none: at 0 it holds
    the projection where the trait is absent.

    Sliders that are not `live` are amounts alone: whoever owns them applies `current` when it is their turn.
    """

    def __init__(self, model: SteeredModel, *, live: bool = True) -> None:
        self._model, self._live = model, live
        self._known: dict[str, Slider] = {}
        self._amounts: dict[str, float] = {}
        self._current: Edit | None = None
        self._past: list[_State] = []
        self._future: list[_State] = []
        self.ranges: dict[str, tuple[float, float]] = {}
        """Name -> amounts between which replies hold together, for sliders that were calibrated."""

    @property
    def current(self) -> Edit | None:
        """All amounts together as one Edit; None when nothing moves."""
        return self._current

    @property
    def model(self) -> SteeredModel:
        """Whose sliders they are."""
        return self._model

    def put(self, slider: Slider | Direction | Feature, amount: float | None = None) -> None:
        """Make a slider known under its name, and set it. Without an amount it moves nothing yet."""
        slider = slider if isinstance(slider, Slider) else Slider(slider)
        amount = slider.neutral if amount is None else slider.check(amount)
        amounts = {n: a for n, a in self._amounts.items() if n != slider.name}
        self._change(amounts if amount is None else amounts | {slider.name: amount}, [slider])

    def copy(self) -> Sliders:
        """Sliders that begin where these stand, and are not live. What they learn, these do not."""
        out = Sliders(self._model, live=False)
        known = self._known if len(self._known) <= _KNOWN else {n: self._known[n] for n in self._amounts}
        out._known, out._amounts, out._current = dict(known), dict(self._amounts), self._current
        out.ranges = dict(self.ranges)
        return out

    def slider(self, name: str) -> Slider:
        """The slider of that name. Errors: UsageError when no direction or feature of that name is known."""
        return self.find([name])[0]

    def find(self, names: Collection[str]) -> list[Slider]:
        """The sliders of these names; what is on disk is read once for all of them. Errors: as `slider`."""
        library = Library(self._model)
        for name in names:
            if name not in self._known:
                self._known[name] = library.slider(name)
        return [self._known[name] for name in names]

    def known(self) -> dict[str, Slider]:
        """Every slider that can be moved by name: those used so far, and the library's for the checkpoint."""
        for name, slider in Library(self._model).sliders().items():
            self._known.setdefault(name, slider)
        return dict(self._known)

    def share(self, site: int) -> float:
        """How far the sliders move the residual stream at a site, as a share of its median norm.

        What is added is summed as vectors, so that sliders which pull apart cancel. To it come the others, told for a
        token of neutral chat (`move.share_of`).
        """
        total, added = 0.0, None
        for name, amount in self._amounts.items():
            slider = self._known[name]
            if slider.site != site or slider.is_neutral(amount):
                continue
            share = slider.share(amount)
            if math.isnan(share):
                continue
            if slider.operation != "add":
                total += share
                continue
            d = slider.target if isinstance(slider.target, Direction) else slider.target.direction
            vector = math.copysign(share, amount * d.gap) * d.vector.double()
            added = vector if added is None else added + vector
        return total + (0.0 if added is None else float(torch.linalg.vector_norm(added)))

    def warnings(self) -> list[str]:
        """A line for every site whose sliders together move the residual stream too far."""
        sites = sorted({self._known[n].site for n in self._amounts})
        return [
            f"sliders move the residual stream after block {s} by {self.share(s):.2f} of its norm; "
            f"replies tend to fall apart from {BUDGET}"
            for s in sites
            if round(self.share(s), 2) >= BUDGET
        ]

    def reset(self) -> None:
        """None moves anything."""
        self.replace({})

    def replace(self, amounts: Mapping[str, float], known: Sequence[Slider] = ()) -> None:
        """Let these stand and no others, in one step. `known`: sliders that the names mean from now on."""
        meant = {slider.name: slider for slider in known}
        self.find([n for n in amounts if n not in meant])
        self._change({n: (meant.get(n) or self._known[n]).check(a) for n, a in amounts.items()}, known)

    def undo(self) -> bool:
        """Go back one change. False when there is none."""
        return self._step(self._past, self._future)

    def redo(self) -> bool:
        """Take back an undo. False when there is none."""
        return self._step(self._future, self._past)

    def moves(self) -> list[Move]:
        """What every slider that was set does, neutral ones included."""
        return [self._known[n].at(a) for n, a in self._amounts.items()]

    def __setitem__(self, name: str, amount: float) -> None:
        self._change(self._amounts | {name: self.slider(name).check(amount)})

    def __delitem__(self, name: str) -> None:
        self._set(name)
        self._change({n: a for n, a in self._amounts.items() if n != name})

    def _change(self, amounts: dict[str, float], known: Sequence[Slider] = ()) -> None:
        before, meant = self._state(), self._known
        for slider in known:
            self._model.steering.check(_probe(slider))
        self._known = meant | {slider.name: slider for slider in known}
        try:
            self._apply(amounts)
        except BaseException:
            self._known = meant
            raise
        if self._state() != before:
            self._past = [*self._past[1 - _STEPS :], before]
            self._future.clear()

    def _step(self, back: list[_State], forth: list[_State]) -> bool:
        if not back:
            return False
        before, state = self._state(), back[-1]
        self._known |= {name: slider for name, (slider, _) in state.items()}
        self._apply({name: amount for name, (_, amount) in state.items()})
        back.pop()
        forth.append(before)
        return True

    def _state(self) -> _State:
        return {name: (self._known[name], amount) for name, amount in self._amounts.items()}

    def _apply(self, amounts: dict[str, float]) -> None:
        edit = Edit.of([self._known[n].at(a) for n, a in amounts.items()])
        # Only what the model accepts is kept.
        if edit is not None:
            self._model.steering.check(edit)
            warn_of_poor_fits(self._model, edit)
        before = self._amounts, self._current
        try:
            self._amounts, self._current = amounts, edit
            if self._live:
                self._model.steering.set([edit])
        except BaseException:
            self._amounts, self._current = before
            raise


def as_slider(model: SteeredModel, key: Direction | Feature | Slider | str) -> Slider:
    """What a key of `model.steered` means."""
    if isinstance(key, str):
        return model.sliders.slider(key)
    return key if isinstance(key, Slider) else Slider(key)


def as_edit(model: SteeredModel, sliders: list[tuple[Slider, float]]) -> Edit | None:
    """Amounts of sliders as one Edit that fits the model. Errors: UsageError, MismatchError."""
    edit = Edit.of([slider.at(slider.check(amount)) for slider, amount in sliders])
    if edit is not None:
        model.steering.check(edit)
        warn_of_poor_fits(model, edit)
    return edit


def _probe(slider: Slider) -> Edit:
    """An edit that moves nothing, to check that the slider fits a model."""
    if slider.when.gate is not None:
        return Edit(moves=(Move(slider.target, "add", 0.0, slider.when),))
    return Edit(moves=(Move(slider.target, "add", 0.0),))
