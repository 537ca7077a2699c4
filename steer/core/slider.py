"""Sliders: a direction or a feature, an operation on it, an amount and a schedule. Reads a `sliders.yaml` too.

`Edit.of` joins sliders into the edit of a model; the chat, the model and the bakes work on the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from steer.core.dictionary_files import SLIDERS
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.names import Name
from steer.core.schedule import ALWAYS, Schedule
from steer.core.small_files import read_yaml, shown, stamp
from steer.core.validation import Count, Number, from_file
from steer.errors import UsageError

Operation = Literal["add", "ablate", "clamp", "cap", "scale"]
"""What is done to a direction's projection or a feature's activations; see `Slider`."""
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True, eq=False)
class Slider:
    """A control for one direction or feature. Set to an amount, it acts on the direction's projection or the feature's
    activations, and leaves the rest of the residual stream as it is. Compared by identity.

    `add` adds amount times the direction's gap or the feature's unit. `ablate` removes that share of the value; for a
    direction, from everything that is written into the residual stream. `clamp` holds the value at the amount and `cap`
    limits it to the amount, where 0 is the value without the trait. `scale` multiplies the distance from the value
    without the trait.

        with model.steered({steer.Slider(moral, "cap"): 0.0}):
            print(model.chat("My friend lied to me."))

    Errors: UsageError for an operation, an amount or a gate that is not possible for the target.
    """

    target: Direction | Feature
    """The direction or feature that it moves."""
    operation: Operation = "add"
    amount: float = math.nan
    """In gaps of a direction or units of a feature; for `ablate` a share, for `scale` a factor. nan: not set yet."""
    when: Schedule = ALWAYS
    """The tokens on which it acts; by default all."""
    label: str | None = None
    """Its name, if that differs from its target's name, as for two sliders on one direction."""

    def __post_init__(self) -> None:
        name, gate = self.target.name, self.when.gate
        if self.operation not in OPERATIONS:
            raise UsageError(f"slider {name!r}: expected one of {', '.join(OPERATIONS)}, found {self.operation!r}")
        if self.reads and isinstance(self.target, Feature) and min(self.target.units) < 0:
            raise UsageError(
                f"slider {name!r}: {self.operation} wants positive units, found {list(self.target.units)}; "
                "a latent with a negative unit can only be added"
            )
        if gate is not None and self.ablates:
            raise UsageError(
                f"slider {name!r}: a direction is ablated in all that is written into the residual stream, before "
                f"a gate at site {gate.site} can be read; scale by 0 or clamp instead"
            )
        if gate is not None and gate.site > self.site:
            raise UsageError(
                f"slider {name!r}: expected a gate at its site {self.site} or before it, "
                f"found {gate.on.name!r} at site {gate.site}"
            )
        if not (isinstance(self.amount, float) and math.isnan(self.amount)):
            object.__setattr__(self, "amount", self.check(self.amount))

    @property
    def name(self) -> str:
        """The label, else the name of the direction or feature."""
        return self.label or self.target.name

    @property
    def site(self) -> int:
        """It acts on the residual stream after this block."""
        return self.target.site

    @property
    def reads(self) -> bool:
        """Whether its effect depends on the value that is read; true for all operations but `add`."""
        return self.operation != "add"

    @property
    def ablates(self) -> bool:
        """Whether it ablates a direction, which is done at the writers and not at the site."""
        return self.operation == "ablate" and isinstance(self.target, Direction)

    @property
    def constant(self) -> bool:
        """Whether it adds the same vector to every token, which a bias can do as well."""
        return not self.reads and self.when.always

    @property
    def neutral(self) -> float | None:
        """The amount that has no effect; None for `clamp` and `cap`, which have to be deleted to have none."""
        return neutral_amount(self.operation)

    @property
    def acts(self) -> bool:
        """Whether its amount is set and has an effect."""
        return not math.isnan(self.amount) and self.amount != self.neutral

    def check(self, amount: Any) -> float:
        """The amount as a float, if the slider can be set to it. Errors: UsageError."""
        return check_amount(self.name, self.operation, amount)

    def at(self, amount: float) -> Slider:
        """The slider at this amount."""
        return replace(self, amount=self.check(amount))

    @property
    def coefficients(self) -> tuple[tuple[float, float, float], ...]:
        """(alpha, beta, upper) for a direction, or for each latent of a feature: a value `a` that is read moves by
        `min(alpha * a + beta, upper)`."""
        if isinstance(self.target, Feature):
            return tuple(self._coefficients(0.0, unit) for unit in self.target.units)
        return (self._coefficients(self.target.without_mean, self.target.gap),)

    def _coefficients(self, without: float, unit: float) -> tuple[float, float, float]:
        """`coefficients` for one value. `without`: the value without the trait."""
        if self.operation == "add":
            return 0.0, self.amount * unit, math.inf
        if self.operation == "scale":
            return self.amount - 1, (1 - self.amount) * without, math.inf
        if self.operation == "ablate":
            return -self.amount, 0.0, math.inf
        return -1.0, without + self.amount * unit, 0.0 if self.operation == "cap" else math.inf

    def share(self, amount: float | None = None) -> float:
        """Distance that it moves the residual stream by at an amount, by default its own, as a share of the median norm
        at the site; nan where that is not known.

        `add` moves every token by the same distance. For the other operations the distance is that of a token of
        neutral chat: the mean projection of a direction, a feature that is silent.
        """
        slider, target = self if amount is None else self.at(amount), self.target
        if self.operation == "add" or isinstance(target, Feature):
            return target.share(slider.amount if self.operation in ("add", "clamp") else 0.0)
        ((alpha, beta, upper),) = slider.coefficients
        return abs(min(alpha * target.mean + beta, upper)) / target.residual_norm

    def describe(self) -> dict[str, object]:
        """A description as JSON values, for certificates and reports."""
        out: dict[str, object] = {"name": self.name, "site": self.site, "operation": self.operation}
        if isinstance(self.target, Feature):
            f = self.target
            out |= {"dictionary": f.dictionary.name, "latents": list(f.indices), "units": list(f.units)}
        out["amount"] = self.amount
        if not self.reads:
            out["share_of_residual_norm"] = rounded(self.share())
        return out


