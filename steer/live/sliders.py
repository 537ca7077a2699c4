"""The live sliders of a model: a mapping from names to amounts, felt by the next token."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING

from steer.errors import UsageError
from steer.live.library import directions_of, find_direction
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.slider import Slider

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

BUDGET = 0.8
"""Share of the residual norm, summed over the sliders of a site, from which replies tend to fall apart."""


class Sliders(MutableMapping[str, float]):
    """`model.sliders["moralizing"] = -0.5`. Names are directions known for this checkpoint, or ones given to
    `put`. Deleting a slider, or setting it to 0, leaves the model as it was.

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

    def put(self, slider: Slider | Direction, amount: float = 0.0) -> None:
        """Make a slider known under its direction's name, and set it."""
        slider = slider if isinstance(slider, Slider) else Slider(slider)
        self._model.steering.check(Edit(add=((slider.direction, 0.0),)))
        self._known[slider.name] = slider
        self[slider.name] = amount

    def slider(self, name: str) -> Slider:
        """The slider of that name. Errors: UsageError when no direction of that name is known."""
        if name not in self._known:
            self._known[name] = Slider(find_direction(self._model, name))
        return self._known[name]

    def known(self) -> dict[str, Slider]:
        """Every slider that can be moved by name: those used so far, and the library's for the checkpoint."""
        for name, direction in directions_of(self._model.sketch()).items():
            self._known.setdefault(name, Slider(direction))
        return dict(self._known)

    def share(self, site: int) -> float:
        """How far the added sliders move the residual stream at a site, as a share of its median norm."""
        moves = [(s, a) for n, a in self._amounts.items() if (s := self._known[n]).operation == "add"]
        return sum(s.direction.share(a) for s, a in moves if s.direction.site == site)

    def warnings(self) -> list[str]:
        """A line for every site whose sliders together move the residual stream too far."""
        sites = sorted({self._known[n].direction.site for n in self._amounts})
        return [
            f"sliders move the residual stream after block {s} by {self.share(s):.2f} of its norm; "
            f"replies tend to fall apart from {BUDGET}"
            for s in sites
            if self.share(s) >= BUDGET
        ]

    def reset(self) -> None:
        """All to 0."""
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
        self.slider(name)
        return 0.0

    def _apply(self, amounts: dict[str, float]) -> None:
        edit = self.edit([(self._known[n], a) for n, a in amounts.items()])
        # Only what the model accepts is kept.
        if self._live:
            self._model.steering.set([edit])
        self._amounts, self._current = amounts, edit

    @staticmethod
    def edit(moves: Sequence[tuple[Slider, float]]) -> Edit | None:
        """Amounts of sliders as one Edit; None when nothing moves."""
        add = tuple((s.direction, s.check(a)) for s, a in moves if s.operation == "add" and a)
        ablated = [(s.direction, s.check(a)) for s, a in moves if s.operation == "ablate" and a]
        if len({a for _, a in ablated}) > 1:
            raise UsageError("ablate: expected one amount for all directions ablated together, found several")
        if not add and not ablated:
            return None
        return Edit(tuple(d for d, _ in ablated), ablated[0][1] if ablated else 1.0, None, add)


def as_slider(model: SteeredModel, key: Direction | Slider | str) -> Slider:
    """What a key of `model.steered` means."""
    if isinstance(key, str):
        return model.sliders.slider(key)
    return key if isinstance(key, Slider) else Slider(key)
