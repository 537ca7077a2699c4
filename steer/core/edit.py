"""An edit of a checkpoint: directions to ablate, constants to add, and interventions that read the activation.

Sliders become interventions, and `Edit.of` joins these into one Edit. The live model (`steer.model.steering`) and the
bakes (`steer.baking`) both apply that same value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, repeat

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.intervention import Intervention
from steer.core.method import PLAIN, Kind, Method, Strengths
from steer.core.schedule import PARALLEL, same_vector
from steer.errors import UsageError

MAX_JOINT_DIRECTIONS = 10
"""Most directions at one site whose projections are set together while some of them act at times only: the solution for
each subset of them is computed beforehand, and there are 2^n subsets."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a checkpoint. The bake, and the live hooks that try the edit first, use the same value.

    Example:
        edit = steer.Edit(ablate=(moral,), strength=0.8)
        edit = steer.Edit.of([steer.Intervention(moral, "add", -1.5)])
    """

    ablate: tuple[Direction, ...] = ()
    """Directions removed from the output of the writers: `y - strength * Q (Q^T y)`, Q an orthonormal basis."""
    strength: float = 1.0
    """1 removes the directions; a smaller value leaves a share of `1 - strength`."""
    blocks: tuple[int, int] | None = None
    """First and last block whose writers are edited. None: every writer, the embedding included."""
    add: tuple[tuple[Direction, float], ...] = ()
    """(direction, amount): adds `amount * gap * r` to the residual stream at the direction's site, as a bias on that
    block's down projection."""
    moves: tuple[Intervention, ...] = ()
    """Interventions that are neither in `ablate` nor in `add`. Weights can hold the ones that always add; the others
    depend on the activation, or act on some tokens only."""
    labels: tuple[str | None, ...] = ()
    """Names in receipts for the entries of `ablate` and then of `add`; None, or a missing entry, means the direction's
    name."""
    method: Method = PLAIN
    """Which part of the directions is spared, and whether norms are preserved, when they are removed."""
    strengths: Strengths | None = None
    """Strengths per kind of writer and per block, instead of the one number `strength`."""

    def __post_init__(self) -> None:
        if not self.ablate and not self.add and not self.moves:
            raise UsageError("nothing to bake: expected a direction to ablate or an amount to add, found none")
        if not 0.0 < self.strength <= 1.0:
            raise UsageError(f"strength: expected a number above 0 and at most 1, found {self.strength}")
        if self.blocks is not None and not 0 <= self.blocks[0] <= self.blocks[1]:
            raise UsageError(
                f"blocks: expected FIRST-LAST with 0 <= FIRST <= LAST, found {self.blocks[0]}-{self.blocks[1]}"
            )
        if self.strengths is not None and self.strength != 1.0:
            raise UsageError(f"strength: expected one number or strengths by kind, found {self.strength} and both")
        _check_conflicts(self.moves)
        self._check_number()

    @classmethod
    def of(cls, moves: Sequence[Intervention]) -> Edit | None:
        """Join the sliders' interventions into one Edit, with as much as possible in the form that weights can hold.
        None if nothing moves. The order of the interventions does not matter."""
        moving = [m for m in moves if not m.neutral]
        if not moving:
            return None
        _check_conflicts(moving)
        ablated = [m for m in moving if m.operation == "ablate" and isinstance(m.target, Direction)]
        if any(not m.when.always for m in ablated) or len({m.amount for m in ablated}) > 1:
            ablated = []  # weights cannot hold these, so they stay in `moves`
        constant = [m for m in moving if m.constant and isinstance(m.target, Direction)]
        return cls(
            ablate=tuple(_direction(m) for m in ablated),
            strength=ablated[0].amount if ablated else 1.0,
            add=tuple((_direction(m), m.amount) for m in constant),
            moves=tuple(m for m in moving if m not in ablated and m not in constant),
            labels=tuple(m.label for m in (*ablated, *constant)),
        )

    @property
    def embedding(self) -> bool:
        """Whether the embedding is edited."""
        return self.strength_at(None, "embedding") > 0

    def edits_block(self, block: int) -> bool:
        """Whether the attention or MLP writers of `block` are ablated."""
        return max(self.strength_at(block, "attention"), self.strength_at(block, "mlp")) > 0

    @property
    def uneven(self) -> bool:
        """Whether the ablation differs from writer to writer, or spares something. No slider makes such an edit."""
        return self.strengths is not None or self.method is not PLAIN

    def strength_at(self, block: int | None, kind: Kind) -> float:
        """Strength at the writers of one kind in a block (None: the embedding); 0 where nothing is ablated."""
        if not self.ablate or (self.blocks and (block is None or not self.blocks[0] <= block <= self.blocks[1])):
            return 0.0
        return self.strength if self.strengths is None else self.strengths.at(block, kind)

    def basis(self, block: int | None = None) -> Float[Tensor, "d k"]:
        """Orthonormal basis Q, fp64, of the subspace that is removed from the writers of `block` (None: from the
        embedding). Linearly dependent directions are merged.

        Errors: UsageError if the method leaves nothing of a direction.
        """
        vectors = [self.method.project(d.vector, d.site, block) for d in self.ablate]
        return orthonormal(torch.stack(vectors, dim=1))

    def biases(self) -> dict[int, Float[Tensor, " d"]]:
        """Site -> the vector that `add` adds there, fp64; several adds at one site are summed. `moves` are not
        included.

        Errors: UsageError for a vector that is not finite in fp32.
        """
        out: dict[int, Tensor] = {}
        for d, amount in self.add:
            shift = amount * d.gap * d.vector.double()
            out[d.site] = out[d.site] + shift if d.site in out else shift
        for site, shift in out.items():
            if not torch.isfinite(shift.float()).all():
                raise UsageError(f"add at site {site}: expected a finite vector, found one beyond fp32; add less")
        return out

    def with_adds_as_directions(self) -> Edit:
        """The same edit with each of the `moves` that always adds converted to an entry of `add`, which biases can
        hold."""
        constant = [m for m in self.moves if m.constant and not m.neutral]
        adds = tuple((m.target.direction if isinstance(m.target, Feature) else m.target, m.amount) for m in constant)
        rest = tuple(m for m in self.moves if not m.constant)
        return replace(self, add=(*self.add, *adds), moves=rest) if adds else self

    def as_moves(self) -> tuple[Intervention, ...]:
        """The whole edit as interventions; every call returns the same objects. An uneven ablation is left out, because
        no intervention can express it."""
        return self._as_moves

    @cached_property
    def _as_moves(self) -> tuple[Intervention, ...]:
        labels = chain(self.labels, repeat(None))
        ablated = [Intervention(d, "ablate", self.strength, label=next(labels)) for d in self.ablate]
        ablated = [] if self.uneven else ablated
        added = [Intervention(d, "add", a, label=next(labels)) for d, a in self.add]
        return tuple(m for m in (*ablated, *added, *self.moves) if not m.neutral)

    def describe(self) -> dict[str, object]:
        """A description as JSON values, for certificates and reports."""
        out: dict[str, object] = {
            "ablate": [{"name": d.name, "site": d.site} for d in self.ablate],
            "strength": self.strength if self.ablate else None,
            "blocks": list(self.blocks) if self.blocks else ("all, embedding included" if self.ablate else None),
            "add": [
                {"name": d.name, "site": d.site, "amount": a, "share_of_residual_norm": _share(d, a)}
                for d, a in self.add
            ],
        }
        if self.method.describe() != PLAIN.describe():
            out["method"] = self.method.describe()
        if self.strengths is not None:
            out |= {"strength": None, "strengths": self.strengths.describe()}
        return out | {"moves": [m.describe() for m in self.moves]} if self.moves else out

    def _check_number(self) -> None:
        """Raise UsageError if more than `MAX_JOINT_DIRECTIONS` projections are set together while some act at times
        only."""
        places: dict[int, list[Intervention]] = {}
        for move in self.as_moves():
            if move.reads and isinstance(move.target, Direction):
                places.setdefault(-1 if move.operation == "ablate" else move.site, []).append(move)
        for moves in places.values():
            if len(moves) > MAX_JOINT_DIRECTIONS and not all(m.when.always for m in moves):
                raise UsageError(
                    f"sliders {', '.join(repr(m.name) for m in moves)}: expected at most {MAX_JOINT_DIRECTIONS} "
                    f"directions set together while some of them act at times only, found {len(moves)}; delete some"
                )


