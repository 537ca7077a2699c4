"""A slider: a direction, an operation, and the amount it stands at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from steer.errors import UsageError
from steer.values.direction import Direction

Operation = Literal["add", "ablate"]


@dataclass(frozen=True, eq=False)
class Slider:
    """What moving it does. `add`: projection plus amount times gap. `ablate`: that share of the projection is
    removed from everything that is written into the residual stream; 1 removes it all."""

    direction: Direction
    operation: Operation = "add"

    @property
    def name(self) -> str:
        """The direction's."""
        return self.direction.name

    def check(self, amount: Any) -> float:
        """The amount as a number, if this slider can stand there. Errors: UsageError."""
        try:
            amount = float(amount)
        except (TypeError, ValueError):
            raise UsageError(
                f"slider {self.name!r}: expected a number, found {amount!r}; give an amount such as -1"
            ) from None
        if not math.isfinite(amount):
            raise UsageError(f"slider {self.name!r}: expected a finite amount, found {amount}")
        if self.operation == "ablate" and not 0 <= amount <= 1:
            raise UsageError(f"slider {self.name!r}: ablate takes an amount from 0 to 1, found {amount}")
        return amount


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
