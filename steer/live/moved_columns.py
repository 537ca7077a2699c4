"""The columns that moves make: directions set together, subspaces ablated, latents, vectors added at times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from steer.live.columns import Columns, Term
from steer.live.table import Table
from steer.values.dictionary import Dictionary
from steer.values.direction import Direction
from steer.values.fit import OUTLIER
from steer.values.move import Move
from steer.values.when import PARALLEL, Gate


def joint(
    moves: Sequence[tuple[int, Move]], rows: int, order: Sequence[Place], gain: Float[Tensor, " d"] | None = None
) -> Columns:
    """Projections on several directions, set together whatever the angles between them.

    With `R` the directions, `h += R^+ (wanted - R h)` is the smallest change after which every projection stands where
    it was asked to, `R^+` the pseudoinverse; for ablation at full strength it is the orthogonal projection.

    Before an RMSNorm of this gain a direction stands at `gain * r`: see `weights.ablation`.
    """
    r, lengths = torch.stack([p.direction.vector.double() for p in order]), None
    if gain is not None:
        r = r * gain
        lengths = r.norm(dim=-1)
        r = r / lengths[:, None]
    column = {p.key: j for j, p in enumerate(order)}
    of_row: dict[int, list[Move]] = {}
    for row, m in moves:
        of_row.setdefault(row, []).append(m)
    terms = [
        Term(row, column[place.key], m, m.coefficients[0])
        for row, own in of_row.items()
        for m, place in zip(own, places(own), strict=True)
    ]
    spread = None
    if len(order) > 1 and not all(t.move.when.always for t in terms):
        left, sizes, basis = torch.linalg.svd(r, full_matrices=False)
        write, spread = basis, Table(_pseudoinverses(left * sizes))
    else:
        write = torch.zeros_like(r)
        taken = sorted({t.column for t in terms})
        if taken:
            write[taken] = torch.linalg.pinv(r[taken], rtol=PARALLEL).T
    return Columns(
        rows, terms, Table(write[None]), Table(r.T), spread=spread,
        sites=tuple(p.direction.site for p in order), gates=tuple(p.gate for p in order),
        # Ablation acts on what writers write, which has no such tokens.
        limits=None if moves[0][1].operation == "ablate" else _limits([p.direction.residual_norm for p in order]),
        normed=None if lengths is None else Table(lengths[None, None]),
    )  # fmt: skip


def subspaces(parts: Sequence[tuple[Float[Tensor, "d k"], Mapping[int, float]]], rows: int) -> Columns:
    """Ablations of subspaces, which no slider stands for: an orthonormal basis of each, and the strength by row. A row
    has one of them at most."""
    q = torch.cat([basis.double() for basis, _ in parts], dim=1)
    out = Columns(rows, [], Table(q.T[None]), Table(q), told=False)
    first = 0
    for basis, strengths in parts:
        for row, strength in strengths.items():
            out.alpha.data[row, 0, first : first + basis.shape[1]] = -strength
        first += basis.shape[1]
    return out


@dataclass(frozen=True)
class Place:
    """What a column of directions that are set jointly is for."""

    direction: Direction
    gate: Gate | None
    number: int
    """Several moves of a row may have the same direction and gate, at different times."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for places that one column serves."""
        return id(self.direction), self.gate and self.gate.key, self.number


def places(moves: Sequence[Move]) -> list[Place]:
    """The place of each of a row's moves."""
    out: list[Place] = []
    for m in moves:
        assert isinstance(m.target, Direction)
        place = Place(m.target, m.when.gate, 0)
        out.append(replace(place, number=sum(replace(p, number=0).key == place.key for p in out)))
    return out


def _limits(norms: Sequence[float]) -> Table | None:
    """The norm beyond which a token is none of a column's business, for columns whose site's median norm is known."""
    known = [math.inf if math.isnan(norm) else OUTLIER * norm for norm in norms]
    return Table(torch.tensor([[known]], dtype=torch.float64)) if min(known) < math.inf else None


def _pseudoinverses(r: Float[Tensor, "n d"]) -> Float[Tensor, "subsets d n"]:
    """Of every subset of the rows; bit `j` of the subset's number is set where row `j` is in it."""
    numbers = torch.arange(2 ** len(r))
    acting = (numbers[:, None] >> torch.arange(len(r))) & 1
    return torch.linalg.pinv(r * acting[..., None], rtol=PARALLEL)


def latents(moves: Sequence[tuple[int, Move]], rows: int, dictionary: Dictionary) -> Columns:
    """Activations of one dictionary's latents, moved along their decoder rows; what it cannot reconstruct stays."""
    order: dict[tuple[object, ...], tuple[int, Gate | None]] = {}
    terms: list[Term] = []
    times: Counter[tuple[object, ...]] = Counter()
    for row, m in moves:
        gate = m.when.gate
        for latent, coefficients in zip(m.target.indices, m.coefficients, strict=True):  # type: ignore[union-attr]
            key = (latent, gate and gate.key)
            # A row's second move of one latent, at another time, has a column of its own.
            times[row, *key] += 1
            key = (*key, times[row, *key])
            order.setdefault(key, (latent, gate))
            terms.append(Term(row, list(order).index(key), m, coefficients))
    taken = tuple(latent for latent, _ in order.values())
    gates = tuple(gate for _, gate in order.values())
    # Widened first: the rows may have yet to be scaled.
    write = dictionary.part(taken).to("cpu", torch.float64).decoder_rows(range(len(taken)))
    norm = math.nan if dictionary.norm is None else dictionary.norm
    limits = _limits([norm] * len(taken))
    return Columns(rows, terms, Table(write[None]), None, dictionary, taken, gates=gates, limits=limits)


def timed_adds(moves: Sequence[tuple[int, Move]], rows: int) -> Columns:
    """Vectors that are added on some tokens only; nothing is read."""
    terms, vectors, gates = [], [], []
    for row, m in moves:
        direction = m.target if isinstance(m.target, Direction) else m.target.direction
        terms.append(Term(row, len(vectors), m, (0.0, m.amount * direction.gap, math.inf)))
        vectors.append(direction.vector.double())
        gates.append(m.when.gate)
    return Columns(rows, terms, Table(torch.stack(vectors)[None]), gates=tuple(gates))