def rounded(share: float) -> float | None:
    """A share of the residual norm for JSON: four digits, None where it is not known."""
    return None if math.isnan(share) else round(share, 4)


def neutral_amount(operation: str) -> float | None:
    """The amount that has no effect; None for `clamp` and `cap`, where every amount can have one."""
    return {"add": 0.0, "ablate": 0.0, "scale": 1.0}.get(operation)


def check_amount(name: str, operation: str, amount: Any) -> float:
    """The amount as a float, if the slider `name` can be set to it. Errors: UsageError."""
    try:
        amount = float(amount)
    except (TypeError, ValueError, OverflowError):
        found = shown(amount)
        raise UsageError(f"slider {name!r}: expected a number, found {found}; give an amount such as -1") from None
    if not math.isfinite(amount):
        raise UsageError(f"slider {name!r}: expected a finite amount, found {amount}")
    if operation == "ablate" and not 0 <= amount <= 1:
        raise UsageError(f"slider {name!r}: ablate takes an amount from 0 to 1, found {amount}")
    return amount


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


def parse_amounts(texts: Iterable[str]) -> dict[str, float]:
    """Return the amounts of several `NAME=AMOUNT` by name. Errors: UsageError, also for a name that comes twice."""
    amounts: dict[str, float] = {}
    for name, amount in map(parse_amount, texts):
        if name in amounts:
            raise UsageError(f"slider {name!r}: expected one amount, found {amounts[name]:g} and {amount:g}; "
                             "leave one out")  # fmt: skip
        amounts[name] = amount
    return amounts


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
