"""A direction at a site of the residual stream, with the statistics that give slider amounts their unit.

`steer find` makes directions; sliders add them or remove them, and bakes write them into weights. One direction is one
safetensors file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steer.core.small_files import shown
from steer.errors import MismatchError, SteerError, UsageError
from steer.files import parse_json, write_atomic

_KEY = "steer_direction"  # safetensors header entry; it holds all fields except the vector
_LARGEST = 1e30
"""Bound on every statistic, so that its product with an amount is finite in fp32."""
_SCALARS = ("name", "site", "mean", "std", "with_mean", "without_mean", "residual_norm")


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector `r` at a site. Projections are `a = h . r`, in the units of the residual stream, measured on
    response tokens (BOS and special tokens left out).

    Compared and hashed by identity, so it can be a key: `model.steered({moral: -1})`.

        moral = steer.Direction.load("moralizing.safetensors")
        print(moral.site, moral.gap)
    """

    name: str
    """What the direction stands for, usually the trait's name."""
    site: int
    """The direction acts on the residual stream after this block, counted from 0."""
    vector: Float[Tensor, " d"]
    """Unit norm, fp32; a vector of another norm is normalised."""
    mean: float = 0.0
    """Mean projection on neutral chat."""
    std: float = 1.0
    """Standard deviation of the projection on neutral chat."""
    with_mean: float = 1.0
    """Mean projection on replies with the trait."""
    without_mean: float = 0.0
    """Mean projection on replies without the trait."""
    residual_norm: float = math.nan
    """Median norm of the residual stream at the site; nan where it is not known. Clamp, cap and scale skip tokens whose
    norm is over ten times this (such as the first of a text)."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made: checkpoint fingerprint, trait, method, held-out AUROC per site, versions, seed."""

    def __post_init__(self) -> None:
        self._check_statistics()
        vector = self.vector.detach().to("cpu", torch.float32).contiguous()
        norm = float(vector.double().norm())  # in fp32 the square of 1e20 overflows, and that of 1e-25 is 0
        if vector.ndim != 1 or not 0 < norm < math.inf:
            raise UsageError(
                f"direction {self.name!r}: expected a finite non-zero vector, found shape "
                f"{tuple(vector.shape)} with norm {norm}; find it again with `steer find`"
            )
        # A unit vector is not normalised again: each save and load would change its last bits.
        object.__setattr__(self, "vector", vector if abs(norm - 1) < 1e-6 else (vector.double() / norm).float())

    def _check_statistics(self) -> None:
        """Raise UsageError unless every value has its type and range: the header may come from a stranger's file."""
        if not isinstance(self.name, str) or not self.name.strip() or not self.name.isprintable():
            raise UsageError(f"direction: expected a name, found {shown(self.name)}; find it again with `steer find`")
        site, norm, where = self.site, self.residual_norm, f"direction {shown(self.name)}"
        if type(site) is not int or site < 0:
            raise UsageError(f"{where}: expected a site that is a whole number from 0, found {shown(site)}")
        for key in ("mean", "std", "with_mean", "without_mean"):
            if not (_number(value := getattr(self, key)) and abs(value) < _LARGEST):
                raise UsageError(f"{where}: expected a finite number under {key}, found {shown(value)}")
        if not _number(norm) or not (0 < norm < _LARGEST or math.isnan(norm)):
            raise UsageError(f"{where}: expected a residual norm above 0, or nan, found {shown(norm)}")
        if not isinstance(self.provenance, dict):
            raise UsageError(f"{where}: expected a mapping as provenance, found {shown(self.provenance)}")

    @property
    def width(self) -> int:
        """Width of the residual stream that the direction belongs to."""
        return self.vector.shape[0]

    @property
    def gap(self) -> float:
        """`with_mean - without_mean`: the distance by which amount 1 of the operation `add` moves the projection."""
        return self.with_mean - self.without_mean

    def share(self, amount: float) -> float:
        """Distance that `add` moves by at this amount, as a share of the site's median residual norm; nan where that is
        not known."""
        moved = abs(amount * self.gap)
        return moved / self.residual_norm if moved else 0.0

    def at(self, site: int) -> Direction:
        """The same vector and statistics at another site."""
        return replace(self, site=site)

    def check_width(self, width: int, where: str) -> None:
        """Raise MismatchError unless the residual stream of `where` has this direction's width."""
        if self.width != width:
            raise MismatchError(
                f"direction {self.name!r} has width {self.width}, {where} has residual width {width}; "
                f"find the direction on this checkpoint: steer find {where} {self.name}"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the tensor `vector`, and all other fields in its header."""
        header = {k: getattr(self, k) for k in _SCALARS} | {"provenance": self.provenance}
        data = save({"vector": self.vector}, metadata={_KEY: json.dumps(header)})
        return write_atomic(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a file that `save` wrote.

        Errors: SteerError if the file is missing, is not a safetensors file, or holds no direction.
        """
        path = Path(path)
        if not path.is_file():
            raise SteerError(f"{path}: expected a direction file, found none; make one with `steer find`")
        try:
            with safe_open(str(path), framework="pt") as f:
                header = parse_json((f.metadata() or {}).get(_KEY, "null"))
                vector = f.get_tensor("vector") if "vector" in f.keys() else None  # noqa: SIM118
        except (SafetensorError, ValueError) as e:
            raise SteerError(
                f"{path}: expected a safetensors file with a direction, found something unreadable ({e}); "
                "make it again with `steer find`"
            ) from e
        known = {*_SCALARS, "provenance"}
        if not isinstance(header, dict) or not set(header) <= known or not set(_SCALARS) <= set(header):
            header = None
        if header is None or vector is None:
            raise SteerError(
                f"{path}: expected a direction written by `steer find`, found a safetensors file without "
                "one; pass the file that `steer find --out` wrote"
            )
        try:
            return cls(vector=vector, provenance=header.pop("provenance", {}), **header)
        except UsageError as e:
            raise SteerError(f"{path}: {e}") from e


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
