"""The sliders that steer a reply: the server's live ones, one of its profiles, or those of the request itself.

`LiveSettings` holds the live sliders and the profiles of one server; `steer.serve.replies` gets a `Steered` from it
for each request, whose `edit` the engine calls before every token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.profile import Profile
from steer.core.sampler import PRESETS, Sampler
from steer.core.small_files import shown
from steer.errors import SteerError, UsageError, skip
from steer.model.profiles import use
from steer.model.sliders import Sliders
from steer.serve.errors import ApiError
from steer.serve.schemas import Steering, SteeringUpdate

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

NO_PROFILE = PRESETS["plain"]


@dataclass(frozen=True)
class Setting:
    """Slider amounts and a sampler. A Setting is not changed once a reply uses it; a new one replaces it."""

    profile: str | None
    sliders: Sliders
    sampler: Sampler = NO_PROFILE

    def warnings(self) -> list[str]:
        """Return a line for each site that is moved too far, and each slider beyond its calibrated range."""
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
    """Gives a reply its setting at every token: a fixed one, or the server's live one."""

    def __init__(self, board: LiveSettings, own: Setting | None) -> None:
        self._board, self._fixed = board, own

    @property
    def setting(self) -> Setting:
        """The reply's fixed setting, or the server's live one as it is now."""
        return self._board.live if self._fixed is None else self._fixed

    @property
    def live(self) -> bool:
        """Whether the reply follows the server's live sliders."""
        return self._fixed is None

    def edit(self) -> Edit | None:
        """Return the edit to apply for the next token."""
        return self.setting.sliders.current


class LiveSettings:
    """A model's profiles, and the live sliders, which steer every reply whose request names no sliders or profile.

    A change replaces the live setting by a new one, so that all of the change acts from the same token on.
    """

    def __init__(self, model: SteeredModel, profiles: Sequence[Profile] = ()) -> None:
        """Look up the sliders of all profiles. A profile from a folder that does not fit is skipped with a warning.

        Errors: SteerError for two profiles of the same name, and for a named profile that does not fit the model.
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
        """The profiles' names."""
        return list(self._profiles)

    def steered(self, profile: str | None, asked: Steering | None) -> Steered:
        """Return the settings for a request. `profile`: from its model's name. `asked`: `steering` in its body.

        A request with sliders, even an empty object (`{}`), does not follow the live sliders: its sliders apply on top
        of its profile's, or alone if it names no profile. Errors: ApiError.
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
        """Apply an update to the live sliders, wholly or not at all. Errors: ApiError."""
        with self._lock:
            start = self._start(update.profile) if "profile" in update.model_fields_set else self.live
            self.live = self._moved(start, update.sliders, "sliders")

    def describe(self) -> dict[str, Any]:
        """Return the live setting and every slider that can be moved, as JSON."""
        setting = self.live
        sliders = setting.sliders
        rows_by_name = {n: sliders.slider(n) for n in sliders} | self._model.sliders.known()
        rows = []
        for name, slider in rows_by_name.items():
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
            choices = f"one of {', '.join(self._profiles)}" if self._profiles else "none, as the server has none"
            raise ApiError(
                404,
                f"profile {shown(profile)}: expected {choices}; GET /v1/models lists them",
                param="profile",
                code="profile_not_found",
            )
        return self._profiles[profile]

    def _moved(self, start: Setting, changes: Mapping[str, float | None], param: str) -> Setting:
        """Return a new setting: `start` with some amounts changed; None removes a slider."""
        if not changes:
            return start
        try:
            # A name is looked up in the profile first, then in the library.
            amounts = {name: a for name, a in {**start.sliders, **changes}.items() if a is not None}
            sliders = start.sliders.copy()
            sliders.find(changes)
            sliders.replace(amounts)
        except SteerError as e:
            raise ApiError(400, str(e), param=param, code="invalid_slider") from e
        return Setting(start.profile, sliders, start.sampler)


def _number(value: float) -> float | None:
    """Round for JSON; nan, which JSON does not have, becomes None."""
    return round(value, 4) if math.isfinite(value) else None
