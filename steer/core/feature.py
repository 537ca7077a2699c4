"""A feature: one latent of a dictionary, or a few moved together, with the unit of their amounts.

A feature can be the target of a slider just as a direction can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import feature_row
from steer.core.direction import Direction
from steer.errors import MismatchError, UnsupportedError, UsageError


@dataclass(frozen=True, eq=False)
class Feature:
    """One latent, or a few that are moved together. Compared and hashed by identity.

    Example:
        feature = steer.Feature.latent(steer.load_dictionary("path/to/dictionary"), 123)
        with model.steered({feature: 0.5}):
            print(model.chat("Hello."))
    """

    name: str
    """Name of its slider; `L14/123` for latent 123 of a dictionary at site 14."""
    dictionary: Dictionary
    indices: tuple[int, ...]
    """Indices of its latents in the dictionary."""
    units: tuple[float, ...]
    """One per latent: a high quantile (0.99) of its positive activations, so that amount 1 is a strong activation. A
    negative unit is allowed for `add` alone, and moves that latent the other way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(int(i) for i in self.indices))
        object.__setattr__(self, "units", tuple(float(u) for u in self.units))
        d, indices, units, where = self.dictionary, self.indices, self.units, f"feature {self.name!r}"
        if not indices or len(set(indices)) < len(indices) or len(units) != len(indices):
            found = f"latents {list(indices)} and units {list(units)}"
            raise UsageError(f"{where}: expected different latents with a unit each, found {found}")
        if not all(0 <= i < d.latents for i in indices):
            expected = f"latents from 0 to {d.latents - 1} of dictionary {d.name!r}"
            raise UsageError(f"{where}: expected {expected}, found {list(indices)}")
        if not all(math.isfinite(u) and u for u in units):
            found = f"{list(units)}; a latent without one never fired"
            raise UsageError(f"{where}: expected finite units other than 0, found {found}")
        if d.site is None:
            hook = d.metadata.get("hook_name") or "none"
            raise UsageError(
                f"{where}: dictionary {d.name!r} names no site of the residual stream (its hook: {hook}); only those "
                "can be moved"
            )
        if d.normalize != "none":
            raise UnsupportedError(
                f"{where}: dictionary {d.name!r} normalises every input ({d.normalize}), so its latents have no fixed "
                "direction to move along; use a dictionary with normalize_activations none"
            )

    @classmethod
    def latent(cls, dictionary: Dictionary, index: int, unit: float | None = None, name: str | None = None) -> Feature:
        """A feature of one latent. By default its unit comes from the dictionary's features.jsonl.

        Errors: UsageError for a latent that does not exist, or that never fired.
        """
        unit = float(feature_row(dictionary, index)["unit"] if unit is None else unit)
        return cls(name or f"L{dictionary.site}/{index}", dictionary, (index,), (unit,))

    @property
    def site(self) -> int:
        """The feature acts on the residual stream after this block."""
        assert self.dictionary.site is not None
        return self.dictionary.site

    @cached_property
    def decoder(self) -> Float[Tensor, "n d"]:
        """For each latent, the vector that one unit of its activation adds to the residual stream."""
        return self.dictionary.decoder_rows(self.indices).cpu()

    @cached_property
    def direction(self) -> Direction:
        """The direction that `add` adds. Its gap is the length of the shift in which every latent moves by one unit, so
        amount 1 adds that shift."""
        shift = torch.tensor(self.units, dtype=torch.float64) @ self.decoder.double()
        d = self.dictionary
        provenance: dict[str, Any] = {"dictionary": d.name, "latents": list(self.indices), "units": list(self.units)}
        provenance |= {k: d.manifest[k] for k in ("checkpoint", "sketch") if k in d.manifest}
        return Direction(
            self.name, self.site, shift, with_mean=float(shift.norm()), without_mean=0.0,
            residual_norm=d.norm or math.nan, provenance=provenance,
        )  # fmt: skip

    def share(self, amount: float) -> float:
        """Distance that `add` moves the residual stream by, as a share of its median norm; nan where that is not
        known."""
        return self.direction.share(amount)

    def check_width(self, width: int, where: str) -> None:
        """Raise MismatchError unless the residual stream of `where` has the width of the feature's dictionary."""
        if self.dictionary.width != width:
            raise MismatchError(
                f"feature {self.name!r}: its dictionary {self.dictionary.name!r} has width {self.dictionary.width}, "
                f"{where} has residual width {width}; use a dictionary of this checkpoint"
            )
