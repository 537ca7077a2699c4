"""The sliders that a server offers, and one chat's amounts for them, which are sent with each of its requests."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field, FiniteFloat

from steer.core.profile import Profile, ProfileSlider
from steer.core.sampler import Sampler
from steer.core.slider import OPERATIONS, Operation, check_amount, neutral_amount, parse_name
from steer.errors import UnknownNameError, UnsupportedError, UsageError
from steer.model.sliders import BUDGET, Amounts

_STEPS = 200
"""How many changes can be undone."""
_LATENT = re.compile(r"L(\d+)/\d+")


class ToldSlider(BaseModel):
    """The fields that are read from one slider of `GET /v1/steering`."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    operation: str
    amount: FiniteFloat | None = None
    share: FiniteFloat | None = None
    unit_share: FiniteFloat | None = None
    range: tuple[FiniteFloat, FiniteFloat] | None = None
    site: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    kind: str | None = None


class Told(BaseModel):
    """The fields that are read from `GET /v1/steering`. Other keys are ignored."""

    sliders: Annotated[list[ToldSlider], Field(max_length=10_000, fail_fast=True)]


class Offers(Protocol):
    """A server that lists its sliders; `RemoteModel` is one."""

    url: str

    def steering(self) -> Told:
        """Return the answer to `GET /v1/steering`. Errors: SteerError if the server does not answer."""
        ...


@dataclass(frozen=True)
class RemoteSlider:
    """A slider as its server describes it."""

    name: str
    operation: Operation
    site: int | None
    unit_share: float = math.nan
    """How far amount 1 moves the residual stream, as a share of its median norm; nan if the server does not say."""
    feature: bool = False
    """Whether the slider moves latents of a dictionary."""

    @property
    def neutral(self) -> float | None:
        """The amount at which the slider moves nothing; None if it moves nothing only when it is removed."""
        return neutral_amount(self.operation)

    def is_neutral(self, amount: float) -> bool:
        """Return whether the slider moves nothing at this amount."""
        return amount == self.neutral

    def share(self, amount: float) -> float:
        """Return how far an amount moves the residual stream, as a share of its median norm; nan if unknown."""
        if self.is_neutral(amount):
            return 0.0
        return abs(amount) * self.unit_share if self.operation == "add" else math.nan

    def check(self, amount: Any) -> float:
        """Return the amount as a number. Errors: UsageError if the slider cannot have it."""
        return check_amount(self.name, self.operation, amount)


