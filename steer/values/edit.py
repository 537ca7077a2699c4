"""What is to be done to a model: directions to ablate, constants to add, moves that read what they move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, repeat

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.values.feature import Feature
from steer.values.method import PLAIN, Kind, Method, Strengths
from steer.values.move import Move
from steer.values.when import PARALLEL, same_vector

SET_TOGETHER = 10
"""Directions at one site whose projections can be set together while some of them act at times only: what each
subset of them takes is worked out beforehand."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a checkpoint. The same value drives the bake and the live hooks that try it first."""

    ablate: tuple[Direction, ...] = ()
    """Directions removed from what the writers write: `y - strength * Q (Q^T y)`, Q an orthonormal basis."""
    strength: float = 1.0
    """1 removes the directions, less leaves a share of `1 - strength`."""
    blocks: tuple[int, int] | None = None
    """First and last block whose writers are edited. None: every writer, the embedding included."""
    add: tuple[tuple[Direction, float], ...] = ()
    """(direction, amount): adds `amount * gap * r` to the residual stream at the direction's site,
    as a bias on that block's down projection."""
    moves: tuple[Move, ...] = ()
    """What else sliders do. Weights can hold those that always add; the others read the activation, or wait."""
    labels: tuple[str | None, ...] = ()
    """What receipts call what is ablated and then what is added, where not by the directions' names."""
    method: Method = PLAIN
    """What is spared and kept when the directions are removed."""
    strengths: Strengths | None = None
    """Strengths that differ between kinds of writers, or from block to block, in place of `strength`."""

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
    def of(cls, moves: Sequence[Move]) -> Edit | None:
        """Moves of sliders as one Edit, in the form that weights can hold as far as they can; None when nothing
        moves. The order of the moves does not matter."""
        moving = [m for m in moves if not m.neutral]
        if not moving:
            return None
        _check_conflicts(moving)
        gone = [m for m in moving if m.operation == "ablate" and isinstance(m.target, Direction)]
        if any(not m.when.always for m in gone) or len({m.amount for m in gone}) > 1:
            gone = []  # weights cannot hold these: they stay moves
        constant = [m for m in moving if m.constant and isinstance(m.target, Direction)]
        return cls(
            ablate=tuple(_direction(m) for m in gone),
            strength=gone[0].amount if gone else 1.0,
            add=tuple((_direction(m), m.amount) for m in constant),
            moves=tuple(m for m in moving if m not in gone and m not in constant),
            labels=tuple(m.label for m in (*gone, *constant)),
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
        """Whether what is ablated differs from writer to writer, or spares something: no slider does that."""
        return self.strengths is not None or self.method is not PLAIN

    def strength_at(self, block: int | None, kind: Kind) -> float:
        """The strength at the writers of a kind in a block (None: the embedding); 0 where nothing is ablated."""
        if not self.ablate or (self.blocks and (block is None or not self.blocks[0] <= block <= self.blocks[1])):
            return 0.0
        return self.strength if self.strengths is None else self.strengths.at(block, kind)

    def basis(self, block: int | None = None) -> Float[Tensor, "d k"]:
        """Orthonormal basis Q of what is removed from the writers of `block`, fp64; without a block, from the
        embedding. Linearly dependent directions collapse.

        Errors: UsageError when the method leaves nothing of a direction.
        """
        vectors = [self.method.project(d.vector, d.site, block) for d in self.ablate]
        return orthonormal(torch.stack(vectors, dim=1))

    def biases(self) -> dict[int, Float[Tensor, " d"]]:
        """Site -> the vector that `add` adds there, fp64; adds at one site are summed. Moves are not in it.

        Errors: UsageError for what is not finite in fp32.
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
        """The same edit, the moves that always add told as directions, which weights and biases can hold."""
        constant = [m for m in self.moves if m.constant and not m.neutral]
        adds = tuple((m.target.direction if isinstance(m.target, Feature) else m.target, m.amount) for m in constant)
        rest = tuple(m for m in self.moves if not m.constant)
        return replace(self, add=(*self.add, *adds), moves=rest) if adds else self

    def as_moves(self) -> tuple[Move, ...]:
        """Everything that it moves, as moves; the same ones at every call. An ablation that is uneven is none."""
        return self._as_moves

    @cached_property
    def _as_moves(self) -> tuple[Move, ...]:
        labels = chain(self.labels, repeat(None))
        gone = [Move(d, "ablate", self.strength, label=next(labels)) for d in self.ablate]
        gone = [] if self.uneven else gone
        added = [Move(d, "add", a, label=next(labels)) for d, a in self.add]
        return tuple(m for m in (*gone, *added, *self.moves) if not m.neutral)

    def describe(self) -> dict[str, object]:
        """A JSON-able account for certificates and reports."""
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
        """Raise UsageError for more projections than can be set together while they come and go."""
        places: dict[int, list[Move]] = {}
        for move in self.as_moves():
            if move.reads and isinstance(move.target, Direction):
                places.setdefault(-1 if move.operation == "ablate" else move.site, []).append(move)
        for moves in places.values():
            if len(moves) > SET_TOGETHER and not all(m.when.always for m in moves):
                raise UsageError(
                    f"sliders {', '.join(repr(m.name) for m in moves)}: expected at most {SET_TOGETHER} directions set "
                    f"together while some of them act at times only, found {len(moves)}; delete some"
                )


def _direction(move: Move) -> Direction:
    assert isinstance(move.target, Direction)
    return move.target


def orthonormal(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """An orthonormal basis of what the columns span, with fewer columns where they are dependent or zero."""
    u, s, _ = torch.linalg.svd(vectors, full_matrices=False)
    return u[:, s > PARALLEL * s[0]].contiguous()


def _share(direction: Direction, amount: float) -> float | None:
    share = direction.share(amount)
    return None if math.isnan(share) else round(share, 4)


def _check_conflicts(moves: Sequence[Move]) -> None:
    """Raise UsageError when two moves may set one thing on the same token: each would undo what the other did."""
    taken: dict[tuple[object, ...], list[Move]] = {}
    directions: list[Direction] = []
    for move in moves:
        if not move.reads or move.neutral:
            continue
        if isinstance(move.target, Feature):
            dictionary = move.target.dictionary
            keys = {(id(dictionary), i): f"latent {i} of dictionary {dictionary.name!r}" for i in move.target.indices}
        else:
            # By its numbers, as one file may be loaded twice.
            d = next((d for d in directions if same_vector(d, move.target)), move.target)
            directions.append(d)
            # Ablation is at the writers, the others are at the site.
            keys = {(id(d), move.operation == "ablate"): f"direction {d.name!r}"}
        for key, what in keys.items():
            others = taken.setdefault(key, [])
            for other in others:
                if not other.when.excludes(move.when):
                    raise UsageError(
                        f"sliders {other.name!r} and {move.name!r} clamp, cap, scale or ablate "
                        f"{what}; expected one of them at most on any token, delete the other "
                        "or have them act at different times"
                    )
            others.append(move)
