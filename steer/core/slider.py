"""Sliders: a direction or a feature with an operation and a schedule. Also reads the named ones in a `sliders.yaml`.

A slider set to an amount is an `Intervention` (`Slider.at`); the model, the chat and the bakes work on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from steer.core.dictionary_files import SLIDERS
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.intervention import (
    OPERATIONS,
    Intervention,
    Operation,
    check_amount,
    check_operation,
    check_when,
    is_neutral,
    neutral_amount,
    share_of,
)
from steer.core.names import is_name
from steer.core.schedule import ALWAYS, Schedule
from steer.core.small_files import read_yaml, shown, stamp
from steer.errors import SteerError, UsageError


@dataclass(frozen=True, eq=False)
class Slider:
    """A control for one direction or feature. Set to an amount, it acts on the direction's projection or the feature's
    activations, and leaves the rest of the residual stream as it is:

    `add` adds amount times the direction's gap or the feature's unit. `ablate` removes that share of the value; for a
    direction, from everything that is written into the residual stream. `clamp` holds the value at the amount and `cap`
    limits it to the amount, where 0 is the value without the trait. `scale` multiplies the distance from the value
    without the trait.

        with model.steered({steer.Slider(moral, "cap"): 0.0}):
            print(model.chat("My friend lied to me."))
    """

    target: Direction | Feature
    """The direction or feature that it moves."""
    operation: Operation = "add"
    """One of `add`, `ablate`, `clamp`, `cap` and `scale`."""
    when: Schedule = ALWAYS
    """The tokens on which it acts; by default all."""
    label: str | None = None
    """Its name, if that differs from its target's name, as for two sliders on one direction."""

    def __post_init__(self) -> None:
        check_operation(self.target, self.operation)
        check_when(self.target, self.operation, self.when)

    @property
    def name(self) -> str:
        """The label, else the name of the direction or feature."""
        return self.label or self.target.name

    @property
    def site(self) -> int:
        """It acts on the residual stream after this block."""
        return self.target.site

    @property
    def neutral(self) -> float | None:
        """The amount that has no effect; None for `clamp` and `cap`, which have to be deleted to have none."""
        return neutral_amount(self.operation)

    def is_neutral(self, amount: float) -> bool:
        """Whether it has no effect at this amount."""
        return is_neutral(self.operation, amount)

    def share(self, amount: float) -> float:
        """Distance that it moves the residual stream by at this amount, as a share of its median norm; nan where that
        is not known. `intervention.share_of` says for which tokens."""
        return share_of(self.target, self.operation, amount)

    def check(self, amount: Any) -> float:
        """The amount as a float, if the slider can be set to it. Errors: UsageError."""
        return check_amount(self.name, self.operation, amount)

    def at(self, amount: float) -> Intervention:
        """The intervention of this slider at an amount."""
        return Intervention(self.target, self.operation, amount, self.when, self.label)


def parse_amount(text: str) -> tuple[str, float]:
    """Split `NAME=AMOUNT` or `NAME:OPERATION=AMOUNT` from a command line into name and amount. Errors: UsageError."""
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
    """Split `NAME` or `NAME:OPERATION` into name and operation; None without one. Errors: UsageError."""
    name, colon, operation = text.rpartition(":")
    if not colon:
        return text, None
    if operation not in OPERATIONS:
        raise UsageError(
            f"slider {text!r}: expected NAME:OPERATION with one of {', '.join(OPERATIONS)}, found {operation!r}"
        )
    return name, operation


def slider_rows(place: Path) -> list[dict[str, Any]]:
    """The rows of a dictionary's sliders.yaml: name, latents, one unit per latent, and perhaps an operation. Empty
    without that file. An unchanged file is read only once.

    Errors: SteerError of one line that names the file, for any other contents.
    """
    file = place / SLIDERS
    return _rows(file, stamp(file)) if file.is_file() else []


@lru_cache(maxsize=64)
def _rows(file: Path, stamp: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = read_yaml(file, "sliders", aliases=True) or []
    for row in rows if isinstance(rows, list) else [rows]:
        if not _is_slider(row):
            raise SteerError(
                f"{file}: expected a list of sliders with name, latents and a unit each, found {shown(row)}; "
                "mend the file, or make it again with steer find"
            )
    return rows


def _is_slider(row: Any) -> bool:
    if not isinstance(row, dict) or not is_name(row.get("name")):
        return False
    latents, units = row.get("latents"), row.get("units")
    if not isinstance(latents, list) or not isinstance(units, list) or not 0 < len(latents) == len(units):
        return False
    if not isinstance(row.get("trait", ""), str) or row.get("operation", "add") not in OPERATIONS:
        return False
    return all(type(i) is int and 0 <= i < 2**31 for i in latents) and all(map(_is_unit, units))


def _is_unit(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30 and value != 0 and math.isfinite(value)
