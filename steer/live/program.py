"""Edits of several rows, worked out as what is to be done at each module of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steer.live.columns import Columns, Place, Table, encoder_rows, joint, latents, places, timed_adds
from steer.live.frame import TextPass
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.move import Move
from steer.values.when import Gate
from steer.weights.anatomy import Anatomy

Rows = tuple[Edit | None, ...]
"""One entry: the same edit for every row of the batch. Several: one a row, None for an untouched row."""
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
        """The output as it goes on: `[batch, new, d]`, arithmetic in fp32 or wider but for plain shifts."""
        for gate in self.gates:
            text.gates[gate.key] = gate.open(_gate_amount(gate, h))
        if not self.added and not self.set:
            return h if self.shift is None else h + self.shift.at(text, h, h.dtype)
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        delta = None if self.shift is None else self.shift.at(text, x, x.dtype)
        for columns in self.added:
            delta = _sum(delta, self._moved(columns, x, text))
        if delta is not None:
            x = x + delta
        delta = None
        for columns in self.set:
            delta = _sum(delta, self._moved(columns, x, text))
        return (x if delta is None else x + delta).to(h.dtype)

    @property
    def timed(self) -> bool:
        """Whether it wants to know the reply token of every position."""
        return any(c.timed for c in (*self.added, *self.set))

    def layout(self) -> tuple[object, ...]:
        """Equal for programs whose numbers alone differ."""
        columns = (tuple(c.layout() for c in each) for each in (self.added, self.set))
        return (self.shift is not None, tuple(g.key for g in self.gates), *columns)

    def take(self, other: SiteProgram) -> None:
        """Hold the other's numbers from now on, in the same memory."""
        if self.shift is not None and other.shift is not None:
            self.shift.take(other.shift)
        for mine, new in zip((*self.added, *self.set), (*other.added, *other.set), strict=True):
            mine.take(new)

    def _moved(self, columns: Columns, x: Tensor, text: TextPass) -> Tensor:
        by = columns.deltas(x, text)
        if text.tally is not None:
            text.tally.note(columns, by, text, self.writes_to)
        return columns.written(by, text)


def compiled(rows: Rows, anatomy: Anatomy, held: Sequence[Move] = ()) -> dict[str, SiteProgram]:
    """Module path -> what is done there. Empty when no row moves anything.

    `held`: moves that keep a place whether or not a row has them, so that they can come and go without a change of
    layout. One row is wanted then.
    """
    out: dict[str, SiteProgram] = {}
    moves = [(r, m) for r, edit in enumerate(rows) if edit is not None for m in _moves(edit)]
    moves += [(-1, m) for m in held if not m.constant]
    _shifts(out, rows, anatomy, [m.site for m in held if m.constant])
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
    _ablations(out, rows, moves, anatomy)
    for gate in {m.when.gate.key: m.when.gate for _, m in moves if m.when.gate is not None}.values():
        out.setdefault(anatomy.block_module(gate.site), SiteProgram()).gates.append(gate)
    return out


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


def _shifts(out: dict[str, SiteProgram], rows: Rows, anatomy: Anatomy, held: Sequence[int]) -> None:
    def table(site: int) -> Table:
        program = out.setdefault(anatomy.block_module(site), SiteProgram())
        if program.shift is None:
            program.shift = Table(torch.zeros(len(rows), 1, anatomy.width, dtype=torch.float64))
        return program.shift

    for site in held:
        table(site)
    for r, edit in enumerate(rows):
        for site, shift in edit.with_adds_as_directions().biases().items() if edit is not None else ():
            if bool(shift.any()):
                table(site).data[r, 0] = shift


def _joined(moves: _Moves, rows: int) -> list[Columns]:
    """Moves of projections, those of a row together. Rows that move the same directions share their columns."""
    each: dict[int, list[Move]] = {}
    for r, m in moves:
        each.setdefault(r, []).append(m)
    held = each.pop(-1, None)
    if held is not None:
        order = {p.key: p for own in (held, *each.values()) for p in places(own)}
        return [joint(moves, rows, list(order.values()))]
    groups: dict[object, tuple[list[Place], _Moves]] = {}
    for r, own in each.items():
        # Sorted, so that the order of the sliders does not matter.
        own.sort(key=lambda m: (id(m.target), str(m.when.gate and m.when.gate.key), m.when.window))
        order = places(own)
        groups.setdefault(tuple(p.key for p in order), (order, []))[1].extend((r, m) for m in own)
    return [joint(group, rows, order) for order, group in groups.values()]


def _ablations(out: dict[str, SiteProgram], rows: Rows, moves: _Moves, anatomy: Anatomy) -> None:
    """Ablation at every writer that the row's edit names. Writers edited alike share one set of columns."""
    gone = [(r, m) for r, m in moves if _ablates(m)]
    shared: dict[tuple[int, ...], list[Columns]] = {}
    for module, block in _writers(anatomy):
        editing = tuple(r for r in dict.fromkeys(r for r, _ in gone) if r < 0 or _edits(rows[r], block))
        if not editing:
            continue
        if editing not in shared:
            shared[editing] = _joined([(r, m) for r, m in gone if r in editing], len(rows))
        out.setdefault(module, SiteProgram(writes_to=-1 if block is None else block)).set += shared[editing]


def _writers(anatomy: Anatomy) -> Iterator[tuple[str, int | None]]:
    yield anatomy.embedding_module, None
    for block in range(anatomy.blocks):
        for module in anatomy.writer_modules(block):
            yield module, block


def _edits(edit: Edit | None, block: int | None) -> bool:
    if edit is None:
        return False
    if edit.blocks is None:
        return True
    return block is not None and edit.blocks[0] <= block <= edit.blocks[1]


def _gate_amount(gate: Gate, h: Tensor) -> Tensor:
    """What a gate reads, in amounts: `[batch, new, 1]`."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    if isinstance(gate.on, Direction):
        r = gate.on.vector.to(x.device, x.dtype)
        return ((x @ r - gate.on.without_mean) / gate.on.gap)[..., None]
    f = gate.on
    acts = encoder_rows(f.dictionary, f.indices, x.device, x.dtype)(x)
    return (acts / torch.tensor(f.units, device=x.device, dtype=x.dtype)).mean(-1, keepdim=True)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