def _direction(move: Intervention) -> Direction:
    assert isinstance(move.target, Direction)
    return move.target


def orthonormal(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """An orthonormal basis of the columns' span; it has fewer columns where they are dependent or zero."""
    u, s, _ = torch.linalg.svd(vectors, full_matrices=False)
    return u[:, s > PARALLEL * s[0]].contiguous()


def _share(direction: Direction, amount: float) -> float | None:
    share = direction.share(amount)
    return None if math.isnan(share) else round(share, 4)


def _check_conflicts(moves: Sequence[Intervention]) -> None:
    """Raise UsageError if two interventions may set the same latent or direction on one token: each would undo the
    other."""
    claims: dict[tuple[object, ...], list[Intervention]] = {}
    directions: list[Direction] = []
    for move in moves:
        if not move.reads or move.neutral:
            continue
        if isinstance(move.target, Feature):
            dictionary = move.target.dictionary
            keys = {(id(dictionary), i): f"latent {i} of dictionary {dictionary.name!r}" for i in move.target.indices}
        else:
            # Directions are compared by their numbers, because one file may have been loaded twice.
            d = next((d for d in directions if same_vector(d, move.target)), move.target)
            directions.append(d)
            # Ablation acts at the writers, the other operations at the site: they do not conflict.
            keys = {(id(d), move.operation == "ablate"): f"direction {d.name!r}"}
        for key, what in keys.items():
            others = claims.setdefault(key, [])
            for other in others:
                if not other.when.excludes(move.when):
                    raise UsageError(
                        f"sliders {other.name!r} and {move.name!r} clamp, cap, scale or ablate "
                        f"{what}; expected one of them at most on any token, delete the other "
                        "or have them act at different times"
                    )
            others.append(move)
