"""An edit of a checkpoint: sliders at their amounts, and how its ablations are spread over the writers.

The live model (`steer.model.steering`) and the bakes (`steer.baking`) both apply that same value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.method import PLAIN, Kind, Method, Strengths
from steer.core.schedule import PARALLEL, same_vector
from steer.core.slider import Slider, rounded
from steer.errors import UsageError

MAX_JOINT_DIRECTIONS = 10
"""Most directions at one site whose projections are set together while some of them act at times only: the solution for
each subset of them is computed beforehand, and there are 2^n subsets."""


class Edit:
    """One edit of a checkpoint. The bake, and the live hooks that try the edit first, use the same value. Compared by
    identity, and not changed once it is made.

    It is no dataclass: `dataclasses.replace(edit, strength=0.5)` would pass on sliders that have a strength already.

    Example:
        edit = steer.Edit(ablate=(moral,), strength=0.8)
        edit = steer.Edit.of([steer.Slider(moral, "add", -1.5)])
    """

    moves: tuple[Slider, ...]
    """Everything that the edit does, sliders that have no effect included."""
    blocks: tuple[int, int] | None
    method: Method
    strengths: Strengths | None

    def __init__(
        self,
        ablate: Sequence[Direction] = (),
        strength: float = 1.0,
        blocks: tuple[int, int] | None = None,
        add: Sequence[tuple[Direction, float]] = (),
        moves: Sequence[Slider] = (),
        method: Method = PLAIN,
        strengths: Strengths | None = None,
    ) -> None:
        """Join sliders at their amounts (`moves`) with directions to ablate and to add, which are sliders as well.

        `ablate`: directions removed from the output of the writers: `y - strength * Q (Q^T y)`, Q an orthonormal basis.
        `strength`: 1 removes the directions; a smaller value leaves a share of `1 - strength`.
        `blocks`: first and last block whose writers are ablated. None: every writer, the embedding included.
        `add`: (direction, amount): adds `amount * gap * r` to the residual stream at the direction's site.
        `method`: which part of the directions is spared, and whether norms are preserved, when they are removed.
        `strengths`: strengths per kind of writer and per block, instead of the one number `strength`.
        """
        if not ablate and not add and not moves:
            raise UsageError("nothing to bake: expected a direction to ablate or an amount to add, found none")
        if not 0.0 < strength <= 1.0:
            raise UsageError(f"strength: expected a number above 0 and at most 1, found {strength}")
        if blocks is not None and not 0 <= blocks[0] <= blocks[1]:
            raise UsageError(f"blocks: expected FIRST-LAST with 0 <= FIRST <= LAST, found {blocks[0]}-{blocks[1]}")
        if strengths is not None and strength != 1.0:
            raise UsageError(f"strength: expected one number or strengths by kind, found {strength} and both")
        ablated = [Slider(d, "ablate", strength) for d in ablate]
        self.moves = (*ablated, *(Slider(d).at(amount) for d, amount in add), *moves)
        self.blocks, self.method, self.strengths = blocks, method, strengths
        ablations = [m for m in self.moves if m.ablates and m.acts]
        if any(not m.when.always for m in ablations) or len({m.amount for m in ablations}) > 1:
            if self.uneven:
                raise UsageError(
                    "strengths: expected only directions ablated at one strength on every token, beside strengths by "
                    "kind or a method, found others; ablate them in another edit"
                )
            ablations = []  # weights cannot hold these
        self.ablate: tuple[Direction, ...] = tuple(_direction(m) for m in ablations)
        """The directions that weights can ablate: all of them if they are ablated at one strength on every token."""
        self.strength = ablations[0].amount if ablations else 1.0
        constant = [m for m in self.moves if m.constant and isinstance(m.target, Direction)]
        self.add: tuple[tuple[Direction, float], ...] = tuple((_direction(m), m.amount) for m in constant)
        """(direction, amount) of the vectors added to every token, as a bias does."""
        self.others = tuple(m for m in self.moves if m not in ablations and m not in constant)
        """The moves that are neither in `ablate` nor in `add`. They are features, or weights cannot hold them."""
        self._acting = tuple(m for m in self.moves if m.acts and not (self.uneven and m in ablations))
        _check_conflicts([m for m in moves if m.acts])  # directions in `ablate` may be the same: a basis is taken
        _check_number(self._acting)

    @classmethod
    def of(cls, moves: Sequence[Slider]) -> Edit | None:
        """The edit of sliders at their amounts, None if nothing moves. The order of the sliders does not matter.

        Errors: UsageError for a slider without an amount.
        """
        check_set(moves)
        moving = [m for m in moves if m.acts]
        return cls(moves=moving) if moving else None

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
        """Site -> the vector that is added there to every token, fp64, features included.

        Errors: UsageError for a vector that is not finite in fp32.
        """
        out: dict[int, Tensor] = {}
        for d, amount in self.with_adds_as_directions().add:
            shift = amount * d.gap * d.vector.double()
            out[d.site] = out[d.site] + shift if d.site in out else shift
        finite = torch.stack([*out.values()]).float().isfinite().all(-1).tolist() if out else []
        for site, fine in zip(out, finite, strict=True):
            if not fine:
                raise UsageError(f"add at site {site}: expected a finite vector, found one beyond fp32; add less")
        return out

    def with_adds_as_directions(self) -> Edit:
        """The same edit with a direction in place of each feature that is added to every token, and without moves that
        have no effect."""
        acting = [m for m in self.others if m.acts]
        features = [(m.target.direction, m.amount) for m in acting if m.constant and isinstance(m.target, Feature)]
        rest, add = [m for m in acting if not m.constant], (*self.add, *features)
        if len(rest) == len(self.others) or not (self.ablate or add or rest):
            return self
        return Edit(self.ablate, self.strength, self.blocks, add, rest, self.method, self.strengths)

    def as_moves(self) -> tuple[Slider, ...]:
        """The moves that have an effect. An uneven ablation is left out, because no slider can express it."""
        return self._acting

    def describe(self) -> dict[str, object]:
        """A description as JSON values, for certificates and reports."""
        out: dict[str, object] = {
            "ablate": [{"name": d.name, "site": d.site} for d in self.ablate],
            "strength": self.strength if self.ablate else None,
            "blocks": list(self.blocks) if self.blocks else ("all, embedding included" if self.ablate else None),
            "add": [
                {"name": d.name, "site": d.site, "amount": a, "share_of_residual_norm": rounded(d.share(a))}
                for d, a in self.add
            ],
        }
        if self.method.describe() != PLAIN.describe():
            out["method"] = self.method.describe()
        if self.strengths is not None:
            out |= {"strength": None, "strengths": self.strengths.describe()}
        return out | {"moves": [m.describe() for m in self.others]} if self.others else out


def check_set(moves: Sequence[Slider]) -> None:
    """Raise UsageError for a slider without an amount, which would be passed over."""
    if unset := next((m for m in moves if math.isnan(m.amount)), None):
        raise UsageError(f"slider {unset.name!r}: expected an amount, found none; set it with `at`")


def _direction(move: Slider) -> Direction:
    assert isinstance(move.target, Direction)
    return move.target


def orthonormal(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """An orthonormal basis of the columns' span; it has fewer columns where they are dependent or zero."""
    u, s, _ = torch.linalg.svd(vectors, full_matrices=False)
    return u[:, s > PARALLEL * s[0]].contiguous()


