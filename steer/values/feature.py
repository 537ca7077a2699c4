"""A feature: a latent of a dictionary, or a few moved together, with the unit of their amounts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import MismatchError, UnsupportedError, UsageError
from steer.values.dictionary import Dictionary
from steer.values.dictionary_files import feature_row
from steer.values.direction import Direction


@dataclass(frozen=True, eq=False)
class Feature:
    """One latent, or a set of a few that are moved together. Compared and hashed by identity."""

    name: str
    """What its slider is called; `L14/123` for latent 123 of a dictionary at site 14."""
    dictionary: Dictionary
    indices: tuple[int, ...]
    """Its latents."""
    units: tuple[float, ...]
    """A latent each: a high quantile (0.99) of its positive activations. A negative one is for `add` alone, and
    moves that latent the other way."""

    def __post_init__(self) -> None:
        d = self.dictionary
        object.__setattr__(self, "indices", tuple(int(i) for i in self.indices))
        object.__setattr__(self, "units", tuple(float(u) for u in self.units))
        if not self.indices or len(set(self.indices)) < len(self.indices) or len(self.units) != len(self.indices):
            raise UsageError(
                f"feature {self.name!r}: expected different latents with a unit each, found latents "
                f"{list(self.indices)} and units {list(self.units)}"
            )
        if not all(0 <= i < d.latents for i in self.indices):
            raise UsageError(
                f"feature {self.name!r}: expected latents from 0 to {d.latents - 1} of dictionary {d.name!r}, "
                f"found {list(self.indices)}"
            )
        if not all(math.isfinite(u) and u for u in self.units):
            raise UsageError(
                f"feature {self.name!r}: expected finite units other than 0, found {list(self.units)}; "
                "a latent without one never fired"
            )
        if d.site is None:
            raise UsageError(
                f"feature {self.name!r}: dictionary {d.name!r} names no site of the residual stream "
                f"(its hook: {d.metadata.get('hook_name') or 'none'}); only those can be moved"
            )
        if d.normalize != "none":
            raise UnsupportedError(
                f"feature {self.name!r}: dictionary {d.name!r} normalises every input ({d.normalize}), so its latents "
                "have no fixed direction to move along; use a dictionary with normalize_activations none"
            )

    @classmethod
    def latent(cls, dictionary: Dictionary, index: int, unit: float | None = None, name: str | None = None) -> Feature:
        """One latent, by default with the unit that the dictionary's features.jsonl gives it.

        Errors: UsageError for a latent that is not there, or that never fired.
        """
        unit = float(feature_row(dictionary, index)["unit"] if unit is None else unit)
        return cls(name or f"L{dictionary.site}/{index}", dictionary, (index,), (unit,))

    @property
    def site(self) -> int:
        """The residual stream after this block."""
        assert self.dictionary.site is not None
        return self.dictionary.site

    @cached_property
    def decoder(self) -> Float[Tensor, "n d"]:
        """What one unit of activation of each latent adds to the residual stream."""
        return self.dictionary.decoder_rows(self.indices).cpu()

    @cached_property
    def direction(self) -> Direction:
        """What `add` adds, with a gap that makes amount 1 one unit of every latent."""
        shift = torch.tensor(self.units, dtype=torch.float64) @ self.decoder.double()
        d = self.dictionary
        provenance: dict[str, Any] = {"dictionary": d.name, "latents": list(self.indices), "units": list(self.units)}
        provenance |= {k: d.manifest[k] for k in ("checkpoint", "sketch") if k in d.manifest}
        return Direction(
            self.name, self.site, shift, with_mean=float(shift.norm()), without_mean=0.0,
            residual_norm=d.norm or math.nan, provenance=provenance,
        )  # fmt: skip

    def share(self, amount: float) -> float:
        """How far `add` moves the residual stream, as a share of its median norm; nan where that is not known."""
        return self.direction.share(amount)

    def check_width(self, width: int, where: str) -> None:
        """Raise MismatchError unless the residual stream of `where` has its dictionary's width."""
        if self.dictionary.width != width:
            raise MismatchError(
                f"feature {self.name!r}: its dictionary {self.dictionary.name!r} has width {self.dictionary.width}, "
                f"{where} has residual width {width}; use a dictionary of this checkpoint"
            )
