"""Receipts: on how many tokens of a reply each slider acted, and how far it moved the residual stream.

A `Tally` collects this while replies are written. The decode loop calls `Tally.begin` before each forward pass,
low-rank edits call `Tally.note` within it, and `Tally.receipt` sums up one text as a `Receipt`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.slider import Operation, Slider, rounded
from steer.model.steering.low_rank import ForwardContext, LowRankEdit, Term

PENDING = 4096
"""How many notes are held before they are summed up."""


@dataclass(frozen=True)
class SliderReceipt:
    """What one slider did to one reply."""

    name: str
    operation: Operation
    amount: float
    """The last amount it had."""
    tokens: int
    """On how many tokens it moved something, counting the prompt tokens that were read."""
    mean_share: float
    """How far it moved those tokens on average, as a share of the site's median residual norm; nan where that norm is
    not known. An operation that sets a projection counts by how far the projection moved; a direction's ablation is
    summed over the writers up to its site."""


@dataclass(frozen=True)
class Receipt:
    """What the sliders did to one reply."""

    tokens: int
    """How many tokens went through the model: the part of the prompt that was read, and the reply."""
    sliders: tuple[SliderReceipt, ...] = ()
    notes: tuple[str, ...] = ()
    """Other facts about the reply, for people: that it filled the context, that old messages were left out."""

    @property
    def warnings(self) -> list[str]:
        """The notes, and one line for every slider that changed no token."""
        silent = (s for s in self.sliders if not s.tokens)
        return [
            *self.notes,
            *(f"slider {s.name!r} ({s.operation} {s.amount:g}) never fired in this reply" for s in silent),
        ]

    def describe(self) -> dict[str, object]:
        """The receipt as a dict for JSON."""
        sliders = [asdict(s) | {"mean_share": rounded(s.mean_share)} for s in self.sliders]
        return {"tokens": self.tokens, "sliders": sliders, "warnings": self.warnings}


@dataclass
class _Sum:
    """What one slider did to one text so far."""

    name: str
    operation: Operation
    amount: float
    tokens: int = 0
    moved: float = 0.0
    """Sum over these tokens of the share of the residual norm."""


@dataclass
class _Text:
    """What is counted for one text."""

    tokens: int = 0
    read: dict[Edit | None, int] = field(default_factory=dict)
    """How many tokens were read under each edit since they were last summed up, the latest edit last."""
    sliders: dict[_Key, _Sum] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Tally:
    """Collects what sliders do to the texts of one generation. A text's number is its row in the first batch.

    Nothing is copied from the device while a reply is being written, except once in many passes.
    """

    def __init__(self) -> None:
        self._texts: defaultdict[int, _Text] = defaultdict(_Text)
        self._pending: list[_Note] = []
        self._now: _Texts = ()
        self._written: dict[LowRankEdit, list[Tensor]] = {}
        """What was ablated in the latest pass, one tensor per writer."""
        self._valid: Tensor | None = None

    def begin(self, texts: Sequence[tuple[int, int, int | slice]], rows: Sequence[Edit | None]) -> None:
        """Note that a forward pass begins.

        `texts`: for each text of the batch its number, the index of its edit in `rows`, and how many tokens are read,
        or which slice of the pass they are where several texts are packed.
        """
        self._end_pass()
        now = []
        for number, row, tokens in texts:
            packed = isinstance(tokens, slice)
            count = tokens.stop - tokens.start if packed else tokens
            now.append((number, row, (tokens.start, tokens.stop) if packed else None))
            text, edit = self._texts[number], rows[row]
            text.tokens += count
            text.read[edit] = text.read.pop(edit, 0) + count  # the latest edit goes last
        self._now = tuple(now)

    def note(self, low_rank: LowRankEdit, change: Tensor, context: ForwardContext, writes_to: int | None) -> None:
        """Note that `low_rank` moved its projections or activations by `change`, `[batch, new, columns]`, in the
        latest pass.

        `writes_to`: as `ModuleEdit.writes_to`. What is ablated is summed over the writers up to the direction's site.
        """
        if change.requires_grad:
            change = change.detach()
        if writes_to is None:
            self._pending.append(_Note(low_rank, low_rank.terms, change, self._now, context.valid))
            return
        if writes_to > max(low_rank.sites):
            return
        if writes_to > min(low_rank.sites):
            change = change * change.new_tensor([float(d >= writes_to) for d in low_rank.sites])
        self._written.setdefault(low_rank.account or low_rank, []).append(change)
        self._valid = context.valid

    def _end_pass(self) -> None:
        for low_rank, changes in self._written.items():
            # At least fp32: there are many writers, and each may do little.
            total = torch.stack([change.to(changes[0].device) for change in changes]).sum(
                0, dtype=torch.promote_types(changes[0].dtype, torch.float32)
            )
            self._pending.append(_Note(low_rank, low_rank.terms, total, self._now, self._valid))
        self._written.clear()
        if len(self._pending) >= PENDING:
            self._settle()

    def receipt(self, text: int = 0) -> Receipt:
        """What was done to a text so far. `text`: its number."""
        self._end_pass()
        self._settle()
        account = self._texts[text]
        sliders = (
            SliderReceipt(s.name, s.operation, s.amount, s.tokens, s.moved / s.tokens if s.tokens else 0.0)
            for s in account.sliders.values()
        )
        return Receipt(account.tokens, tuple(sliders), tuple(account.notes))

    def remark(self, note: str, text: int = 0) -> None:
        """Add a line for people to a text's receipt."""
        self._texts[text].notes.append(note)

    def _settle(self) -> None:
        for account in self._texts.values():
            for edit, tokens in account.read.items():
                for move in edit.as_moves() if edit is not None else ():
                    total = account.sliders.setdefault(_key(move), _Sum(move.name, move.operation, move.amount))
                    total.amount = move.amount
                    if move.constant and (share := move.share()):
                        total.tokens += tokens
                        total.moved += tokens * share
            account.read.clear()
        # Passes of the same shape, such as those that write one token each, are summed up together.
        alike: dict[tuple[object, ...], list[_Note]] = {}
        for note in self._pending:
            key = (note.low_rank, id(note.terms), note.texts, note.change.shape[0], note.change.device)
            alike.setdefault(key, []).append(note)
        self._pending = []
        for notes in alike.values():
            low_rank, terms, texts = notes[0].low_rank, notes[0].terms, notes[0].texts
            packed = texts[0][2] is not None
            changes = torch.cat([note.of_text() for note in notes], dim=0 if packed else 1)
            columns_of: dict[int, dict[Slider, list[int]]] = {}
            for term in terms:
                columns_of.setdefault(term.row, {}).setdefault(term.move, []).append(term.column)
            for at, (text, row, part) in enumerate(texts):
                if part is not None:
                    text_changes = changes[:, slice(*part)].flatten(0, 1)
                else:
                    text_changes = changes[at if changes.shape[0] > 1 else 0]
                for move, columns_moved in columns_of.get(row, {}).items():
                    moved = _length(low_rank, columns_moved, text_changes)
                    total = self._texts[text].sliders[_key(move)]
                    total.moved += float(moved.sum()) / _norm(move)
                    total.tokens += int((moved > 0).sum())


