"""Sliders: a direction or a feature with an operation and a schedule. Also reads the named ones in a `sliders.yaml`.

A slider set to an amount is an `Intervention` (`Slider.at`); the model, the chat and the bakes work on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

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
from steer.core.names import Name
from steer.core.schedule import ALWAYS, Schedule
from steer.core.small_files import read_yaml, shown, stamp
from steer.core.validation import Count, Number, from_file
from steer.errors import UsageError


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


class _Row(BaseModel):
    """A named slider in a sliders.yaml. Other keys are for people."""

    name: Name
    latents: Annotated[list[Annotated[Count, Field(lt=2**31)]], Field(min_length=1)]
    units: list[Annotated[Number, Field(gt=-1e30, lt=1e30)]]
    operation: Operation = "add"
    trait: str = ""

    @model_validator(mode="after")
    def _has_units(self) -> _Row:
        if len(self.units) != len(self.latents) or 0 in self.units:
            raise ValueError(f"units: expected one for each latent, none of them 0, found {shown(self.units)}; mend it")
        return self


@lru_cache(maxsize=64)
def _rows(file: Path, stamp: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = read_yaml(file, "sliders", aliases=True) or []
    from_file(list[_Row], rows, str(file))
    return rows
