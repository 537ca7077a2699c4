"""How directions are removed from weights: what is spared, whether norms are preserved, and the strength per block.

An `Edit` holds these values; `steer.checkpoint.ablation` applies them to the weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import UsageError

Kind = Literal["embedding", "attention", "mlp"]
"""The part of the model that a writer of the residual stream belongs to."""
Projection = Literal["plain", "projected", "biprojected"]
"""What a direction is made orthogonal to before it is removed. `plain`: nothing. `projected`: the mean of neutral text
at the direction's own site. `biprojected`: that mean at the site of each edited block."""
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


@dataclass(frozen=True)
class Kernel:
    """A strength for each block: highest at `peak`, falling in a straight line to `floor` at a distance of `width`
    blocks, and `floor` beyond."""

    peak: float
    """Number of a block, from 0; may lie between two blocks."""
    width: float
    """Distance from the peak to the floor, in blocks."""
    floor: float = 0.0
    """Strength far from the peak. 0 leaves those blocks unedited."""
    height: float = 1.0
    """Strength at the peak."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and math.isfinite(self.width) and self.width > 0):
            raise UsageError(
                f"kernel: expected a finite peak and a width above 0, found {self.peak} and {self.width}; "
                "give both in blocks"
            )
        if not 0.0 <= self.floor <= self.height <= 1.0:
            raise UsageError(f"kernel: expected 0 <= floor <= height <= 1, found {self.floor} and {self.height}")

    def at(self, block: int) -> float:
        """Strength in a block."""
        fallen = min(1.0, abs(block - self.peak) / self.width)
        return self.height - (self.height - self.floor) * fallen


@dataclass(frozen=True)
class Strengths:
    """Strengths from 0 to 1, separate for the writers of attention, MLP and embedding: a number, or a Kernel over the
    blocks."""

    attention: float | Kernel = 1.0
    mlp: float | Kernel = 1.0
    embedding: float = 0.0

    def __post_init__(self) -> None:
        for kind in get_args(Kind):
            strength = getattr(self, kind)
            kernel = isinstance(strength, Kernel) and kind != "embedding"
            if not kernel and not (isinstance(strength, (int, float)) and 0.0 <= strength <= 1.0):
                raise UsageError(f"strength of {kind}: expected a number from 0 to 1, found {strength}")

    def at(self, block: int | None, kind: Kind) -> float:
        """Strength at the writers of one kind in a block; the block is None for the embedding."""
        strength = getattr(self, kind)
        if isinstance(strength, Kernel):
            assert block is not None
            return strength.at(block)
        return float(strength)

    def describe(self) -> dict[str, object]:
        """A description as JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Method:
    """Options of an ablation beside its directions and strengths. The defaults change nothing about a plain removal."""

    projection: Projection = "plain"
    """`projected` and `biprojected` spare the part of a direction that neutral text has in common with it."""
    norm_preserving: bool = False
    """Whether each vector that a weight writes (a column, facing the residual stream) keeps its norm."""
    neutral: Float[Tensor, "blocks d"] | None = None
    """Mean of the residual stream on neutral text after each block; `projected` and `biprojected` spare it."""

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise UsageError(f"method: expected one of {', '.join(PROJECTIONS)}, found {self.projection!r}")
        if (self.neutral is None) != (self.projection == "plain"):
            raise UsageError(
                f"method {self.projection}: expected {'no ' if self.projection == 'plain' else ''}neutral means, "
                f"found {'none' if self.neutral is None else 'some'}; they are what projected and biprojected spare"
            )
        if self.neutral is None:
            return
        neutral = self.neutral.detach().to("cpu", torch.float32).contiguous()
        if neutral.ndim != 2 or not torch.isfinite(neutral).all() or not (neutral.norm(dim=1) > 0).all():
            raise UsageError(
                f"method {self.projection}: expected a finite neutral mean for every block, not zero, "
                f"found shape {tuple(neutral.shape)}; measure them again"
            )
        object.__setattr__(self, "neutral", neutral)

    @property
    def by_block(self) -> bool:
        """Whether the removed subspace differs from block to block."""
        return self.projection == "biprojected"

    def project(self, vector: Float[Tensor, " d"], site: int, block: int | None) -> Float[Tensor, " d"]:
        """The unit vector, fp64, to remove from the writers of `block`, for a direction at `site`. `block=None` means
        the embedding; it uses the mean at the direction's own site.

        Gram-Schmidt is applied twice: one pass leaves an error as large as the rounding of the part it removes.
        Errors: UsageError if nothing of the direction is left.
        """
        vector = vector.double() / vector.double().norm()
        if self.neutral is None:
            return vector
        mean = self.neutral[block if self.by_block and block is not None else site].double()
        mean = mean / mean.norm()
        for _ in range(2):
            vector = vector - (vector @ mean) * mean
        remainder = float(vector.norm())
        if remainder < 1e-4:
            raise UsageError(
                f"method {self.projection}: the direction is the neutral mean itself (a share of {remainder:.1g} is "
                "orthogonal to it), so nothing would be left to remove; ablate plainly, or find it at another site"
            )
        return vector / remainder

    def describe(self) -> dict[str, object]:
        """A description as JSON values, without the neutral means."""
        return {"projection": self.projection, "norm_preserving": self.norm_preserving}


PLAIN = Method()
