"""Edits of several rows, worked out as what is to be done at each module of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from steer.live.columns import Columns
from steer.live.frame import TextPass
from steer.live.moved_columns import Place, joint, latents, places, subspaces, timed_adds
from steer.live.readings import amounts
from steer.live.table import Table, Window
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.move import Move
from steer.values.when import Gate
from steer.weights.ablation import Ablation
from steer.weights.anatomy import Anatomy, LiveWriter

Rows = tuple[Edit | None, ...]
"""One entry: the same edit for every row of the batch. Several: one a row, None for an untouched row."""
Gain = Callable[[str], Tensor]
"""The gain of the norm between a writer and the residual stream, fp64, by the name of its weight."""
_Moves = list[tuple[int, Move]]
"""(row, move)"""


@dataclass(eq=False)
class SiteProgram:
    """What is done to the output of one module.

    The gates and the features read it as the module left it, then everything is added, then the projections that
    are clamped, capped or scaled are set: so the order of the sliders does not matter, and a clamp holds exactly.
    """

    gates: list[Gate] = field(default_factory=list)
    shift: Table | None = None
    """[rows, 1, d]: what is added to every token."""
    added: list[Columns] = field(default_factory=list)
    """Features, and vectors added on some tokens."""
    set: list[Columns] = field(default_factory=list)
    """Projections set together, or, at a writer, ablated. A row has a part in one of them at most."""
    writes_to: int | None = None
    """The block whose residual stream this module is a writer of, -1 for the embedding. None: it is a block."""

    def apply(self, h: Tensor, text: TextPass) -> Tensor:
        """The output as it goes on: `[batch, new, d]`. Arithmetic is in fp32 or wider, but for plain shifts and for one
        direction that is set alone."""
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
    def alone(self) -> Columns | None:
        """The one direction that is set, where nothing else is done."""
        others = self.gates or self.shift is not None or self.added
        return self.set[0] if len(self.set) == 1 and self.set[0].short and not others else None

    @property
    def timed(self) -> bool:
        """Whether it wants to know the reply token of every position."""
        return any(c.timed for c in (*self.added, *self.set))


def compiled(rows: Rows, anatomy: Anatomy, gain: Gain) -> dict[str, SiteProgram]:
    """Module path -> what is done there. Empty when no row moves anything.

    `gain` is asked where an architecture has a norm between a writer and the residual stream.
    """
    out: dict[str, SiteProgram] = {}
    moves = [(r, m) for r, edit in enumerate(rows) if edit is not None for m in _moves(edit)]
    _shifts(out, rows, anatomy)
    for site, here in _by_site(m for m in moves if not _ablates(m[1])).items():
        program = out.setdefault(anatomy.block_module(site), SiteProgram())
        added = [(r, m) for r, m in here if not m.reads]
        if added:
            program.added.append(timed_adds(added, len(rows)))
        features = [(r, m) for r, m in here if m.reads and isinstance(m.target, Feature)]
        # A dict, for its order.
        for d in {m.target.dictionary: None for _, m in features if isinstance(m.target, Feature)}:
            of_it = [(r, m) for r, m in features if isinstance(m.target, Feature) and m.target.dictionary is d]
            program.added.append(latents(of_it, len(rows), d))
        sets = [(r, m) for r, m in here if m.reads and isinstance(m.target, Direction)]
        program.set += _joined(sets, len(rows))
    _ablations(out, rows, moves, anatomy, gain)
    _uneven(out, rows, anatomy, gain)
    for gate in {m.when.gate.key: m.when.gate for _, m in moves if m.when.gate is not None}.values():
        out.setdefault(anatomy.block_module(gate.site), SiteProgram()).gates.append(gate)
    _share_windows(out)
    return out


def _share_windows(programs: dict[str, SiteProgram]) -> None:
    """One window for all columns whose windows are equal."""
    windows: dict[object, Window] = {}
    for columns in (c for p in programs.values() for c in (*p.added, *p.set)):
        if columns.window is not None:
            columns.window = windows.setdefault(columns.window.key, columns.window)


def _moves(edit: Edit) -> Iterator[Move]:
    """What of an edit is no plain shift."""
    return (m for m in edit.as_moves() if not m.constant)


def _ablates(move: Move) -> bool:
    return move.operation == "ablate" and isinstance(move.target, Direction)


def _by_site(moves: Iterator[tuple[int, Move]]) -> dict[int, _Moves]:
    out: dict[int, _Moves] = {}
    for r, m in moves:
        out.setdefault(m.site, []).append((r, m))
    return out


def _shifts(out: dict[str, SiteProgram], rows: Rows, anatomy: Anatomy) -> None:
    for r, edit in enumerate(rows):
        for site, shift in edit.with_adds_as_directions().biases().items() if edit is not None else ():
            if bool(shift.any()):
                program = out.setdefault(anatomy.block_module(site), SiteProgram())
                if program.shift is None:
                    program.shift = Table(torch.zeros(len(rows), 1, anatomy.width, dtype=torch.float64))
                program.shift.data[r, 0] = shift


def _joined(moves: _Moves, rows: int, gain: Tensor | None = None) -> list[Columns]:
    """Moves of projections, those of a row together. Rows that move the same directions share their columns. `gain`: of
    the norm between what is read and the residual stream, where there is one."""
    each: dict[int, list[Move]] = {}
    for r, m in moves:
        each.setdefault(r, []).append(m)
    groups: dict[object, tuple[list[Place], _Moves]] = {}
    for r, own in each.items():
        # Sorted, so that the order of the sliders does not matter.
        own.sort(key=lambda m: (id(m.target), str(m.when.gate and m.when.gate.key), m.when.window))
        order = places(own)
        groups.setdefault(tuple(p.key for p in order), (order, []))[1].extend((r, m) for m in own)
    return [joint(group, rows, order, gain) for order, group in groups.values()]


def _ablations(out: dict[str, SiteProgram], rows: Rows, moves: _Moves, anatomy: Anatomy, gain: Gain) -> None:
    """Ablation at every writer that the row's edit names, before the norm where one follows. Rows that are edited at
    the same writers share one set of columns, the same from writer to writer but for norms: receipts sum what it does.
    """
    gone = [(r, m) for r, m in moves if _ablates(m)]
    alike: dict[tuple[int, int] | None, _Moves] = {}
    for r, m in gone:
        edit = rows[r]
        alike.setdefault(edit.blocks if edit is not None else None, []).append((r, m))
    for blocks, theirs in alike.items():
        made: dict[str | None, list[Columns]] = {}
        for writer in anatomy.live_writers:
            if blocks is None or (writer.block is not None and blocks[0] <= writer.block <= blocks[1]):
                if writer.norm not in made:
                    columns = _joined(theirs, len(rows), None if writer.norm is None else gain(writer.norm))
                    for one, first in zip(columns, next(iter(made.values()), columns), strict=True):
                        one.account = first
                    made[writer.norm] = columns
                _at(out, writer).set += made[writer.norm]


def _uneven(out: dict[str, SiteProgram], rows: Rows, anatomy: Anatomy, gain: Gain) -> None:
    """Ablation by an edit's method, at strengths that differ from writer to writer; what keeps norms is in `KeptNorms`.

    All rows of a writer go through one product with a column a direction, so that a batch of many candidates costs what
    one of them does; writers where the same is done share their columns.
    """
    uneven = {
        r: e for r, e in enumerate(rows) if e is not None and e.ablate and e.uneven and not e.method.norm_preserving
    }
    each = {e: Ablation(e, gain) for e in uneven.values()}
    made: dict[object, Columns] = {}
    for writer in anatomy.live_writers if uneven else ():
        strengths: dict[tuple[object, ...], dict[int, float]] = {}
        bases: dict[tuple[object, ...], Tensor] = {}
        for r, edit in uneven.items():
            if strength := each[edit].strength(writer):
                method = edit.method
                place = writer.block if method.by_block else None
                neutral = None if method.neutral is None else id(method.neutral)
                key = (edit.ablate, method.projection, neutral, place, writer.norm)
                bases[key] = each[edit].subspace(writer)
                strengths.setdefault(key, {})[r] = strength
        if not strengths:
            continue
        same = tuple((key, tuple(by_row.items())) for key, by_row in strengths.items())
        if same not in made:
            made[same] = subspaces([(bases[key], by_row) for key, by_row in strengths.items()], len(rows))
        _at(out, writer).set.append(made[same])


def _at(out: dict[str, SiteProgram], writer: LiveWriter) -> SiteProgram:
    """The program of a writer."""
    return out.setdefault(writer.module, SiteProgram(writes_to=-1 if writer.block is None else writer.block))
