"""The live sliders of a model: a mapping from names to amounts, which the next token is steered by.

`model.sliders` is a `Sliders`. It looks names up in the `Library`, turns its amounts into one `Edit`, and hands that to
`model.steering`, which applies it in hooks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.slider import Slider
from steer.errors import UnknownNameError
from steer.model.fit_check import warn_of_poor_fits
from steer.model.loaded import LoadedModel

BUDGET = 0.8
"""Replies tend to fall apart where the sliders of a site together move it by this share of its residual norm."""
_STEPS = 200
"""How many changes can be undone."""
_KNOWN = 1000
"""Up to this many known sliders a copy takes them all along, beyond it only those that are set: every name that a
client asks for becomes known."""
_State = dict[str, tuple[Slider, float]]
Target = Direction | Feature | Slider | str
"""What an amount can be given for: a direction or a feature, which is added, a slider, or a name as in `Sliders`."""


class Amounts(MutableMapping[str, float]):
    """A mapping from the names of sliders that were set to their amounts.

    Reading a slider that is known but was not set gives its neutral amount and sets nothing. `in`, `get`, `pop`, `del`
    and iteration see only sliders that were set.
    """

    _bound = ""
    """What warnings say before a share that is only a bound."""

    def __init__(self) -> None:
        self._amounts: dict[str, float] = {}
        self._past: list[Any] = []
        self._future: list[Any] = []
        self.ranges: dict[str, tuple[float, float]] = {}
        """Name -> the lowest and highest amount at which replies hold together, for sliders that were calibrated."""

    @abstractmethod
    def slider(self, name: str) -> Any:
        """The slider of that name. Errors: UnknownNameError, which is a UsageError and a KeyError."""

    def __getitem__(self, name: str) -> float:
        """The amount of a slider: neutral if it was not set, nan if it has no neutral amount. Errors: as `slider`."""
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
        """Set a slider unless it is set already; return its amount."""
        if name not in self._amounts:
            self[name] = default
        return self._amounts[name]

    def pop(self, name: str, *default: Any) -> Any:
        """Delete a slider that was set; return its amount, or `default` if it was not. Errors: KeyError without it."""
        if default and name not in self._amounts:
            return default[0]
        amount = self._amounts.get(name)
        del self[name]
        return amount

    def __setitem__(self, name: str, amount: float) -> None:
        self._change(self._amounts | {name: self.slider(name).check(amount)})

    def __delitem__(self, name: str) -> None:
        if name not in self._amounts:
            raise UnknownNameError(f"slider {name!r}: expected one that is set, found {', '.join(self) or 'none'}")
        self._change({n: a for n, a in self._amounts.items() if n != name})

    def reset(self) -> None:
        """Delete every slider, so that none moves anything. It can be undone."""
        self.replace({})

    @abstractmethod
    def replace(self, amounts: Mapping[str, float]) -> None:
        """Set these amounts and delete all other sliders, in one step."""

    def undo(self) -> bool:
        """Undo the last change. False when there is none."""
        return self._step(self._past, self._future)

    def redo(self) -> bool:
        """Redo the change that was undone last. False when there is none."""
        return self._step(self._future, self._past)

    @abstractmethod
    def share(self, site: int) -> float:
        """How far the sliders move the residual stream at a site, as a share of its median norm."""

    def warnings(self) -> list[str]:
        """One line for every site whose sliders together move the residual stream too far, by `BUDGET` or more."""
        sites = {site for name in self._amounts if (site := self.slider(name).site) is not None}
        return [
            f"sliders move the residual stream after block {site} by {self._bound}{share:.2f} of its norm; "
            f"replies tend to fall apart from {BUDGET}"
            for site in sorted(sites)
            if round(share := self.share(site), 2) >= BUDGET
        ]

    @abstractmethod
    def _change(self, amounts: dict[str, float]) -> None:
        """Set these amounts, and no others."""

    @abstractmethod
    def _state(self) -> Any:
        """What a change is undone to."""

    @abstractmethod
    def _restore(self, state: Any) -> None:
        """Return to what `_state` returned."""

    def _remember(self, before: Any) -> None:
        """Make a change undoable. `before`: the state before it."""
        if self._state() != before:
            self._past = [*self._past[1 - _STEPS :], before]
            self._future.clear()

    def _step(self, back: list[Any], forth: list[Any]) -> bool:
        if not back:
            return False
        before = self._state()
        self._restore(back[-1])
        back.pop()
        forth.append(before)
        return True


class Sliders(Amounts):
    """The sliders of one model, by name.

        model.sliders["moralizing"] = -0.5
        model.sliders["moralizing:cap"] = 0.2
        del model.sliders["moralizing"]

    Names are directions and features known for this checkpoint, with another operation as in `moralizing:cap`, or
    sliders given to `put`. Deleting a slider leaves the model as it was, and so does its neutral amount: 0 for add and
    ablate, 1 for scale. A clamp or a cap has no neutral amount: at 0 it holds the projection where the trait is absent.

    Sliders that are not `live` only hold amounts, for several users of one model: their owner applies `current` to the
    model when it is their turn.
    """

    def __init__(self, model: LoadedModel, *, live: bool = True) -> None:
        super().__init__()
        self.model, self._live = model, live
        self._known: dict[str, Slider] = {}
        self._current: Edit | None = None

    @property
    def current(self) -> Edit | None:
        """All amounts together as one Edit; None when nothing moves."""
        return self._current

    def put(self, slider: Slider | Direction | Feature, amount: float | None = None) -> None:
        """Make a slider known under its name, and set it. Without an amount it moves nothing yet."""
        slider = slider if isinstance(slider, Slider) else Slider(slider)
        amount = slider.neutral if amount is None else slider.check(amount)
        amounts = {n: a for n, a in self._amounts.items() if n != slider.name}
        self._change(amounts if amount is None else amounts | {slider.name: amount}, [slider])

    def copy(self) -> Sliders:
        """Sliders with the same amounts that are not live. Later changes of the copy do not change these."""
        out = Sliders(self.model, live=False)
        known = self._known if len(self._known) <= _KNOWN else {n: self._known[n] for n in self._amounts}
        out._known, out._amounts, out._current = dict(known), dict(self._amounts), self._current
        out.ranges = dict(self.ranges)
        return out

    def slider(self, name: str) -> Slider:
        """The slider of that name. Errors: UsageError when no direction or feature of that name is known."""
        return self.find([name])[0]

    def find(self, names: Collection[str]) -> list[Slider]:
        """The sliders of these names. The library on disk is read once for all of them. Errors: as `slider`."""
        library = self.model.library()
        for name in names:
            if name not in self._known:
                self._learn(name, library.slider(name))
        return [self._known[name] for name in names]

    def known(self) -> dict[str, Slider]:
        """Every slider that can be moved by name: those used so far, and the library's for the checkpoint."""
        for name, slider in self.model.library().sliders().items():
            self._learn(name, slider)
        return dict(self._known)

    def forget(self, name: str) -> None:
        """Delete a slider's amount, and know its name no more, since its file was deleted."""
        self._apply({n: a for n, a in self._amounts.items() if n != name})
        self._past.clear()
        self._future.clear()
        for known in (self._known, self.ranges):
            known.pop(name, None)

    def share(self, site: int) -> float:
        """How far the sliders move the residual stream at a site, as a share of its median norm.

        Added vectors are summed as vectors, so that opposite sliders cancel. The shares of the other operations, for a
        token of neutral chat (`Slider.share`), are added to that.
        """
        total, added = 0.0, torch.zeros(1, dtype=torch.float64)
        for slider in self.moves():
            share = slider.share()
            if slider.site != site or not slider.acts or math.isnan(share):
                continue
            if slider.reads:
                total += share
            else:
                d = slider.target if isinstance(slider.target, Direction) else slider.target.direction
                added = added + math.copysign(share, slider.amount * d.gap) * d.vector.double()
        return total + float(torch.linalg.vector_norm(added))

    def replace(self, amounts: Mapping[str, float], known: Sequence[Slider] = ()) -> None:
        """Set these amounts and delete all other sliders, in one step.

        `known`: sliders that become known under their names, in place of those known before.
        """
        new_sliders = {slider.name: slider for slider in known}
        self.find([n for n in amounts if n not in new_sliders])
        self._change({n: (new_sliders.get(n) or self._known[n]).check(a) for n, a in amounts.items()}, known)

    def edit(self, amounts: Mapping[Target, float] | Mapping[str, float]) -> Edit | None:
        """Amounts of directions, features, sliders and names as one Edit, without the amounts that are set."""
        sliders: list[tuple[Slider, float]] = []
        for key, amount in amounts.items():
            slider = self.slider(key) if isinstance(key, str) else key if isinstance(key, Slider) else Slider(key)
            sliders.append((slider, amount))
        return as_edit(self.model, sliders)

    def moves(self) -> list[Slider]:
        """Every slider that was set, at its amount, neutral ones included."""
        return [self._known[n].at(a) for n, a in self._amounts.items()]

    def _change(self, amounts: dict[str, float], known: Sequence[Slider] = ()) -> None:
        before, known_before = self._state(), self._known
        for slider in known:
            self.model.steering.check(Edit(moves=(slider,)))
        self._known = known_before | {slider.name: slider for slider in known}
        try:
            self._apply(amounts)
        except BaseException:
            self._known = known_before
            raise
        self._remember(before)

    def _learn(self, name: str, slider: Slider) -> None:
        """Know a slider of the library, unless one of its name is known, and the range it was calibrated to."""
        target = self._known.setdefault(name, slider)
        if target.operation == "add" and isinstance(target.target, Direction) and target.target.calibrated:
            self.ranges.setdefault(name, target.target.calibrated)

    def _restore(self, state: _State) -> None:
        self._known |= {name: slider for name, (slider, _) in state.items()}
        self._apply({name: amount for name, (_, amount) in state.items()})

    def _state(self) -> _State:
        return {name: (self._known[name], amount) for name, amount in self._amounts.items()}

    def _apply(self, amounts: dict[str, float]) -> None:
        # Checked before anything is stored: only an edit that the model accepts is.
        edit = as_edit(self.model, [(self._known[n], a) for n, a in amounts.items()])
        before = self._amounts, self._current
        try:
            self._amounts, self._current = amounts, edit
            if self._live:
                self.model.steering.set([edit])
        except BaseException:
            self._amounts, self._current = before
            raise


def as_edit(model: LoadedModel, sliders: list[tuple[Slider, float]]) -> Edit | None:
    """Amounts of sliders as one Edit that fits the model. Errors: UsageError, MismatchError."""
    edit = Edit.of([slider.at(amount) for slider, amount in sliders])
    if edit is not None:
        model.steering.check(edit)
        warn_of_poor_fits(model, edit)
    return edit
