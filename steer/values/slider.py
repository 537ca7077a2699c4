"""A slider: a direction or a feature, an operation, when it acts, and which amounts it can stand at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.values.feature import Feature
from steer.values.move import (
    OPERATIONS,
    Move,
    Operation,
    check_amount,
    check_operation,
    check_when,
    is_neutral,
    neutral_amount,
    share_of,
)
from steer.values.when import ALWAYS, When


@dataclass(frozen=True, eq=False)
class Slider:
    """What moving it does.

    To a direction's projection, or a feature's activations: `add` adds amount times its gap, or unit. `ablate` takes
    that share away, for a direction from all that is written into the residual stream. `clamp` holds it at amount,
    `cap` at most there, 0 being where the trait is absent; `scale` multiplies what it is beyond that.
    The rest of the residual stream stays as it is.
    """

    target: Direction | Feature
    """What it moves."""
    operation: Operation = "add"
    when: When = ALWAYS
    label: str | None = None
    """Its name, where it is not that of what it moves: two sliders on one direction."""

    def __post_init__(self) -> None:
        check_operation(self.target, self.operation)
        check_when(self.target, self.operation, self.when)

    @property
    def name(self) -> str:
        """Its own, or the direction's or the feature's."""
        return self.label or self.target.name

    @property
    def site(self) -> int:
        """The residual stream after this block."""
        return self.target.site

    @property
    def neutral(self) -> float | None:
        """The amount that moves nothing; None for `clamp` and `cap`, which do so only by being deleted."""
        return neutral_amount(self.operation)

    def is_neutral(self, amount: float) -> bool:
        """Whether it moves nothing when it stands there."""
        return is_neutral(self.operation, amount)

    def share(self, amount: float) -> float:
        """How far it moves the residual stream at an amount, as a share of its median norm; nan where that is not
        known. `move.share_of` says for which tokens."""
        return share_of(self.target, self.operation, amount)

    def check(self, amount: Any) -> float:
        """The amount as a number, if this slider can stand there. Errors: UsageError."""
        return check_amount(self.name, self.operation, amount)

    def at(self, amount: float) -> Move:
        """What it does when it stands there."""
        return Move(self.target, self.operation, amount, self.when, self.label)


def parse_amount(text: str) -> tuple[str, float]:
    """`NAME=AMOUNT` or `NAME:OPERATION=AMOUNT` from a command line. Errors: UsageError."""
    name, eq, amount = text.rpartition("=")
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


def parse_name(text: str) -> tuple[str, Operation | None]:
    """`NAME` or `NAME:OPERATION` as name and operation, None where none is named. Errors: UsageError."""
    name, colon, operation = text.rpartition(":")
    if not colon:
        return text, None
    if operation not in OPERATIONS:
        raise UsageError(
            f"slider {text!r}: expected NAME:OPERATION with one of {', '.join(OPERATIONS)}, found {operation!r}"
        )
    return name, operation
