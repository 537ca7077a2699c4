"""What the sliders did to a reply: on how many tokens, and how far they moved the residual stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from steer.live.frame import TextPass
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.move import Move, Operation

if TYPE_CHECKING:
    from steer.live.columns import Columns, Term

_PENDING = 4096
"""Notes that are held before they are summed up."""


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
    What sets a projection counts by how far the projection moved; a direction's ablation is summed over the writers up
    to its site."""


@dataclass(frozen=True)
class Receipt:
    """What the sliders did to one reply."""

    tokens: int
    """That went through the model: the part of the prompt that was read, and the reply."""
    sliders: tuple[SliderReceipt, ...] = ()
    notes: tuple[str, ...] = ()
    """What else there is to know of the reply: that it filled the context, that old messages were left out."""

    @property
    def warnings(self) -> list[str]:
        """The notes, and a line for every slider that never fired."""
        return [*self.notes, *self._silent()]

    def _silent(self) -> list[str]:
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
    name: str
    operation: Operation
    amount: float
    tokens: int = 0
    moved: float = 0.0


@dataclass
class _Text:
    tokens: int = 0
    sliders: dict[_Key, _Sum] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _under: tuple[Edit | None, int] = (None, 0)
    """The edit of the last passes, and how many tokens they brought."""

    def stood(self, edit: Edit | None, tokens: int) -> None:
        """So many tokens were read under this edit."""
        if edit is not self._under[0]:
            self.settle()
        self._under = (edit, self._under[1] + tokens)

    def settle(self) -> None:
        """Account for the sliders of the last passes, those that add to every token summed up."""
        edit, tokens = self._under
        self._under = (None, 0)
        for move in edit.as_moves() if edit is not None else ():
            one = self.sliders.setdefault(_key(move), _Sum(move.name, move.operation, move.amount))
            one.amount = move.amount
            if move.constant and move.share():
                one.tokens += tokens
                one.moved += tokens * move.share()


class Tally:
    """Collects what moves do to the texts of one generation. Texts are numbered as its rows began.

    Nothing is fetched from the device while a reply is being written, but once in many passes.
    """

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}
        self._pending: list[_Noted] = []
        self._now: _Texts = ()
        self._written: dict[Columns, list[Tensor]] = {}
        """What was ablated in the pass that began last, writer by writer."""
        self._valid: Tensor | None = None

    def begin(self, texts: Sequence[tuple[int, int, int | slice]], rows: Sequence[Edit | None]) -> None:
        """A forward pass begins: for each text of the batch its number, the row it goes by, and how many tokens it
        brings, or, packed, the slice that they are."""
        self._end_pass()
        now = []
        for text, row, brings in texts:
            part = (brings.start, brings.stop) if isinstance(brings, slice) else None
            count = brings.stop - brings.start if isinstance(brings, slice) else brings
            now.append((text, row, part))
            account = self._texts.setdefault(text, _Text())
            account.tokens += count
            account.stood(rows[row], count)
        self._now = tuple(now)

    def note(self, columns: Columns, by: Tensor, text: TextPass, writes_to: int | None) -> None:
        """`columns` moved their readings by these, in the pass that began last. `writes_to`: the block they are a
        writer of; what is ablated is summed over the writers up to its site."""
        if by.requires_grad:
            by = by.detach()
        if writes_to is None:
            self._pending.append((columns, columns.terms, by, self._now, text.valid))
            return
        if writes_to > max(columns.sites):
            return
        if writes_to > min(columns.sites):
            by = by * by.new_tensor([float(d >= writes_to) for d in columns.sites])
        self._written.setdefault(columns.account or columns, []).append(by)
        self._valid = text.valid

    def _end_pass(self) -> None:
        for columns, by in self._written.items():
            # At least fp32: of many writers each may do little.
            total = torch.stack([part.to(by[0].device) for part in by]).sum(
                0, dtype=torch.promote_types(by[0].dtype, torch.float32)
            )
            self._pending.append((columns, columns.terms, total, self._now, self._valid))
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
                SliderReceipt(s.name, s.operation, s.amount, s.tokens, s.moved / s.tokens if s.tokens else 0.0)
                for s in account.sliders.values()
            ),
            tuple(account.notes),
        )

    def remark(self, note: str, text: int = 0) -> None:
        """Put a line for people into a text's receipt."""
        self._texts.setdefault(text, _Text()).notes.append(note)

    def _settle(self) -> None:
        for account in self._texts.values():
            account.settle()
        # Passes of one make, as those that write a token each, are summed up as one.
        alike: dict[tuple[object, ...], list[_Note]] = {}
        for note in starmap(_Note, self._pending):
            key = (note.columns, id(note.terms), note.texts, note.by.shape[0], note.by.device)
            alike.setdefault(key, []).append(note)
        self._pending = []
        for notes in alike.values():
            columns, terms, texts = notes[0].columns, notes[0].terms, notes[0].texts
            packed = texts[0][2] is not None
            by = torch.cat([note.of_text() for note in notes], dim=0 if packed else 1)
            for at, (text, row, part) in enumerate(texts):
                here = by[:, slice(*part)].flatten(0, 1) if part is not None else by[at if by.shape[0] > 1 else 0]
                columns_of: dict[Move, list[int]] = {}
                for term in terms:
                    if term.row == row:
                        columns_of.setdefault(term.move, []).append(term.column)
                for move, mine in columns_of.items():
                    moved = _length(columns, mine, here)
                    one = self._texts[text].sliders[_key(move)]
                    one.moved += float(moved.sum()) / _norm(move)
                    one.tokens += int((moved > 0).sum())


_Key = tuple[object, ...]
_Texts = tuple[tuple[int, int, tuple[int, int] | None], ...]
"""Of each text of a pass its number, its row, and, packed, where its tokens begin and end."""
_Noted = tuple["Columns", "list[Term]", Tensor, _Texts, "Tensor | None"]
"""A `_Note` to be: made between two blocks, where a tuple costs least."""


@dataclass
class _Note:
    """What columns did in one pass."""

    columns: Columns
    terms: list[Term]
    """Those of the columns at the time."""
    by: Tensor
    texts: _Texts
    valid: Tensor | None

    def of_text(self) -> Float[Tensor, "batch new columns"]:
        """What they did on tokens of texts; 0 on padding."""
        return self.by if self.valid is None else self.by * self.valid[..., None].to(self.by.device, self.by.dtype)


def _key(move: Move) -> _Key:
    """Equal for the moves of one slider, whatever its amounts."""
    when = move.when
    return move.name, id(move.target), move.operation, when.window, when.gate and when.gate.key


def _length(columns: Columns, mine: list[int], by: Float[Tensor, "new columns"]) -> Float[Tensor, " new"]:
    """How far some of the columns moved each token: of latents the residual stream, of a direction its projection."""
    if columns.dictionary is None:
        return by[:, mine].abs().sum(-1)
    return (by[:, mine] @ columns.write.ready(by.device, by.dtype)[0, mine]).norm(dim=-1)


def _norm(move: Move) -> float:
    if isinstance(move.target, Feature):
        return move.target.dictionary.norm or math.nan
    assert isinstance(move.target, Direction)
    return move.target.residual_norm
