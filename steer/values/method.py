"""How directions are taken out of weights: what is spared, what keeps its length, how strongly in each block."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import UsageError

Kind = Literal["embedding", "attention", "mlp"]
"""What a writer of the residual stream belongs to."""
Projection = Literal["plain", "projected", "biprojected"]
"""What a direction is made orthogonal to before it is removed: nothing, the neutral mean at its own site, the
neutral mean at the site of each edited block."""
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


@dataclass(frozen=True)
class Kernel:
    """A strength for each block: the highest at `peak`, falling in a straight line to `floor` at `width` blocks
    from it, and `floor` beyond."""

    peak: float
    """A block, from 0; may lie between two."""
    width: float
    """Blocks from the peak to the floor."""
    floor: float = 0.0
    """The strength far from the peak. 0 leaves those blocks as they are."""
    height: float = 1.0
    """The strength at the peak."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and math.isfinite(self.width) and self.width > 0):
            raise UsageError(
                f"kernel: expected a finite peak and a width above 0, found {self.peak} and {self.width}; "
                "give both in blocks"
            )
        if not 0.0 <= self.floor <= self.height <= 1.0:
            raise UsageError(f"kernel: expected 0 <= floor <= height <= 1, found {self.floor} and {self.height}")

    def at(self, block: int) -> float:
        """The strength in a block."""
        fallen = min(1.0, abs(block - self.peak) / self.width)
        return self.height - (self.height - self.floor) * fallen


@dataclass(frozen=True)
class Strengths:
    """Strengths from 0 to 1, apart for what attention, MLPs and the embedding write: a number, or a Kernel."""

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
        """The strength at the writers of a kind in a block, None for the embedding."""
        strength = getattr(self, kind)
        if isinstance(strength, Kernel):
            assert block is not None
            return strength.at(block)
        return float(strength)

    def describe(self) -> dict[str, object]:
        """A JSON-able account."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Method:
    """What is done beside removing directions. The default does nothing more."""

    projection: Projection = "plain"
    norm_preserving: bool = False
    """Whether each vector that a weight writes (a column, facing the residual stream) keeps its length."""
    neutral: Float[Tensor, "blocks d"] | None = None
    """Mean residual stream of neutral text after each block; `projected` and `biprojected` spare it."""

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
        """Whether what is removed differs from block to block."""
        return self.projection == "biprojected"

    def project(self, vector: Float[Tensor, " d"], site: int, block: int | None) -> Float[Tensor, " d"]:
        """The unit vector to remove from the writers of `block` (None: the embedding, which is given what is right
        at the direction's own site), fp64, for a direction at `site`.

        Gram-Schmidt, twice: once leaves an error as large as the rounding of what it takes away.
        Errors: UsageError when nothing of the direction is left.
        """
        vector = vector.double() / vector.double().norm()
        if self.neutral is None:
            return vector
        mean = self.neutral[block if self.by_block and block is not None else site].double()
        mean = mean / mean.norm()
        for _ in range(2):
            vector = vector - (vector @ mean) * mean
        left = float(vector.norm())
        if left < 1e-4:
            raise UsageError(
                f"method {self.projection}: the direction is the neutral mean itself (a share of {left:.1g} is "
                "orthogonal to it), so nothing would be left to remove; ablate plainly, or find it at another site"
            )
        return vector / left

    def describe(self) -> dict[str, object]:
        """A JSON-able account, the means left out."""
        return {"projection": self.projection, "norm_preserving": self.norm_preserving}


PLAIN = Method()
