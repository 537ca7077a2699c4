"""How far the sliders move the residual stream at each site, and how far they may."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from steer.live.sliders import BUDGET

Level = Literal["fine", "near", "over"]
NEAR = 0.75
"""The share of the limit from which it is near."""


@dataclass(frozen=True)
class Budget:
    """One site."""

    site: int
    """The residual stream after this block."""
    share: float
    """What the sliders together move, as a share of the site's median residual norm."""
    parts: tuple[tuple[str, float], ...]
    """(slider, its own share), the largest first; what pulls apart cancels, so that they may come to more."""
    limit: float = BUDGET
    """The share from which replies tend to fall apart."""

    @property
    def level(self) -> Level:
        """How near the limit is."""
        share = round(self.share, 2)  # as it is shown: no level hangs on the last bit
        return "over" if share >= self.limit else "near" if share >= round(NEAR * self.limit, 2) else "fine"

    @property
    def words(self) -> str:
        """A line for people."""
        told = f"block {self.site}: {self.share:.2f} of {self.limit:g}"
        return f"{told}; replies tend to fall apart" if self.level == "over" else told


def budgets(sliders: Any, on: bool = True) -> list[Budget]:
    """A budget for each site where sliders stand, in their order; `sliders` as `steer.live.sliders.Sliders`. With
    `on` false nothing moves."""
    parts: dict[int, list[tuple[str, float]]] = {}
    for name in sliders:
        slider, amount = sliders.slider(name), sliders[name]
        share = 0.0 if slider.is_neutral(amount) else slider.share(amount)
        if slider.site is not None:
            parts.setdefault(slider.site, []).append((name, 0.0 if math.isnan(share) or not on else share))
    return [
        Budget(site, sliders.share(site) if on else 0.0, tuple(sorted(own, key=lambda p: -p[1])))
        for site, own in sorted(parts.items())
    ]


def amount_at(slider: Any, share: float) -> float | None:
    """The amount of a slider that adds at which it moves the residual stream by a share; None for others, and where
    that is not known."""
    if slider.operation != "add":
        return None
    one = slider.share(1.0)
    return share / one if math.isfinite(one) and one > 0 else None