_Key = tuple[object, ...]
_Texts = tuple[tuple[int, int, tuple[int, int] | None], ...]
"""For each text of a pass: its number, its row and, where packed, the begin and end of its tokens."""


class _Note(NamedTuple):
    """What a low-rank edit did in one pass."""

    low_rank: LowRankEdit
    terms: list[Term]
    """The terms that the edit had in that pass."""
    change: Tensor
    texts: _Texts
    valid: Tensor | None

    def of_text(self) -> Float[Tensor, "batch new columns"]:
        """The changes on tokens of texts; 0 on padding."""
        if self.valid is None:
            return self.change
        return self.change * self.valid[..., None].to(self.change.device, self.change.dtype)


def _key(move: Slider) -> _Key:
    """Equal for the moves of one slider, whatever their amounts."""
    when = move.when
    return move.name, id(move.target), move.operation, when.window, when.gate and when.gate.key


def _length(low_rank: LowRankEdit, chosen: list[int], change: Float[Tensor, "new columns"]) -> Float[Tensor, " new"]:
    """How far some of the columns moved each token: the residual stream for latents, the projection for directions."""
    if low_rank.dictionary is None:
        return change[:, chosen].abs().sum(-1)
    return (change[:, chosen] @ low_rank.write.ready(change)[0, chosen]).norm(dim=-1)


def _norm(move: Slider) -> float:
    """The median residual norm at the site; nan where it is not known."""
    if isinstance(move.target, Feature):
        return move.target.dictionary.norm or math.nan
    return move.target.residual_norm
