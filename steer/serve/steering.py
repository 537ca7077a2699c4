"""The sliders that steer a reply: the server's live ones, one of its profiles, or those of the request itself.

`LiveSettings` holds the live sliders and the profiles of one server. `steer.serve.replies` asks it for the `Setting` of
each request.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.core.feature import Feature
from steer.core.profile import Profile
from steer.core.sampler import PRESETS, Sampler
from steer.core.slider import Slider
from steer.core.small_files import shown
from steer.errors import SteerError, UsageError, skip
from steer.model.profiles import use
from steer.model.sliders import Sliders
from steer.serve.errors import ApiError, invalid
from steer.serve.requests import Steering

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


@dataclass(frozen=True)
class Setting:
    """Slider amounts and a sampler. A Setting is never changed; a new one replaces it."""

    profile: str | None
    sliders: Sliders
    sampler: Sampler = PRESETS["plain"]

    def warnings(self) -> list[str]:
        """Return a line for each site that is moved too far, and each slider beyond its calibrated range."""
        lines = self.sliders.warnings()
        for name, amount in self.sliders.items():
            low, high = self.sliders.ranges.get(name, (-math.inf, math.inf))
            if not low <= amount <= high:
                lines.append(f"slider {name!r} is at {amount:g}, its calibrated range is {low:g} to {high:g}")
        return lines


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

    def setting_for(self, profile: str | None, asked: Steering) -> Setting | None:
        """Return the setting of a request, or None if it follows the live one.

        `profile`: from its model's name. `asked`: `steering` in its body. A request with sliders, even an empty object
        (`{}`), does not follow the live sliders: its sliders apply on top of its profile's, or alone if it names no
        profile. Errors: ApiError.
        """
        if asked.profile is not None:
            if profile not in (None, asked.profile):
                expected = f"{profile!r}, as the model's name has it"
                raise invalid("steering.profile", expected, shown(asked.profile))
            profile = asked.profile
        if profile is None and asked.sliders is None:
            return None
        return self._moved(self._start(profile), asked.sliders or {}, "steering.sliders")

    def change(self, update: Steering) -> None:
        """Apply an update to the live sliders, wholly or not at all. Errors: ApiError."""
        with self._lock:
            start = self._start(update.profile) if "profile" in update.model_fields_set else self.live
            self.live = self._moved(start, update.sliders or {}, "sliders")

    def describe(self) -> dict[str, Any]:
        """Return the live setting and every slider that can be moved, as JSON."""
        setting = self.live
        known = {n: setting.sliders.slider(n) for n in setting.sliders} | self._model.sliders.known()
        rows = [self._row(setting, name, slider) for name, slider in known.items()]
        warnings = setting.warnings()
        return {"profile": setting.profile, "profiles": self.profiles, "sliders": rows, "warnings": warnings}

    def describe_slider(self, name: str) -> dict[str, Any]:
        """Return one slider as `describe` does. Errors: UnknownNameError for a name that the model does not have."""
        return self._row(self.live, name, self._model.sliders.slider(name))

    def _row(self, setting: Setting, name: str, slider: Slider) -> dict[str, Any]:
        fixed = self._model.library().fixed.get(name)
        amount = setting.sliders.get(name, slider.neutral) if fixed is None else slider.amount
        return {
            "name": name,
            "kind": "feature" if isinstance(slider.target, Feature) else "direction",
            "operation": slider.operation,
            "amount": amount,
            "neutral": slider.neutral,
            "range": setting.sliders.ranges.get(name) or self._model.sliders.ranges.get(name),
            "share": None if amount is None else _number(slider.share(amount)),
            "unit_share": _number(slider.share(1.0)) if slider.operation == "add" else None,
            "site": slider.site,
            "fixed": fixed,
        }

    def _start(self, profile: str | None) -> Setting:
        if profile is None:
            return self._none
        if profile not in self._profiles:
            choices = f"one of {', '.join(self._profiles)}" if self._profiles else "none, as the server has none"
            message = f"profile {shown(profile)}: expected {choices}; GET /v1/models lists them"
            raise ApiError(404, message, param="profile", code="profile_not_found")
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
