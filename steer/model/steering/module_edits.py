"""What each module of the model has to do for the edits of a batch.

`module_edits` turns one `Edit` per row into a `ModuleEdit` per module, made of the low-rank edits of `low_rank.py`. The
hooks of `steering.py` apply it to the module's output, those of `hooks.py` on other people's models. Norm-preserving
ablations are not in it: `norm_preserving.py` does them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from steer.checkpoint.ablation import Ablation
from steer.checkpoint.anatomy import Anatomy, LiveWriter
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.intervention import Intervention
from steer.core.schedule import Gate
from steer.model.steering.low_rank import (
    ForwardContext,
    LowRankEdit,
    PerRowTensor,
    Place,
    ReplyWindow,
    amounts,
    joint,
    latents,
    places,
    subspaces,
    timed_adds,
)

Rows = tuple[Edit | None, ...]
"""One entry: the same edit for every text of the batch. Several: one per row, None for an unedited row."""
Gain = Callable[[str], Tensor]
"""Name of a norm's weight -> its gain, fp64, for the norm between a writer and the residual stream."""
_Moves = list[tuple[int, Intervention]]
"""(row, intervention) of each."""


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

    def apply(self, h: Tensor, text: ForwardContext) -> Tensor:
        """The edited output, `[batch, new, d]`.

        Arithmetic is in fp32 or wider, except for plain shifts and for one direction that is set alone.
        """
        if self.alone is not None:
            return self.alone.moved(h, h, text, self.writes_to)
        for gate in self.gates:
            text.gates[gate.key] = gate.open(amounts(gate.on, h)[..., None])
        if not self.added and not self.set:
            return h if self.shift is None else h + self.shift.at(text, h, h.dtype)
        x = h if h.dtype == torch.float64 else h.float()
        out = x if self.shift is None else x + self.shift.at(text, x, x.dtype)
        for columns in self.added:
            out = columns.moved(x, out, text, self.writes_to)
        x = out
        for columns in self.set:
            out = columns.moved(x, out, text, self.writes_to)
        return out.to(h.dtype)

    @cached_property
    def alone(self) -> LowRankEdit | None:
        """The one direction that is set, where nothing else is done and the model's dtype is precise enough for it."""
        others = self.gates or self.shift is not None or self.added
        return self.set[0] if len(self.set) == 1 and self.set[0].short and not others else None

    @property
    def timed(self) -> bool:
        """Whether it needs `ForwardContext.index`, the reply token of every position."""
        return any(c.timed for c in (*self.added, *self.set))


def module_edits(rows: Rows, anatomy: Anatomy, gain: Gain) -> dict[str, ModuleEdit]:
    """Module path -> what is done to its output. Empty when no row moves anything.

    `gain` is called where an architecture has a norm between a writer and the residual stream.
    """
    out: dict[str, ModuleEdit] = {}
    moves = [(r, m) for r, edit in enumerate(rows) if edit is not None for m in _moves(edit)]
    _shifts(out, rows, anatomy)
    for site, site_moves in _by_site(m for m in moves if not _ablates(m[1])).items():
        program = out.setdefault(anatomy.block_module(site), ModuleEdit())
        added = [(r, m) for r, m in site_moves if not m.reads]
        if added:
            program.added.append(timed_adds(added, len(rows)))
        features = [(r, m) for r, m in site_moves if m.reads and isinstance(m.target, Feature)]
        # A dict, since a set would lose their order.
        for d in {m.target.dictionary: None for _, m in features if isinstance(m.target, Feature)}:
            members = [(r, m) for r, m in features if isinstance(m.target, Feature) and m.target.dictionary is d]
            program.added.append(latents(members, len(rows), d))
        sets = [(r, m) for r, m in site_moves if m.reads and isinstance(m.target, Direction)]
        program.set += _joined(sets, len(rows))
    _ablations(out, rows, moves, anatomy, gain)
    _uneven(out, rows, anatomy, gain)
    for gate in {m.when.gate.key: m.when.gate for _, m in moves if m.when.gate is not None}.values():
        out.setdefault(anatomy.block_module(gate.site), ModuleEdit()).gates.append(gate)
    _share_windows(out)
    return out


def _share_windows(programs: dict[str, ModuleEdit]) -> None:
    """Have low-rank edits whose windows are equal share one, so that it is computed once per pass."""
    windows: dict[object, ReplyWindow] = {}
    for columns in (c for p in programs.values() for c in (*p.added, *p.set)):
        if columns.window is not None:
            columns.window = windows.setdefault(columns.window.key, columns.window)


