"""What steers a reply: the server's live sliders, one of its profiles, or what the request itself brings."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError, UsageError, skip
from steer.live.profiles import use
from steer.live.serve.errors import ApiError
from steer.live.serve.schemas import Steering, SteeringUpdate
from steer.live.sliders import Sliders
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.profile import Profile
from steer.values.sampler import PRESETS, Sampler
from steer.values.small_files import shown

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

NO_PROFILE = PRESETS["plain"]


@dataclass(frozen=True)
class Setting:
    """Sliders that stand somewhere, and how tokens are drawn beside them. Never changed once a reply goes by it."""

    profile: str | None
    sliders: Sliders
    sampler: Sampler = NO_PROFILE

    def warnings(self) -> list[str]:
        """Where the sliders move too much, or beyond what was calibrated."""
        return [
            *self.sliders.warnings(),
            *(
                f"slider {name!r} stands at {amount:g}, its calibrated range is {low:g} to {high:g}"
                for name, amount in self.sliders.items()
                for low, high in [self.sliders.ranges.get(name, (-math.inf, math.inf))]
                if not low <= amount <= high
            ),
        ]


class Steered:
    """Where a reply finds its setting, anew at every token."""

    def __init__(self, board: Board, own: Setting | None) -> None:
        self._board, self._own = board, own

    @property
    def setting(self) -> Setting:
        """Its own, or the server's live one as it stands now."""
        return self._board.live if self._own is None else self._own

    @property
    def live(self) -> bool:
        """Whether it follows the server's live sliders."""
        return self._own is None

    def edit(self) -> Edit | None:
        """What the next token goes by."""
        return self.setting.sliders.current


class Board:
    """A model's profiles, and the live sliders that all replies without settings of their own follow.

    A change puts a new setting in place of the live one, so that replies feel all of it at one token or none of it.
    """

    def __init__(self, model: SteeredModel, profiles: Sequence[Profile] = ()) -> None:
        """A profile out of a folder that does not fit the model is passed over with a warning.

        Errors: SteerError for profiles of one name, and for another that does not fit.
        """
        self._model = model
        self._lock = threading.Lock()
        self._none = Setting(None, Sliders(model, live=False))
        self._profiles: dict[str, Setting] = {}
        for profile in profiles:
            if profile.name in self._profiles:
                raise UsageError(f"profile {profile.name!r}: expected one of that name, found several; rename one")
            sliders = Sliders(model, live=False)
            try:
                use(sliders, profile)
            except SteerError as e:
                if profile.among is None:
                    raise
                skip(profile.among, e)
                continue
            self._profiles[profile.name] = Setting(profile.name, sliders, profile.sampler)
        self.live = self._none

    @property
    def profiles(self) -> list[str]:
        """Their names."""
        return list(self._profiles)

    def steered(self, profile: str | None, asked: Steering | None) -> Steered:
        """What a request that names `profile` with its model, and asks for `asked` in its body, goes by.

        Sliders that are asked for, be it none of them (`{}`), are the request's own: with no profile named they stand
        alone. Errors: ApiError.
        """
        if asked is not None and asked.profile is not None:
            if profile not in (None, asked.profile):
                raise ApiError(
                    400,
                    f"steering.profile: expected {profile!r}, as the model's name has it, found {shown(asked.profile)}",
                    param="steering.profile",
                    code="invalid_value",
                )
            profile = asked.profile
        sliders = asked.sliders if asked is not None else None
        if profile is None and sliders is None:
            return Steered(self, None)
        return Steered(self, self._moved(self._start(profile), sliders or {}, "steering.sliders"))

    def change(self, update: SteeringUpdate) -> None:
        """Move the live sliders, all or none of them. Errors: ApiError."""
        with self._lock:
            start = self._start(update.profile) if "profile" in update.model_fields_set else self.live
            self.live = self._moved(start, update.sliders, "sliders")

    def describe(self) -> dict[str, Any]:
        """The live setting and all that could be moved, as JSON."""
        setting = self.live
        sliders = setting.sliders
        there = {n: sliders.slider(n) for n in sliders} | self._model.sliders.known()
        rows = []
        for name, slider in there.items():
            amount = sliders[name] if name in set(sliders) else slider.neutral
            rows.append(
                {
                    "name": name,
                    "kind": "feature" if isinstance(slider.target, Feature) else "direction",
                    "operation": slider.operation,
                    "amount": amount,
                    "neutral": slider.neutral,
                    "range": sliders.ranges.get(name),
                    "share": None if amount is None else _number(slider.share(amount)),
                    "unit_share": _number(slider.share(1.0)) if slider.operation == "add" else None,
                    "site": slider.site,
                }
            )
        return {
            "profile": setting.profile,
            "profiles": self.profiles,
            "sliders": rows,
            "warnings": setting.warnings(),
        }

    def _start(self, profile: str | None) -> Setting:
        if profile is None:
            return self._none
        if profile not in self._profiles:
            there = f"one of {', '.join(self._profiles)}" if self._profiles else "none, as the server has none"
            raise ApiError(
                404,
                f"profile {shown(profile)}: expected {there}; GET /v1/models lists them",
                param="profile",
                code="profile_not_found",
            )
        return self._profiles[profile]

    def _moved(self, start: Setting, changes: Mapping[str, float | None], param: str) -> Setting:
        """A setting of its own, which begins where another stands."""
        if not changes:
            return start
        try:
            # A name means what it means in the profile, else what the library knows by it.
            amounts = {name: a for name, a in {**start.sliders, **changes}.items() if a is not None}
            sliders = start.sliders.copy()
            sliders.find(changes)
            sliders.replace(amounts)
        except SteerError as e:
            raise ApiError(400, str(e), param=param, code="invalid_slider") from e
        return Setting(start.profile, sliders, start.sampler)


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return round(value, 4) if math.isfinite(value) else None
