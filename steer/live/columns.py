"""Moves of several rows as columns of one matrix product, each token taking the numbers of its own row.

A column reads a number `a` off the residual stream, a projection or an activation, and moves the stream by
`w * min(alpha * a + beta, upper)` times what it writes: `alpha`, `beta`, `upper` from `Move.coefficients`, `w` the
share of the move that acts on the token. A row without the move has zeros there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer.live.frame import TextPass
from steer.live.readings import encoder_rows
from steer.live.table import Table, Window
from steer.values.dictionary import Dictionary
from steer.values.move import Move
from steer.values.when import Gate


@dataclass(frozen=True, eq=False)
class Term:
    """One entry of the table: a row's move in one column."""

    row: int
    column: int
    move: Move
    coefficients: tuple[float, float, float]


class _Numbers(NamedTuple):
    """What columns compute with in a pass."""

    row: Tensor | None
    """`TextPass.row` of the pass."""
    dtype: torch.dtype
    device: torch.device
    alpha: Tensor
    beta: Tensor
    upper: Tensor | None
    limits: Tensor | None
    read: Tensor | None
    single: tuple[Tensor, Tensor | None] | None
    """`alpha` times the one direction that is read, `[batch, 1, d]` with `batch` 1 where all share it, and `beta`
    unless it is nothing."""
    token: tuple[Tensor, Tensor | None, float] | None
    """`single` as one token of one text wants it, on a CPU: `[d]`, and the square of its limit."""
    write: Tensor


