"""A direction at a site of the residual stream, with the statistics that give its amounts a unit."""

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

from steer.errors import MismatchError, SteerError, UsageError
from steer.files import parse_json, write_atomic
from steer.values.small_files import shown

_KEY = "steer_direction"  # the safetensors header entry that holds everything but the vector
_LARGEST = 1e30
"""What a statistic stays below: products of it with an amount are finite in fp32."""
_SCALARS = ("name", "site", "mean", "std", "with_mean", "without_mean", "residual_norm")


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector at a site. Projections are `a = h . r`, in the units of the residual stream,
    measured on response tokens (BOS and special tokens left out).

    Compared and hashed by identity, so it can be a key: `model.steered({moral: -1})`.
    """

    name: str
    """What it is of, usually the trait's name."""
    site: int
    """The residual stream after this block, from 0."""
    vector: Float[Tensor, " d"]
    """Unit norm, fp32."""
    mean: float = 0.0
    """Mean projection on neutral chat."""
    std: float = 1.0
    """Standard deviation of the projection on neutral chat."""
    with_mean: float = 1.0
    """Mean projection on replies with the trait."""
    without_mean: float = 0.0
    """Mean projection on replies without the trait."""
    residual_norm: float = math.nan
    """Median norm of the residual stream at the site; nan where it is not known. Tokens with over ten times as much
    (the first of a text) are none that clamp, cap or scale would touch."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it came from: checkpoint fingerprint, trait, method, held-out AUROC per site, versions, seed."""

    def __post_init__(self) -> None:
        self._check_statistics()
        vector = self.vector.detach().to("cpu", torch.float32).contiguous()
        norm = float(vector.double().norm())  # in fp32 the square of 1e20 is infinite, and that of 1e-25 nothing
        if vector.ndim != 1 or not 0 < norm < math.inf:
            raise UsageError(
                f"direction {self.name!r}: expected a finite non-zero vector, found shape "
                f"{tuple(vector.shape)} with norm {norm}; find it again with `steer find`"
            )
        # A unit vector stays as it is, or each save and load would move its last bits.
        object.__setattr__(self, "vector", vector if abs(norm - 1) < 1e-6 else (vector.double() / norm).float())

    def _check_statistics(self) -> None:
        """Raise UsageError unless every value is of its kind: headers are written by strangers too."""
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
        """The width of the residual stream it lives in."""
        return self.vector.shape[0]

    @property
    def gap(self) -> float:
        """`with_mean - without_mean`: what amount 1 of the operation `add` moves the projection by."""
        return self.with_mean - self.without_mean

    def share(self, amount: float) -> float:
        """An amount of `add` as a share of the site's median residual norm; nan where that is not known."""
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
        """Write one safetensors file: the tensor `vector`, everything else in its header."""
        header = {k: getattr(self, k) for k in _SCALARS} | {"provenance": self.provenance}
        data = save({"vector": self.vector}, metadata={_KEY: json.dumps(header)})
        return write_atomic(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a file that `save` wrote.

        Errors: SteerError when the file is missing, is no safetensors file, or holds no direction.
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
