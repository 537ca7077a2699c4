"""The edits of a batch, sorted by the module of the model that applies them.

`module_edits` turns one `Edit` per row into a `ModuleEdit` per module, made of the low-rank edits of `low_rank.py`. The
hooks of `steering.py` apply it to the module's output, those of `hooks.py` on other people's models. Norm-preserving
ablations are not in it: `norm_preserving.py` does them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.ablation import Ablation, gain_of
from steer.checkpoint.anatomy import Anatomy, LiveWriter
from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.fit import OUTLIER
from steer.core.schedule import PARALLEL, Gate
from steer.core.slider import Slider
from steer.model.steering.low_rank import ForwardContext, LowRankEdit, PerRowTensor, ReplyWindow, Term, amounts

Rows = tuple[Edit | None, ...]
"""One entry: the same edit for every text of the batch. Several: one per row, None for an unedited row."""
Gain = Callable[[str], Tensor]
"""Name of a norm's weight -> its gain, fp64, for the norm between a writer and the residual stream."""
_Moves = list[tuple[int, Slider]]
"""(row, slider at its amount) of each."""


@dataclass(eq=False)
class ModuleEdit:
    """What is done to the output of one module.

    Gates and features read the output as the module left it, then everything is added, then the projections that are
    clamped, capped or scaled are set. So the order of the sliders does not matter, and a clamp holds exactly.
    """

    gates: list[Gate] = field(default_factory=list)
    """Gates that read their direction or feature here."""
    shift: PerRowTensor | None = None
    """[rows, 1, d]: the vector added to every token."""
    added: list[LowRankEdit] = field(default_factory=list)
    """Moves of features, and vectors added on some tokens only."""
    set: list[LowRankEdit] = field(default_factory=list)
    """Projections set together or, at a writer, ablated. Each row takes part in one of them at most."""
    writes_to: int | None = None
    """The block that this module is a writer of, -1 for the embedding. None: the module is a block."""
    given: bool = False
    """Whether the module's input is edited, not its output."""

    def apply(self, h: Tensor, context: ForwardContext) -> Tensor:
        """The edited output, `[batch, new, d]`.

        Arithmetic is in fp32 or wider, except for plain shifts and for one direction that is set alone.
        """
        if self.alone is not None:
            return self.alone.moved(h, h, context, self.writes_to)
        for gate in self.gates:
            context.gates[gate.key] = gate.open(amounts(gate.on, h)[..., None])
        if not self.added and not self.set:
            return h if self.shift is None else h + self.shift.at(context, h)
        x = h if h.dtype == torch.float64 else h.float()
        out = x if self.shift is None else x + self.shift.at(context, x)
        for low_rank in self.added:
            out = low_rank.moved(x, out, context, self.writes_to)
        x = out
        for low_rank in self.set:
            out = low_rank.moved(x, out, context, self.writes_to)
        return out.to(h.dtype)

    @cached_property
    def alone(self) -> LowRankEdit | None:
        """The one direction that is set, if nothing else is done and it may be computed in the model's dtype."""
        others = self.gates or self.shift is not None or self.added
        return self.set[0] if len(self.set) == 1 and self.set[0].in_model_dtype and not others else None

    @property
    def timed(self) -> bool:
        """Whether it needs `ForwardContext.index`, the reply token of every position."""
        return any(c.window is not None for c in (*self.added, *self.set))

    @property
    def splits_reply(self) -> bool:
        """Whether it acts on thoughts or answers alone, and so needs `ForwardContext.answer`."""
        return any(c.window is not None and c.window.splits_reply for c in (*self.added, *self.set))


def module_edits(rows: Rows, anatomy: Anatomy, gain: Gain) -> dict[str, ModuleEdit]:
    """Module path -> the edit of its output or of its input. Empty when no row moves anything.

    `gain` is called where an architecture has a norm between a writer and the residual stream.
    """
    out: dict[str, ModuleEdit] = {}

    def at_block(site: int) -> ModuleEdit:
        return out.setdefault(anatomy.block_module(site), ModuleEdit())

    def at_writer(writer: LiveWriter) -> ModuleEdit:
        writes_to = -1 if writer.block is None else writer.block
        return out.setdefault(writer.module, ModuleEdit(writes_to=writes_to, given=writer.given))

    for r, edit in enumerate(rows):
        for site, shift in edit.biases().items() if edit is not None else ():
            if bool(shift.any()):
                block = at_block(site)
                if block.shift is None:
                    block.shift = PerRowTensor(torch.zeros(len(rows), 1, anatomy.width, dtype=torch.float64))
                block.shift.data[r, 0] = shift
    moves = [(r, m) for r, edit in enumerate(rows) if edit is not None for m in edit.as_moves() if not m.constant]
    for site, at_site in _grouped(moves, lambda r, m: None if m.ablates else m.site).items():
        if site is not None:
            added, set_ = _of_block(at_site, len(rows))
            at_block(site).added += added
            at_block(site).set += set_
    for writer, ablating in _ablations(rows, moves, anatomy, gain):
        at_writer(writer).set += ablating
    for writer, low_rank in _uneven(rows, anatomy, gain):
        at_writer(writer).set.append(low_rank)
    for gate in {m.when.gate.key: m.when.gate for _, m in moves if m.when.gate is not None}.values():
        at_block(gate.site).gates.append(gate)
    # Low-rank edits whose windows are equal share one, so that it is computed once per pass.
    windows: dict[object, ReplyWindow] = {}
    for low_rank in (c for module in out.values() for c in (*module.added, *module.set)):
        if low_rank.window is not None:
            low_rank.window = windows.setdefault(low_rank.window.key, low_rank.window)
    return out


