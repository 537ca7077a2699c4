"""What the slider of one trait does to every other trait: the cross-effect matrix, and its drawing.

Row: the slider that was moved. Column: the trait whose text scorer read the replies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

from steer.measure.drawing import STYLE, axes, page, svg
from steer.measure.probes.probe import Figure
from steer.measure.scorer import Scorer
from steer.measure.statistics import difference_of

STRONG = 2.0
"""Change in standard deviations at which a cell of the drawing has its full colour."""


@dataclass(frozen=True)
class CrossEffect:
    """The change that one slider makes to what one scorer reads, in standard deviations over topics of the log-odds
    that it gives to the untouched replies. nan where all of these are the same."""

    slider: str
    scorer: str
    change: float
    """Mean over topics."""
    low: float
    """The 95 % interval of the mean, from resampled topics."""
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def cross_effects(
    untouched: Sequence[str], moved: Mapping[str, Sequence[str]], scorers: Mapping[str, Scorer]
) -> list[CrossEffect]:
    """Compare replies under each slider with the untouched ones, by every scorer; row by row.

    `untouched`: one reply per topic. `moved`: slider -> its replies to the same topics in the same order. `scorers`: by
    trait.
    """
    before = {name: scorer.log_odds(untouched) for name, scorer in scorers.items()}
    out = []
    for slider, texts in moved.items():
        for name, scorer in scorers.items():
            spread = float(before[name].std(ddof=1))
            if not spread > 1e-9:
                out.append(CrossEffect(slider, name, math.nan, math.nan, math.nan))
                continue
            first, other = (
                [Figure("log-odds", str(i), float(x) / spread) for i, x in enumerate(odds)]
                for odds in (before[name], scorer.log_odds(texts))
            )
            found = difference_of(first, other)
            assert found is not None
            out.append(CrossEffect(slider, name, found.mean.value, found.mean.low, found.mean.high))
    return out


def effects_page(result: Mapping[str, Any]) -> str:
    """Return the report on a model's sliders, an HTML page: what each does to every trait, its verdict and its dose
    response. `result` has the contents of the matrix.json that examples/traits/matrix.py writes."""
    # JSON has no nan: a scorer that reads all untouched replies alike has no unit.
    effects = [CrossEffect(**{**e, **{k: math.nan for k, v in e.items() if v is None}}) for e in result["effects"]]
    return page("effects.html.j2", plot=effects_plot(effects) if effects else "", **result)


@matplotlib.rc_context(STYLE)
def effects_plot(effects: Sequence[CrossEffect]) -> str:
    """Return the matrix as an SVG element: a cell's colour and number are the change, the small number below is half of
    its interval's width; cells whose interval holds 0 are grey."""
    rows, columns = (list(dict.fromkeys(getattr(e, k) for e in effects)) for k in ("slider", "scorer"))
    values = np.array([e.change for e in effects]).reshape(len(rows), len(columns))
    figure, ax = axes((2.2 + 0.52 * len(columns), 1.6 + 0.44 * len(rows)))
    image = ax.imshow(values, cmap="RdBu_r", vmin=-STRONG, vmax=STRONG, aspect="auto")
    for i, e in enumerate(effects):
        if math.isnan(e.change):
            continue
        colour = "white" if abs(e.change) > 0.7 * STRONG else "black" if e.certain else "#8a8f98"
        half = f"\n\u00b1{(e.high - e.low) / 2:.1f}" if math.isfinite(e.high - e.low) else ""
        y, x = divmod(i, len(columns))
        ax.text(x, y, f"{e.change:+.1f}{half}", ha="center", va="center", fontsize=6.5, color=colour)
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel="trait that is read", ylabel="slider at +1")
    ax.grid(visible=False)
    figure.colorbar(image, label="change, standard deviations", shrink=0.7)
    return svg(figure)