def _check_conflicts(moves: Sequence[Slider]) -> None:
    """Raise UsageError if two sliders may set the same latent or direction on one token: each would undo the other."""
    claims: dict[tuple[object, ...], list[Slider]] = {}
    directions: list[Direction] = []
    for move in moves:
        if not move.reads:
            continue
        if isinstance(move.target, Feature):
            dictionary = move.target.dictionary
            keys = {(id(dictionary), i): f"latent {i} of dictionary {dictionary.name!r}" for i in move.target.indices}
        else:
            # Directions are compared by their numbers, because one file may have been loaded twice.
            d = next((d for d in directions if same_vector(d, move.target)), move.target)
            directions.append(d)
            # Ablation acts at the writers, the other operations at the site: they do not conflict.
            keys = {(id(d), move.ablates): f"direction {d.name!r}"}
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


def _check_number(moves: Sequence[Slider]) -> None:
    """Raise UsageError if more than `MAX_JOINT_DIRECTIONS` projections are set together while some act at times
    only."""
    places: dict[int, list[Slider]] = {}
    for move in moves:
        if move.reads and isinstance(move.target, Direction):
            places.setdefault(-1 if move.ablates else move.site, []).append(move)
    for together in places.values():
        if len(together) > MAX_JOINT_DIRECTIONS and not all(m.when.always for m in together):
            raise UsageError(
                f"sliders {', '.join(repr(m.name) for m in together)}: expected at most {MAX_JOINT_DIRECTIONS} "
                f"directions set together while some of them act at times only, found {len(together)}; delete some"
            )