def _moves(edit: Edit) -> Iterator[Intervention]:
    """The parts of an edit that are not a constant shift: projections, features, gated and timed moves."""
    return (m for m in edit.as_moves() if not m.constant)


def _ablates(move: Intervention) -> bool:
    return move.operation == "ablate" and isinstance(move.target, Direction)


def _by_site(moves: Iterator[tuple[int, Intervention]]) -> dict[int, _Moves]:
    out: dict[int, _Moves] = {}
    for r, m in moves:
        out.setdefault(m.site, []).append((r, m))
    return out


def _shifts(out: dict[str, ModuleEdit], rows: Rows, anatomy: Anatomy) -> None:
    for r, edit in enumerate(rows):
        for site, shift in edit.with_adds_as_directions().biases().items() if edit is not None else ():
            if bool(shift.any()):
                program = out.setdefault(anatomy.block_module(site), ModuleEdit())
                if program.shift is None:
                    program.shift = PerRowTensor(torch.zeros(len(rows), 1, anatomy.width, dtype=torch.float64))
                program.shift.data[r, 0] = shift


def _joined(moves: _Moves, rows: int, gain: Tensor | None = None) -> list[LowRankEdit]:
    """The low-rank edits that set projections, all those of a row in one of them.

    Rows that move the same directions share a low-rank edit. `gain`: of the norm between the module and the residual
    stream, where there is one.
    """
    by_row: dict[int, list[Intervention]] = {}
    for r, m in moves:
        by_row.setdefault(r, []).append(m)
    groups: dict[object, tuple[list[Place], _Moves]] = {}
    for r, row_moves in by_row.items():
        # Sorted, so that the order of the sliders does not matter.
        row_moves.sort(key=lambda m: (id(m.target), str(m.when.gate and m.when.gate.key), m.when.window))
        order = places(row_moves)
        groups.setdefault(tuple(p.key for p in order), (order, []))[1].extend((r, m) for m in row_moves)
    return [joint(group, rows, order, gain) for order, group in groups.values()]


def _ablations(out: dict[str, ModuleEdit], rows: Rows, moves: _Moves, anatomy: Anatomy, gain: Gain) -> None:
    """Ablation at every writer that the row's edit names, before the norm where one follows.

    Rows that are edited at the same writers share low-rank edits. Each norm needs others, and writers without a norm
    share theirs; those of the first writer are the `account` of all, under which receipts sum what they do.
    """
    ablations = [(r, m) for r, m in moves if _ablates(m)]
    alike: dict[tuple[int, int] | None, _Moves] = {}
    for r, m in ablations:
        edit = rows[r]
        alike.setdefault(edit.blocks if edit is not None else None, []).append((r, m))
    for blocks, group_moves in alike.items():
        by_norm: dict[str | None, list[LowRankEdit]] = {}
        for writer in anatomy.live_writers:
            if blocks is None or (writer.block is not None and blocks[0] <= writer.block <= blocks[1]):
                if writer.norm not in by_norm:
                    columns = _joined(group_moves, len(rows), None if writer.norm is None else gain(writer.norm))
                    for low_rank, first in zip(columns, next(iter(by_norm.values()), columns), strict=True):
                        low_rank.account = first
                    by_norm[writer.norm] = columns
                _at(out, writer).set += by_norm[writer.norm]


def _uneven(out: dict[str, ModuleEdit], rows: Rows, anatomy: Anatomy, gain: Gain) -> None:
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
                place = writer.block if method.by_block else None
                neutral = None if method.neutral is None else id(method.neutral)
                key = (edit.ablate, method.projection, neutral, place, writer.norm)
                bases[key] = ablations[edit].subspace(writer)
                strengths.setdefault(key, {})[r] = strength
        if not strengths:
            continue
        same = tuple((key, tuple(by_row.items())) for key, by_row in strengths.items())
        if same not in made:
            made[same] = subspaces([(bases[key], by_row) for key, by_row in strengths.items()], len(rows))
        _at(out, writer).set.append(made[same])


def _at(out: dict[str, ModuleEdit], writer: LiveWriter) -> ModuleEdit:
    """The ModuleEdit of a writer, added to `out` if it has none yet."""
    return out.setdefault(writer.module, ModuleEdit(writes_to=-1 if writer.block is None else writer.block))