class RemoteSliders(Amounts):
    """The amounts of one chat, which each of its requests carries. Other chats of the server are not affected."""

    def __init__(self, model: Offers) -> None:
        self.model = model
        self.ranges: dict[str, tuple[float, float]] = {}
        """Name -> calibrated range: amounts between which replies stay coherent. Only for calibrated sliders."""
        self._amounts: dict[str, float] = {}
        self._past: list[dict[str, float]] = []
        self._future: list[dict[str, float]] = []

    def known(self) -> dict[str, RemoteSlider]:
        """Return name -> every slider that the server offers. Errors: SteerError if it does not answer."""
        out: dict[str, RemoteSlider] = {}
        for row in self.model.steering().sliders:
            operation: Operation | None = next((o for o in OPERATIONS if o == row.operation), None)
            if operation is None:
                continue
            unit = row.unit_share
            if unit is None and row.share and row.amount:
                unit = row.share / abs(row.amount)
            unit = math.nan if unit is None else unit
            out[row.name] = RemoteSlider(row.name, operation, row.site, unit, row.kind == "feature")
            if row.range is not None:
                self.ranges.setdefault(row.name, row.range)
        return out

    def slider(self, name: str) -> RemoteSlider:
        """Return a slider by name: one that the server offers, the same with another operation, or a latent.

        Whether a latent exists is known only to the server. Errors: UnknownNameError, a UsageError.
        """
        known = self.known()
        if name in known:
            return known[name]
        base, operation = parse_name(name)
        if match := _LATENT.fullmatch(base):
            return RemoteSlider(name, operation or "add", int(match[1]), feature=True)
        if base in known:
            return replace(known[base], name=name, operation=operation or known[base].operation)
        known_names = ", ".join(known) or "none"
        raise UnknownNameError(f"slider {name!r}: expected one that {self.model.url} offers, found {known_names}")

    def share(self, site: int) -> float:
        """Return how far the sliders move the residual stream at a site at most: the sum of their shares."""
        shares = [self.slider(n).share(a) for n, a in self._amounts.items() if self.slider(n).site == site]
        return sum(s for s in shares if not math.isnan(s))

    def warnings(self) -> list[str]:
        """Return one line for every site whose sliders together move the residual stream too far."""
        sites = {s for n in self._amounts if (s := self.slider(n).site) is not None}
        return [
            f"sliders move the residual stream after block {s} by up to {self.share(s):.2f} of its norm; "
            f"replies tend to fall apart from {BUDGET}"
            for s in sorted(sites)
            if round(self.share(s), 2) >= BUDGET
        ]

    def put(self, slider: Any, amount: float | None = None) -> None:
        """Refuse: a server accepts no sliders but its own. Errors: UnsupportedError."""
        raise UnsupportedError(f"{self.model.url}: expected one of the server's own sliders, found {slider.name!r}")

    def reset(self) -> None:
        """Remove all amounts, so that no slider moves anything."""
        self.replace({})

    def replace(self, amounts: Mapping[str, float]) -> None:
        """Set these amounts and remove all others."""
        self._change({n: self.slider(n).check(a) for n, a in amounts.items()})

    def undo(self) -> bool:
        """Undo the last change. Return False if there is none."""
        return self._step(self._past, self._future)

    def redo(self) -> bool:
        """Redo the last change that was undone. Return False if there is none."""
        return self._step(self._future, self._past)

    def _change(self, amounts: dict[str, float]) -> None:
        if amounts != self._amounts:
            self._past = [*self._past[1 - _STEPS :], self._amounts]
            self._future.clear()
            self._amounts = amounts

    def _step(self, back: list[dict[str, float]], forth: list[dict[str, float]]) -> bool:
        if not back:
            return False
        forth.append(self._amounts)
        self._amounts = back.pop()
        return True


def use_remote(sliders: RemoteSliders, profile: Profile) -> None:
    """Set the amounts of a profile's sliders and remove all others.

    Errors: UsageError for a slider that the server does not offer, and for what a request cannot express: files and
    schedules.
    """
    amounts: dict[str, float] = {}
    ranges: dict[str, tuple[float, float]] = {}
    for entry in profile.sliders:
        if entry.when is not None or profile.file_of(entry.slider) is not None:
            what = "a slider that acts at times" if entry.when is not None else f"the file {entry.slider!r}"
            raise UsageError(
                f"profile {profile.name!r}: expected sliders by name and amount, which is what a request can ask "
                f"{sliders.model.url} for, found {what}; start the server with it: steer serve MODEL --profile FILE"
            )
        usual_operation = sliders.slider(entry.slider).operation
        name = entry.slider if entry.operation in (None, usual_operation) else f"{entry.slider}:{entry.operation}"
        if entry.enabled:
            amounts[name] = entry.amount
        if entry.range is not None:
            ranges[name] = entry.range
    sliders.replace(amounts)
    sliders.ranges |= ranges


def remote_profile(name: str, sliders: RemoteSliders, sampler: Sampler) -> Profile:
    """Return the current amounts and a sampler as a profile that can be saved."""
    entries = []
    for label, amount in sliders.items():
        base, operation = parse_name(label)
        entries.append(ProfileSlider(base, amount, operation, range=sliders.ranges.get(label)))
    return Profile(name, sampler=sampler, preset=None, sliders=tuple(entries))