@dataclass(eq=False)
class Columns:
    """Columns that are moved together at one module."""

    rows: int
    terms: list[Term]
    write: Table
    """[1, columns, d]: what each column writes. Directions set jointly: their dual basis, so that each projection
    moves by what was asked and by nothing that the others do; with `spread`, an orthonormal basis of theirs."""
    read: Table | None = None
    """[d, columns]: the directions projected on; None where `encoder` reads, or nothing is read."""
    dictionary: Dictionary | None = None
    latents: tuple[int, ...] = ()
    spread: Table | None = None
    """[2^columns, columns, columns], where directions that are set jointly act at times: for each subset of them that
    may act, how the moves of their readings are written in the basis of `write`."""
    sites: tuple[int, ...] = ()
    """Of the directions, one a column."""
    gates: tuple[Gate | None, ...] = ()
    """One a column."""
    told: bool = True
    """Whether receipts tell of it."""
    limits: Table | None = None
    """[1, 1, columns]: a token whose norm is beyond it stays as it is. The first token of a text, which attention
    rests on, is a hundred times the others; what is read off it is no trait, and setting it breaks the text."""
    normed: Table | None = None
    """[1, 1, columns]: the length of `gain * r`, where an RMSNorm stands between what is read and the residual stream:
    a projection that moves by `x` before the norm moves by `x * length / rms` in the stream, which receipts report."""
    account: Columns | None = None
    """The columns whose receipts these add to, where one slider has several: None for themselves."""
    alpha: Table = field(init=False)
    beta: Table = field(init=False)
    upper: Table | None = field(init=False)
    window: Window | None = field(init=False)
    used: Table | None = field(init=False)
    """1 where the row has the move; kept where `spread` is."""

    def __post_init__(self) -> None:
        n = self.write.data.shape[1]
        if not self.gates:
            self.gates = (None,) * n
        alpha, beta, used = torch.zeros(3, self.rows, 1, n, dtype=torch.float64)
        upper = torch.full((self.rows, 1, n), math.inf, dtype=torch.float64)
        window = torch.zeros(3, self.rows, 1, n, dtype=torch.float64)
        window[0], window[1], window[2] = -math.inf, math.inf, 1.0
        for t in self.terms:
            alpha[t.row, 0, t.column], beta[t.row, 0, t.column], upper[t.row, 0, t.column] = t.coefficients
            window[:, t.row, 0, t.column] = torch.tensor(t.move.when.window, dtype=torch.float64)
            used[t.row, 0, t.column] = 1.0
        self.alpha, self.beta = Table(alpha), Table(beta)
        self.upper = Table(upper) if any(t.coefficients[2] < math.inf for t in self.terms) else None
        timed = any(t.move.when.timed for t in self.terms)
        self.window = Window(window) if timed else None
        self.used = Table(used) if self.spread is not None else None
        self._last: _Numbers | None = None
        self._masks = {
            gate.key: Table(torch.tensor([[[float(g is not None and g.key == gate.key) for g in self.gates]]]))
            for gate in self.gates
            if gate is not None
        }

    @property
    def timed(self) -> bool:
        """Whether it wants to know the reply token of every position."""
        return self.window is not None

    @cached_property
    def short(self) -> bool:
        """Whether half precision is enough: the one direction of it rounds a move no coarser than the stream itself is
        rounded. Reply tokens are beyond what bf16 can count, and directions that are set jointly may be near each
        other."""
        return self.read is not None and len(self.gates) == 1 and self.window is None and not self._masks

    def moved(
        self, x: Float[Tensor, "batch new d"], onto: Float[Tensor, "batch new d"], text: TextPass, writes_to: int | None
    ) -> Float[Tensor, "batch new d"]:
        """`onto` and what the columns add to the stream, having read `x`. `writes_to`: as in `Tally.note`.

        One call without others of ours: weights push code out of the caches between two blocks, and finding it again
        takes longer than running it.
        """
        n = self._last
        if n is None or n.row is not text.row or n.dtype != x.dtype or n.device != x.device:
            n = self._numbers(text, x)
        if n.token is not None and x.shape[0] == x.shape[1] == 1:
            return self._token(n, n.token, x, onto, text, writes_to)
        if n.single is not None:
            # A product and a sum take half the time of a matrix product this thin, in half precision a fifth.
            read, beta = n.single
            by = (x * read).sum(-1, keepdim=True)
            by = by if beta is None else by + beta
        elif n.read is not None:
            by = torch.addcmul(n.beta, n.alpha, x @ n.read)
        elif self.dictionary is not None:
            rows = encoder_rows(self.dictionary, self.latents, x.device, x.dtype)
            by = torch.addcmul(n.beta, n.alpha, rows(x))
        else:
            by = n.beta
        if n.upper is not None:
            by = torch.minimum(by, n.upper)
        share = None
        if self.window is not None or self._masks:
            share = self._share(x, text)
            by = by * share
        if n.limits is not None:
            # Half the time of `x.norm`, which goes through Python. What has limits reads, so `by` is its own.
            by.masked_fill_(torch.linalg.vector_norm(x, dim=-1, keepdim=True) > n.limits, 0.0)
        if text.tally is not None and self.told:
            text.tally.note(self, self._in_stream(by, x), text, writes_to)
        if self.spread is not None:
            # What a column that is not acting reads is free to change: only those that act are set together.
            assert self.used is not None
            assert share is not None
            acting = self.used.at(text, by, by.dtype) * (share > 0)
            subset = sum(acting[..., j].long() << j for j in range(by.shape[-1]))
            by = (self.spread.ready(by.device, by.dtype)[subset] @ by[..., None])[..., 0]
        return torch.addcmul(onto, by, n.write) if len(self.gates) == 1 else onto + by @ n.write[0]

    def _token(
        self, n: _Numbers, token: tuple[Tensor, Tensor | None, float], x: Tensor, onto: Tensor, text: TextPass,
        writes_to: int | None,
    ) -> Tensor:  # fmt: skip
        """As `moved`, for the one token of a reply that is being written: a call that costs 30 times more to find in
        memory than to work out. Two inner products, and the limit is compared in Python, which costs nothing where no
        device has to be waited for."""
        read, beta, limit = token
        flat = x.reshape(-1)
        by = torch.dot(flat, read).reshape(1, 1, 1) if beta is None else torch.dot(flat, read) + beta
        if n.upper is not None:
            by = torch.minimum(by, n.upper)
        if limit < math.inf and torch.dot(flat, flat).item() > limit:
            by = torch.zeros_like(by)
        if text.tally is not None and self.told:
            text.tally.note(self, self._in_stream(by, x), text, writes_to)
        return torch.addcmul(onto, by, n.write)

    def _in_stream(self, by: Tensor, x: Tensor) -> Tensor:
        """By how much readings move in the residual stream that move by `by` in `x`, which a norm may follow."""
        if self.normed is None:
            return by
        return by * self.normed.ready(by.device, by.dtype) / x.square().mean(-1, keepdim=True).sqrt()

    def _numbers(self, text: TextPass, like: Tensor) -> _Numbers:
        """The tables as a pass wants them, in the dtype and on the device of `like`, kept for the passes after it."""
        dtype, device = like.dtype, like.device
        alpha, beta = self.alpha.at(text, like, dtype), self.beta.at(text, like, dtype)
        read = None if self.read is None else self.read.ready(device, dtype)
        single = None
        # Packed texts have a row a token, for which these products would be as long as the texts, and others at every
        # pass.
        if read is not None and alpha.shape[1] == 1 and len(self.gates) == 1:
            single = alpha * read[:, 0], beta if bool(self.beta.data.any()) else None
        token = None
        # In fp16 the square of a norm of 256 is infinite.
        if single is not None and self.short and len(alpha) == 1 and device.type == "cpu" and dtype != torch.float16:
            limit = math.inf if self.limits is None else float(self.limits.data) ** 2
            token = single[0].reshape(-1).contiguous(), single[1], limit
        self._last = _Numbers(
            text.row, dtype, device, alpha, beta,
            None if self.upper is None else self.upper.at(text, like, dtype),
            None if self.limits is None else self.limits.ready(device, dtype),
            read, single, token, self.write.ready(device, dtype),
        )  # fmt: skip
        return self._last

    def _share(self, x: Tensor, text: TextPass) -> Tensor:
        """The share of each column that acts on each token, where there are windows or gates."""
        share = None if self.window is None else self.window.share(text, x)
        for key, table in self._masks.items():
            mask = table.ready(x.device, x.dtype)
            is_open = 1 - mask + mask * text.gates[key].to(x.device, x.dtype)
            share = is_open if share is None else share * is_open
        assert share is not None
        return share