def _grouped(moves: Iterable[tuple[int, Slider]], key: Callable[[int, Slider], Any]) -> dict[Any, _Moves]:
    out: dict[Any, _Moves] = {}
    for r, m in moves:
        out.setdefault(key(r, m), []).append((r, m))
    return out


def _of_block(moves: _Moves, rows: int) -> tuple[list[LowRankEdit], list[LowRankEdit]]:
    """What moves at one site add to the residual stream there, and the projections that they set after that."""
    added: list[LowRankEdit] = []
    adds = [(r, m) for r, m in moves if not m.reads]
    if adds:
        added.append(_timed_adds(adds, rows))
    reading = [(r, m) for r, m in moves if m.reads]
    of = _grouped(reading, lambda r, m: m.target.dictionary if isinstance(m.target, Feature) else None)
    added += [_latents(group, rows, dictionary) for dictionary, group in of.items() if dictionary is not None]
    return added, _joined(of.get(None, []), rows)


def _ablations(
    rows: Rows, moves: _Moves, anatomy: Anatomy, gain: Gain
) -> Iterable[tuple[LiveWriter, list[LowRankEdit]]]:
    """Ablation at every writer that the row's edit covers, before the norm if one follows.

    Rows that are edited at the same writers share low-rank edits. Writers before different norms have different
    ones, and writers without a norm share theirs. Receipts sum all of them under those of the first writer (`account`).
    """
    ablations = [(r, m) for r, m in moves if m.ablates]
    for blocks, group in _grouped(ablations, lambda r, m: rows[r].blocks).items():  # type: ignore[union-attr]
        by_norms: dict[tuple[str, ...], list[LowRankEdit]] = {}
        for writer in anatomy.live_writers:
            if blocks is None or (writer.block is not None and blocks[0] <= writer.block <= blocks[1]):
                if writer.norms not in by_norms:
                    made = _joined(group, len(rows), gain_of(writer.norms, gain))
                    for low_rank, first in zip(made, next(iter(by_norms.values()), made), strict=True):
                        low_rank.account = first
                    by_norms[writer.norms] = made
                yield writer, by_norms[writer.norms]


def _uneven(rows: Rows, anatomy: Anatomy, gain: Gain) -> Iterable[tuple[LiveWriter, LowRankEdit]]:
    """Ablation by an edit's method, or at strengths that differ from writer to writer.

    Norm-preserving methods are left to `NormPreservingHooks`. All rows of a writer go through one product with one
    column per direction, so that a batch of many candidates costs as much as one of them. Writers where the same is
    done share a low-rank edit.
    """
    uneven = {
        r: e for r, e in enumerate(rows) if e is not None and e.ablate and e.uneven and not e.method.norm_preserving
    }
    ablations = {e: Ablation(e, gain) for e in uneven.values()}
    made: dict[object, LowRankEdit] = {}
    for writer in anatomy.live_writers if uneven else ():
        strengths: dict[tuple[object, ...], dict[int, float]] = {}
        bases: dict[tuple[object, ...], Tensor] = {}
        for r, edit in uneven.items():
            if strength := ablations[edit].strength(writer):
                method = edit.method
                neutral = None if method.neutral is None else id(method.neutral)
                key = (edit.ablate, method.projection, neutral, writer.block if method.by_block else None, writer.norms)
                bases[key] = ablations[edit].subspace(writer)
                strengths.setdefault(key, {})[r] = strength
        if strengths:
            same = tuple((key, tuple(by_row.items())) for key, by_row in strengths.items())
            if same not in made:
                made[same] = _subspaces([(bases[key], by_row) for key, by_row in strengths.items()], len(rows))
            yield writer, made[same]


def _joined(moves: _Moves, rows: int, gain: Tensor | None = None) -> list[LowRankEdit]:
    """The low-rank edits that set projections, all those of a row in one of them.

    Rows that move the same directions share a low-rank edit. `gain`: as `_joint` takes it.
    """

    def place(m: Slider) -> tuple[int, str]:
        return id(m.target), str(m.when.gate and m.when.gate.key)

    # Sorted, so that the order of the sliders does not matter.
    by_row = _grouped(sorted(moves, key=lambda rm: (place(rm[1]), rm[1].when.window)), lambda r, m: r)
    alike: dict[object, _Moves] = {}
    for row_moves in by_row.values():
        alike.setdefault(tuple(place(m) for _, m in row_moves), []).extend(row_moves)
    return [_joint(group, rows, gain) for group in alike.values()]


