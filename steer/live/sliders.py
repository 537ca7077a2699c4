"""The live sliders of a model: a mapping from names to amounts, felt by the next token."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING

from steer.errors import UsageError
from steer.live.fit_check import warn_of_poor_fits
from steer.live.library import find_slider, sliders_of
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature, FeatureMove
from steer.values.slider import Slider

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

BUDGET = 0.8
"""Share of the residual norm, summed over the sliders of a site, from which replies tend to fall apart."""


class Sliders(MutableMapping[str, float]):
    """`model.sliders["moralizing"] = -0.5`. Names are directions and features known for this checkpoint, or ones
    given to `put`. Deleting a slider leaves the model as it was, and so does the amount at which it is neutral: 0
    for add and ablate, 1 for scale. A clamp has none: at 0 it holds the feature at 0.

    Sliders that are not `live` are amounts alone: whoever owns them applies `current` when it is their turn.
    """

    def __init__(self, model: SteeredModel, *, live: bool = True) -> None:
        self._model, self._live = model, live
        self._known: dict[str, Slider] = {}
        self._amounts: dict[str, float] = {}
        self._current: Edit | None = None

    @property
    def current(self) -> Edit | None:
        """All amounts together as one Edit; None when nothing moves."""
        return self._current

    def put(self, slider: Slider | Direction | Feature, amount: float | None = None) -> None:
        """Make a slider known under its direction's or feature's name, and set it. Without an amount it moves
        nothing yet."""
        slider = slider if isinstance(slider, Slider) else Slider(slider)
        self._model.steering.check(_probe(slider))
        amount = slider.neutral if amount is None else slider.check(amount)
        self._known[slider.name] = slider
        if amount is None:
            del self[slider.name]
        else:
            self[slider.name] = amount

    def slider(self, name: str) -> Slider:
        """The slider of that name. Errors: UsageError when no direction or feature of that name is known."""
        if name not in self._known:
            self._known[name] = find_slider(self._model, name)
        return self._known[name]

    def known(self) -> dict[str, Slider]:
        """Every slider that can be moved by name: those used so far, and the library's for the checkpoint."""
        for name, slider in sliders_of(self._model.sketch()).items():
            self._known.setdefault(name, slider)
        return dict(self._known)

    def share(self, site: int) -> float:
        """How far the added sliders move the residual stream at a site, as a share of its median norm."""
        shares = [s.share(a) for n, a in self._amounts.items() if (s := self._known[n]).site == site]
        return sum(share for share in shares if not math.isnan(share))

    def warnings(self) -> list[str]:
        """A line for every site whose sliders together move the residual stream too far."""
        sites = sorted({self._known[n].site for n in self._amounts})
        return [
            f"sliders move the residual stream after block {s} by {self.share(s):.2f} of its norm; "
            f"replies tend to fall apart from {BUDGET}"
            for s in sites
            if self.share(s) >= BUDGET
        ]

    def reset(self) -> None:
        """None moves anything."""
        self._apply({})

    def __setitem__(self, name: str, amount: float) -> None:
        self._apply(self._amounts | {name: self.slider(name).check(amount)})

    def __getitem__(self, name: str) -> float:
        return self._amounts[name] if name in self._amounts else self._absent(name)

    def __delitem__(self, name: str) -> None:
        self._apply({n: a for n, a in self._amounts.items() if n != name})

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._amounts))

    def __len__(self) -> int:
        return len(self._amounts)

    def _absent(self, name: str) -> float:
        neutral = self.slider(name).neutral
        return math.nan if neutral is None else neutral

    def _apply(self, amounts: dict[str, float]) -> None:
        moves = [(self._known[n], a) for n, a in amounts.items()]
        edit = self.edit(moves)
        # Only what the model accepts is kept.
        if edit is not None:
            self._model.steering.check(edit)
            warn_of_poor_fits(self._model, edit)
        if self._live:
            self._model.steering.set([edit])
        self._amounts, self._current = amounts, edit

    @staticmethod
    def edit(moves: Sequence[tuple[Slider, float]]) -> Edit | None:
        """Amounts of sliders as one Edit; None when nothing moves."""
        moving = [(s, amount) for s, a in moves if not s.is_neutral(amount := s.check(a))]
        add = tuple((s.direction, a) for s, a in moving if isinstance(s.direction, Direction) and s.operation == "add")
        ablated = [(s.direction, a) for s, a in moving if isinstance(s.direction, Direction) and s.operation != "add"]
        features = tuple(
            FeatureMove(s.direction, s.operation, a) for s, a in moving if isinstance(s.direction, Feature)
        )
        if len({a for _, a in ablated}) > 1:
            raise UsageError("ablate: expected one amount for all directions ablated together, found several")
        if not moving:
            return None
        return Edit(tuple(d for d, _ in ablated), ablated[0][1] if ablated else 1.0, None, add, features)


def as_slider(model: SteeredModel, key: Direction | Feature | Slider | str) -> Slider:
    """What a key of `model.steered` means."""
    if isinstance(key, str):
        return model.sliders.slider(key)
    return key if isinstance(key, Slider) else Slider(key)


def _probe(slider: Slider) -> Edit:
    """An edit that moves nothing, to check that the slider fits a model."""
    if isinstance(slider.direction, Feature):
        return Edit(features=(FeatureMove(slider.direction, "add", 0.0),))
    return Edit(add=((slider.direction, 0.0),))
