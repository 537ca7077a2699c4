"""A direction at a site of the residual stream, with the statistics that give slider amounts their unit.

`steer find` makes directions; sliders add them or remove them, and bakes write them into weights. One direction is one
safetensors file.
"""

from __future__ import annotations

import json
import math
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import AfterValidator, Field, SkipValidation
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steer.core.small_files import shown
from steer.core.validation import Count, Text, checked
from steer.errors import MismatchError, SteerError, UsageError
from steer.files import one_line, parse_json, write_atomic

_KEY = "steer_direction"  # safetensors header entry; it holds all fields except the vector
_LARGEST = 1e30
"""Bound on every statistic, so that its product with an amount is finite in fp32."""
_LONGEST = 200
"""Characters of a name, which stands in every list of sliders and in errors."""
_SCALARS = ("name", "site", "mean", "std", "with_mean", "without_mean", "residual_norm")


def _norm(norm: float) -> float:
    if not (0 < norm < _LARGEST or math.isnan(norm)):
        raise ValueError(f"expected a number above 0, or nan, found {norm}")
    return norm


def _printable(name: str) -> str:
    if not name.isprintable() or len(name) > _LONGEST:
        raise ValueError(f"expected printable text of at most {_LONGEST} characters, found {shown(name)}")
    return name


_Statistic = Annotated[float, Field(strict=True, gt=-_LARGEST, lt=_LARGEST)]


@checked
class Direction:
    """A unit vector `r` at a site. Projections are `a = h . r`, in the units of the residual stream, measured on
    response tokens (BOS and special tokens left out).

    Compared and hashed by identity, so it can be a key: `model.steered({moral: -1})`.

        moral = steer.Direction.load("moralizing.safetensors")
        print(moral.site, moral.gap)
    """

    name: Annotated[Text, AfterValidator(_printable)]
    """What the direction stands for, usually the trait's name."""
    site: Count
    """The direction acts on the residual stream after this block, counted from 0."""
    vector: SkipValidation[Float[Tensor, " d"]]
    """Unit norm, fp32; a vector of another norm is normalised."""
    mean: _Statistic = 0.0
    """Mean projection on neutral chat."""
    std: _Statistic = 1.0
    """Standard deviation of the projection on neutral chat."""
    with_mean: _Statistic = 1.0
    """Mean projection on replies with the trait."""
    without_mean: _Statistic = 0.0
    """Mean projection on replies without the trait."""
    residual_norm: Annotated[float, Field(strict=True), AfterValidator(_norm)] = math.nan
    """Median norm of the residual stream at the site; nan where it is not known. Clamp, cap and scale skip tokens whose
    norm is over ten times this (such as the first of a text)."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made: checkpoint fingerprint, trait, method, held-out AUROC per site, versions, seed."""

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __post_init__(self) -> None:
        vector = self.vector.detach().to("cpu", torch.float32).contiguous()
        norm = float(vector.double().norm())  # in fp32 the square of 1e20 overflows, and that of 1e-25 is 0
        if vector.ndim != 1 or not 0 < norm < math.inf:
            raise ValueError(
                f"direction {self.name!r}: expected a finite non-zero vector, found shape {tuple(vector.shape)} with "
                f"norm {norm}; find it again with `steer find`"
            )
        # A unit vector is not normalised again: each save and load would change its last bits.
        object.__setattr__(self, "vector", vector if abs(norm - 1) < 1e-6 else (vector.double() / norm).float())

    @property
    def width(self) -> int:
        """Width of the residual stream that the direction belongs to."""
        return self.vector.shape[0]

    @property
    def gap(self) -> float:
        """`with_mean - without_mean`: the distance by which amount 1 of the operation `add` moves the projection."""
        return self.with_mean - self.without_mean

    @property
    def calibrated(self) -> tuple[float, float] | None:
        """Amounts of `add` between which replies hold together, as `steer find --calibrate` measured them; None if they
        were not measured."""
        found = self.provenance.get("calibrated")
        if not (isinstance(found, list) and len(found) == 2 and all(isinstance(x, int | float) for x in found)):
            return None
        low, high = map(float, found)
        return (low, high) if -_LARGEST < low <= 0 <= high < _LARGEST else None

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
                f"{path}: expected a safetensors file with a direction, found something unreadable ({one_line(e)}); "
                "make it again with `steer find`"
            ) from e
        if (
            not isinstance(header, dict)
            or vector is None
            or not set(_SCALARS) <= set(header) <= {*_SCALARS, "provenance"}
        ):
            raise SteerError(
                f"{path}: expected a direction written by `steer find`, found a safetensors file without "
                "one; pass the file that `steer find --out` wrote"
            )
        try:
            return cls(**header | {"vector": vector})
        except UsageError as e:
            raise SteerError(f"{path}: {e}; find it again with `steer find`") from e