def _terms(moves: _Moves) -> tuple[list[Term], list[Direction | int]]:
    """The terms of moves that read, and the direction or latent that each column reads.

    Moves that read the same through the same gate share a column; a row's second move of it, at another time, takes
    another one.
    """
    columns: dict[tuple[object, ...], Direction | int] = {}
    terms: list[Term] = []
    times: Counter[tuple[object, ...]] = Counter()
    for row, m in moves:
        read = m.target.indices if isinstance(m.target, Feature) else (m.target,)
        for what, coefficients in zip(read, m.coefficients, strict=True):
            key = (what, m.when.gate and m.when.gate.key)
            times[row, *key] += 1
            key = (*key, times[row, *key])
            columns.setdefault(key, what)
            terms.append(Term(row, list(columns).index(key), m, coefficients))
    return terms, list(columns.values())


def _joint(moves: _Moves, rows: int, gain: Float[Tensor, " d"] | None) -> LowRankEdit:
    """An edit that sets the projections on several directions together, whatever the angles between them.

    With `R` the directions as rows and `R^+` its pseudoinverse, `h += R^+ (wanted - R h)` is the smallest change after
    which every projection is `wanted`. For ablation at full strength it is the orthogonal projection.

    `rows`: how many edits are applied. `gain`: of the RMSNorm between the module and the residual stream, where there
    is one; before it, direction `r` is read and written along `gain * r` (see `checkpoint.ablation`).
    """
    terms, read = _terms(moves)
    directions = [d for d in read if isinstance(d, Direction)]
    r, lengths = torch.stack([d.vector.double() for d in directions]), None
    if gain is not None:
        r = r * gain
        lengths = r.norm(dim=-1)
        r = r / lengths[:, None]
    if len(r) == 1 or all(m.when.always for _, m in moves):
        write, spread = torch.linalg.pinv(r, rtol=PARALLEL).T, None
    else:
        left, sizes, write = torch.linalg.svd(r, full_matrices=False)
        # The pseudoinverse of every subset of the rows; bit `j` of a subset's number is set where row `j` is in it.
        acting = (torch.arange(2 ** len(r))[:, None] >> torch.arange(len(r))) & 1
        spread = PerRowTensor(torch.linalg.pinv(left * sizes * acting[..., None], rtol=PARALLEL))
    return LowRankEdit(
        rows, terms, PerRowTensor(write[None]), PerRowTensor(r.T), spread=spread,
        # Ablation edits the outputs of writers, where no token has an outlying norm.
        limits=None if moves[0][1].ablates else _limits([d.residual_norm for d in directions]),
        normed=None if lengths is None else PerRowTensor(lengths[None, None]),
    )  # fmt: skip


def _latents(moves: _Moves, rows: int, dictionary: Dictionary) -> LowRankEdit:
    """An edit that moves activations of one dictionary's latents along their decoder rows.

    The part of the residual stream that the dictionary cannot reconstruct stays.
    """
    terms, latents = _terms(moves)
    taken = tuple(i for i in latents if isinstance(i, int))
    # To fp64 first, since `decoder_rows` may scale the rows.
    write = dictionary.part(taken).to("cpu", torch.float64).decoder_rows(range(len(taken)))
    limits = _limits([math.nan if dictionary.norm is None else dictionary.norm] * len(taken))
    return LowRankEdit(rows, terms, PerRowTensor(write[None]), None, dictionary, taken, limits=limits)


def _timed_adds(moves: _Moves, rows: int) -> LowRankEdit:
    """An edit that adds vectors on some tokens only, and reads nothing."""
    directions = [m.target if isinstance(m.target, Direction) else m.target.direction for _, m in moves]
    terms = [
        Term(row, column, m, (0.0, m.amount * directions[column].gap, math.inf))
        for column, (row, m) in enumerate(moves)
    ]
    return LowRankEdit(rows, terms, PerRowTensor(torch.stack([d.vector.double() for d in directions])[None]))


def _subspaces(parts: Sequence[tuple[Float[Tensor, "d k"], Mapping[int, float]]], rows: int) -> LowRankEdit:
    """An edit that ablates subspaces. It belongs to no slider, so it has no terms.

    `parts`: (an orthonormal basis, the strength by row). A row has a strength in one of them at most.
    """
    q = torch.cat([basis.double() for basis, _ in parts], dim=1)
    out = LowRankEdit(rows, [], PerRowTensor(q.T[None]), PerRowTensor(q))
    first = 0
    for basis, strengths in parts:
        for row, strength in strengths.items():
            out.alpha.data[row, 0, first : first + basis.shape[1]] = -strength
        first += basis.shape[1]
    return out


def _limits(norms: Sequence[float]) -> PerRowTensor | None:
    """`LowRankEdit.limits` from each column's median residual norm (nan: not known); None where none is known."""
    known = [math.inf if math.isnan(norm) else OUTLIER * norm for norm in norms]
    return PerRowTensor(torch.tensor([[known]], dtype=torch.float64)) if min(known) < math.inf else None
