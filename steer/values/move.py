"""A move: a direction or a feature, what is done to it, how much, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.values.feature import Feature
from steer.values.when import ALWAYS, When

Operation = Literal["add", "ablate", "clamp", "cap", "scale"]
"""On what is read, a direction's projection or a feature's activations, in amounts:
`add`: plus amount. `ablate`: that share of it is gone. `clamp`: stands at amount. `cap`: at most amount.
`scale`: what it is beyond the trait's absence, times amount."""
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True, eq=False)
class Move:
    """Compared by identity. Errors: UsageError for an operation, an amount or a gate that cannot be."""

    target: Direction | Feature
    operation: Operation
    amount: float
    when: When = ALWAYS
    label: str | None = None
    """What receipts call it; by default what it moves."""

    def __post_init__(self) -> None:
        check_operation(self.target, self.operation)
        check_when(self.target, self.operation, self.when)
        object.__setattr__(self, "amount", check_amount(self.name, self.operation, self.amount))

    @property
    def name(self) -> str:
        """What receipts call it."""
        return self.label or self.target.name

    @property
    def site(self) -> int:
        """The residual stream after this block."""
        return self.target.site

    @property
    def reads(self) -> bool:
        """Whether what it does depends on what it reads; all but `add`."""
        return self.operation != "add"

    @property
    def constant(self) -> bool:
        """Whether it adds one vector to every token alike, which a bias can do as well."""
        return not self.reads and self.when.always

    @property
    def neutral(self) -> bool:
        """Whether it moves nothing."""
        return is_neutral(self.operation, self.amount)

    @property
    def coefficients(self) -> tuple[tuple[float, float, float], ...]:
        """One for a direction, one a latent for a feature: (alpha, beta, upper), what is read moves by
        `min(alpha * a + beta, upper)`."""
        if isinstance(self.target, Feature):
            return tuple(_coefficients(self.operation, self.amount, 0.0, u) for u in self.target.units)
        d = self.target
        return (_coefficients(self.operation, self.amount, d.without_mean, d.gap),)

    def share(self) -> float:
        """How far it moves the residual stream, as a share of its median norm; nan where that is not known."""
        return share_of(self.target, self.operation, self.amount)

    def describe(self) -> dict[str, object]:
        """A JSON-able account for certificates, receipts and reports."""
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
    if operation == "add":
        return 0.0, amount * unit, math.inf
    if operation in ("clamp", "cap"):
        return -1.0, without + amount * unit, 0.0 if operation == "cap" else math.inf
    if operation == "scale":
        return amount - 1, (1 - amount) * without, math.inf
    return -amount, 0.0, math.inf


def share_of(target: Direction | Feature, operation: Operation, amount: float) -> float:
    """How far an operation moves the residual stream, as a share of its median norm at the site; nan where that is
    not known.

    `add` moves every token alike. The others are told for a token of neutral chat: a direction's mean projection,
    a feature that is silent.
    """
    if operation == "add" or isinstance(target, Feature):
        return target.share(amount if operation in ("add", "clamp") else 0.0)
    alpha, beta, upper = _coefficients(operation, amount, target.without_mean, target.gap)
    return abs(min(alpha * target.mean + beta, upper)) / target.residual_norm


def neutral_amount(operation: str) -> float | None:
    """The amount that moves nothing; None for `clamp` and `cap`, which have none."""
    return {"add": 0.0, "ablate": 0.0, "scale": 1.0}.get(operation)


def is_neutral(operation: str, amount: float) -> bool:
    """Whether that amount moves nothing."""
    return amount == neutral_amount(operation)


def check_amount(name: str, operation: str, amount: Any) -> float:
    """The amount as a number, if the slider `name` can stand there. Errors: UsageError."""
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
    """Raise UsageError unless `operation` is one, and a feature's units allow it."""
    if operation not in OPERATIONS:
        raise UsageError(f"slider {target.name!r}: expected one of {', '.join(OPERATIONS)}, found {operation!r}")
    if operation != "add" and isinstance(target, Feature) and min(target.units) < 0:
        raise UsageError(
            f"slider {target.name!r}: {operation} wants positive units, found {list(target.units)}; "
            "a latent with a negative unit can only be added"
        )


def check_when(target: Direction | Feature, operation: str, when: When) -> None:
    """Raise UsageError for a gate that is read too late."""
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
