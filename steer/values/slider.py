"""A slider: a direction or a feature, an operation, and which amounts it can stand at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.values.feature import (
    Feature,
    FeatureOperation,
    check_amount,
    check_operation,
    is_neutral,
    neutral_amount,
)

Operation = FeatureOperation
"""What moving a slider does. A direction takes `add` and `ablate`."""


@dataclass(frozen=True, eq=False)
class Slider:
    """What moving it does.

    Of a direction, `add`: projection plus amount times gap. `ablate`: that share of the projection is removed from
    everything that is written into the residual stream; 1 removes it all.
    Of a feature's activations, `add`: plus amount units. `clamp`: they stand at amount units. `scale`: times amount.
    `ablate`: that share of them is taken away. The rest of the residual stream stays as it is.
    """

    direction: Direction | Feature
    """What it moves."""
    operation: Operation = "add"

    def __post_init__(self) -> None:
        if isinstance(self.direction, Feature):
            check_operation(self.direction, self.operation)
        elif self.operation not in ("add", "ablate"):
            raise UsageError(
                f"slider {self.direction.name!r}: expected add or ablate for a direction, found {self.operation!r}; "
                "clamp and scale take a feature of a dictionary"
            )

    @property
    def name(self) -> str:
        """The direction's or the feature's."""
        return self.direction.name

    @property
    def site(self) -> int:
        """The residual stream after this block."""
        return self.direction.site

    @property
    def neutral(self) -> float | None:
        """The amount that moves nothing; None for `clamp`, which does so only by being deleted."""
        return neutral_amount(self.operation)

    def is_neutral(self, amount: float) -> bool:
        """Whether it moves nothing when it stands there."""
        return is_neutral(self.operation, amount)

    def share(self, amount: float) -> float:
        """How far `add` moves the residual stream, as a share of its median norm; nan where that is not known, and
        0 for the operations that depend on the token."""
        return self.direction.share(amount) if self.operation == "add" else 0.0

    def check(self, amount: Any) -> float:
        """The amount as a number, if this slider can stand there. Errors: UsageError."""
        return check_amount(self.name, self.operation, amount)


def parse_amount(text: str) -> tuple[str, float]:
    """`NAME=AMOUNT` from a command line. Errors: UsageError."""
    name, eq, amount = text.partition("=")
    try:
        if not eq or not name:
            raise ValueError
        value = float(amount)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"slider {text!r}: expected NAME=AMOUNT with a number, as in moralizing=-1, found {amount or text!r}"
        ) from None
    return name.strip(), value
