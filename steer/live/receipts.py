"""What the sliders did to a reply: on how many tokens, and how far they moved the residual stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from steer.live.frame import TextPass
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.move import Move, Operation

if TYPE_CHECKING:
    from steer.live.columns import Columns

_PENDING = 256
"""Noted passes that are held before they are summed up."""


@dataclass(frozen=True)
class SliderReceipt:
    """What one slider did to one reply."""

    name: str
    operation: Operation
    amount: float
    """The last one it stood at."""
    tokens: int
    """On how many tokens it moved something, those of the prompt that were read included."""
    mean_share: float
    """Of those tokens: by how much of the site's median residual norm, on average; nan where that is not known.
    A direction's ablation is summed over the writers up to its site."""


@dataclass(frozen=True)
class Receipt:
    """What the sliders did to one reply."""

    tokens: int
    """That went through the model: the part of the prompt that was read, and the reply."""
    sliders: tuple[SliderReceipt, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """A line for every slider that never fired."""
        return [
            f"slider {s.name!r} ({s.operation} {s.amount:g}) never fired in this reply"
            for s in self.sliders
            if not s.tokens
        ]

    def describe(self) -> dict[str, object]:
        """A JSON-able account."""
        sliders = [
            {
                "name": s.name,
                "operation": s.operation,
                "amount": s.amount,
                "tokens": s.tokens,
                "mean_share": None if math.isnan(s.mean_share) else round(s.mean_share, 4),
            }
            for s in self.sliders
        ]
        return {"tokens": self.tokens, "sliders": sliders, "warnings": self.warnings}


@dataclass
class _Sum:
    operation: Operation
    amount: float
    tokens: int = 0
    moved: float = 0.0


@dataclass
class _Text:
    tokens: int = 0
    sliders: dict[str, _Sum] = field(default_factory=dict)


class Tally:
    """Collects what moves do to the texts of one generation. Texts are numbered as its rows began.

    Nothing is fetched from the device while a reply is being written, but once in many passes.
    """

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}
        self._pending: list[tuple[Columns, Tensor, list[tuple[int, int, slice | None]], Tensor | None]] = []
        self._now: list[tuple[int, int, slice | None]] = []
        self._written: dict[Columns, tuple[Tensor, TextPass]] = {}

    def begin(self, texts: Sequence[tuple[int, int, int | slice]], rows: Sequence[Edit | None]) -> None:
        """A forward pass begins: for each text of the batch its number, the row it goes by, and how many tokens it
        brings, or, packed, the slice that they are."""
        self._end_pass()
        self._now = []
        for text, row, brings in texts:
            part = brings if isinstance(brings, slice) else None
            count = brings.stop - brings.start if isinstance(brings, slice) else brings
            self._now.append((text, row, part))
            account = self._texts.setdefault(text, _Text())
            account.tokens += count
            edit = rows[row]
            for move in edit.as_moves() if edit is not None else ():
                one = account.sliders.setdefault(move.name, _Sum(move.operation, move.amount))
                one.operation, one.amount = move.operation, move.amount
                if move.constant:
                    one.tokens += count
                    one.moved += count * move.share()

    def note(self, columns: Columns, by: Tensor, text: TextPass, writes_to: int | None) -> None:
        """`columns` moved their readings by these, in the pass that began last. `writes_to`: the block they are a
        writer of; what is ablated is summed over the writers up to its site."""
        if writes_to is None:
            self._pending.append((columns, by.detach(), self._now, text.valid))
            return
        upto = by.new_tensor([float(d >= writes_to) for d in columns.sites])
        before = self._written.get(columns)
        by = by.detach() * upto
        self._written[columns] = (by if before is None else before[0] + by, text)

    def _end_pass(self) -> None:
        for columns, (by, text) in self._written.items():
            self._pending.append((columns, by, self._now, text.valid))
        self._written.clear()
        if len(self._pending) >= _PENDING:
            self._settle()

    def receipt(self, text: int = 0) -> Receipt:
        """What was done to a text so far."""
        self._end_pass()
        self._settle()
        account = self._texts.get(text, _Text())
        return Receipt(
            account.tokens,
            tuple(
                SliderReceipt(name, s.operation, s.amount, s.tokens, s.moved / s.tokens if s.tokens else 0.0)
                for name, s in account.sliders.items()
            ),
        )

    def _settle(self) -> None:
        pending, self._pending = self._pending, []
        for columns, by, texts, valid in pending:
            by = by.abs()
            if valid is not None:
                by = by * valid[..., None].to(by.device, by.dtype)
            rows: dict[int, dict[str, tuple[Move, list[tuple[int, float]]]]] = {}
            for t in columns.terms:
                mine = rows.setdefault(t.row, {})
                mine.setdefault(t.move.name, (t.move, []))[1].append((t.column, t.norm))
            for at, (text, row, part) in enumerate(texts):
                here = by[0, part] if part is not None else by[at if by.shape[0] > 1 else 0]
                for name, (move, cols) in rows.get(row, {}).items():
                    moved = sum(here[:, c] * norm for c, norm in cols)
                    assert isinstance(moved, Tensor)
                    one = self._texts[text].sliders[name]
                    one.moved += float(moved.sum()) / _norm(move)
                    one.tokens += int((moved > 0).sum())


def _norm(move: Move) -> float:
    if isinstance(move.target, Feature):
        return move.target.dictionary.norm or math.nan
    assert isinstance(move.target, Direction)
    return move.target.residual_norm
