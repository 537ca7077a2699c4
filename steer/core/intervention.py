"""An intervention: a direction or a feature, the operation on it, the amount, and the schedule.

A slider set to an amount gives one intervention; `Edit.of` joins interventions into the edit of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.schedule import ALWAYS, Schedule
from steer.errors import UsageError

Operation = Literal["add", "ablate", "clamp", "cap", "scale"]
"""The operations on the value that is read: a direction's projection, or a feature's activations, in amounts. `add`
adds the amount. `ablate` removes that share of the value. `clamp` sets it to the amount. `cap` limits it to at most the
amount. `scale` multiplies its distance from the value without the trait by the amount."""
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True, eq=False)
class Intervention:
    """One slider's effect on the model. Compared by identity.

        steer.Intervention(moral, "clamp", 0.0)

    Errors: UsageError for an operation, an amount or a gate that is not possible for the target.
    """

    target: Direction | Feature
    """The direction or feature that is moved."""
    operation: Operation
    amount: float
    """In gaps of a direction or units of a feature; for `ablate` a share, for `scale` a factor."""
    when: Schedule = ALWAYS
    """The tokens on which it acts; by default all."""
    label: str | None = None
    """Name in receipts; None means the name of the target."""

    def __post_init__(self) -> None:
        check_operation(self.target, self.operation)
        check_when(self.target, self.operation, self.when)
        object.__setattr__(self, "amount", check_amount(self.name, self.operation, self.amount))

    @property
    def name(self) -> str:
        """Name in receipts: the label, else the target's name."""
        return self.label or self.target.name

    @property
    def site(self) -> int:
        """It acts on the residual stream after this block."""
        return self.target.site

    @property
    def reads(self) -> bool:
        """Whether the effect depends on the value that is read; true for all operations but `add`."""
        return self.operation != "add"

    @property
    def constant(self) -> bool:
        """Whether it adds the same vector to every token, which a bias can do as well."""
        return not self.reads and self.when.always

    @property
    def neutral(self) -> bool:
        """Whether it has no effect."""
        return is_neutral(self.operation, self.amount)

    @property
    def coefficients(self) -> tuple[tuple[float, float, float], ...]:
        """(alpha, beta, upper) for a direction, or for each latent of a feature: a value `a` that is read moves by
        `min(alpha * a + beta, upper)`."""
        if isinstance(self.target, Feature):
            return tuple(_coefficients(self.operation, self.amount, 0.0, u) for u in self.target.units)
        d = self.target
        return (_coefficients(self.operation, self.amount, d.without_mean, d.gap),)

    def share(self) -> float:
        """Distance that it moves the residual stream by, as a share of its median norm; nan where that is not known."""
        return share_of(self.target, self.operation, self.amount)

    def describe(self) -> dict[str, object]:
        """A description as JSON values, for certificates, receipts and reports."""
        out: dict[str, object] = {"name": self.name, "site": self.site, "operation": self.operation}
        if isinstance(self.target, Feature):
            f = self.target
            out |= {"dictionary": f.dictionary.name, "latents": list(f.indices), "units": list(f.units)}
        out["amount"] = self.amount
        if not self.reads:
            share = self.share()
            out["share_of_residual_norm"] = None if math.isnan(share) else round(share, 4)
        return out


def _coefficients(operation: Operation, amount: float, without: float, unit: float) -> tuple[float, float, float]:
    """The (alpha, beta, upper) of an operation for one value. `without`: the value without the trait."""
    if operation == "add":
        return 0.0, amount * unit, math.inf
    if operation in ("clamp", "cap"):
        return -1.0, without + amount * unit, 0.0 if operation == "cap" else math.inf
    if operation == "scale":
        return amount - 1, (1 - amount) * without, math.inf
    return -amount, 0.0, math.inf


def share_of(target: Direction | Feature, operation: Operation, amount: float) -> float:
    """Distance that an operation moves the residual stream by, as a share of its median norm at the site; nan where
    that is not known.

    `add` moves every token by the same distance. For the other operations the distance is that of a token of neutral
    chat: the mean projection of a direction, a feature that is silent.
    """
    if operation == "add" or isinstance(target, Feature):
        return target.share(amount if operation in ("add", "clamp") else 0.0)
    alpha, beta, upper = _coefficients(operation, amount, target.without_mean, target.gap)
    return abs(min(alpha * target.mean + beta, upper)) / target.residual_norm


def neutral_amount(operation: str) -> float | None:
    """The amount that has no effect; None for `clamp` and `cap`, where every amount can have one."""
    return {"add": 0.0, "ablate": 0.0, "scale": 1.0}.get(operation)


def is_neutral(operation: str, amount: float) -> bool:
    """Whether the operation has no effect at this amount."""
    return amount == neutral_amount(operation)


def check_amount(name: str, operation: str, amount: Any) -> float:
    """The amount as a float, if the slider `name` can be set to it. Errors: UsageError."""
    try:
        amount = float(amount)
    except (TypeError, ValueError):
        raise UsageError(f"slider {name!r}: expected a number, found {amount!r}; give an amount such as -1") from None
    if not math.isfinite(amount):
        raise UsageError(f"slider {name!r}: expected a finite amount, found {amount}")
    if operation == "ablate" and not 0 <= amount <= 1:
        raise UsageError(f"slider {name!r}: ablate takes an amount from 0 to 1, found {amount}")
    return amount


def check_operation(target: Direction | Feature, operation: str) -> None:
    """Raise UsageError unless `operation` exists and the units of a feature allow it."""
    if operation not in OPERATIONS:
        raise UsageError(f"slider {target.name!r}: expected one of {', '.join(OPERATIONS)}, found {operation!r}")
    if operation != "add" and isinstance(target, Feature) and min(target.units) < 0:
        raise UsageError(
            f"slider {target.name!r}: {operation} wants positive units, found {list(target.units)}; "
            "a latent with a negative unit can only be added"
        )


def check_when(target: Direction | Feature, operation: str, when: Schedule) -> None:
    """Raise UsageError if the schedule's gate is read later in the model than the target is moved."""
    if when.gate is None:
        return
    if operation == "ablate" and isinstance(target, Direction):
        raise UsageError(
            f"slider {target.name!r}: a direction is ablated in all that is written into the residual stream, before "
            f"a gate at site {when.gate.site} can be read; scale by 0 or clamp instead"
        )
    if when.gate.site > target.site:
        raise UsageError(
            f"slider {target.name!r}: expected a gate at its site {target.site} or before it, "
            f"found {when.gate.on.name!r} at site {when.gate.site}"
        )
