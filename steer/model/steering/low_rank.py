"""Low-rank edits: the arithmetic that sliders do on the output of one module, for a batch of texts.

A `LowRankEdit` adds `f(x @ read) @ write` to the residual stream. Its columns are directions or latents, its rows are
the edits applied to a batch, so that each text can be under its own edit. `module_edits.py` builds them from sliders,
`steering.py` puts the hooks on the model, and `receipts.py` reports what they did.

`ForwardContext` says which edit each token of a forward pass is under. `PerRowTensor` and `ReplyWindow` hold numbers
that differ from row to row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.core.dictionary import Dictionary, EncoderRows
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.schedule import ALWAYS, ANSWER, THOUGHTS
from steer.core.slider import Slider


@dataclass(eq=False)
class ForwardContext:
    """What hooks need to know of a forward pass over `[batch, new]` tokens or `[1, tokens]` of several packed texts."""

    row: Int[Tensor, " texts"] | None = None
    """Index into the applied edits, one per text, or one per token if `packed`. None: text i of the batch is under edit
    i, or every text is under the only edit."""
    index: Int[Tensor, "batch new"] | None = None
    """The number of the reply token that each position writes: its position in the text minus (prompt length - 1).
    Negative in the prompt, except for its last position, which writes reply token 0. Needed where `Steering.timed`."""
    answer: Int[Tensor, "batch new"] | None = None
    """The number of the reply token that the answer of each text begins with; `NO_ANSWER` within thoughts. The second
    dimension is 1 unless `packed`. Needed where `Steering.splits_reply`."""
    packed: bool = False
    """Whether several texts are packed into one, so that `row` has one entry per token."""
    valid: Bool[Tensor, "batch new"] | None = None
    """False for padding, which receipts leave out. None: there is no padding."""
    tally: Any = None
    """The `receipts.Tally` that records how far each slider moved the residual stream. None: nothing is recorded."""
    gates: dict[object, Float[Tensor, "batch new 1"]] = field(default_factory=dict)
    """`Gate.key` -> 1 on tokens where the gate is open, else 0; filled in as the pass reaches each gate's site."""

    def of_rows(self, table: Float[Tensor, "rows 1 n"]) -> Float[Tensor, "batch new n"]:
        """The entry of a table for each token; a dimension has size 1 where all texts or tokens share it."""
        if self.row is None or table.shape[0] == 1:
            return table
        chosen = table.index_select(0, self.row.to(table.device))
        return chosen.transpose(0, 1) if self.packed else chosen


class PerRowTensor:
    """Numbers `[rows, 1, n]`, one entry per edit, in fp64; copied once to each device and dtype they are used in."""

    def __init__(self, data: Float[Tensor, "rows 1 n"]) -> None:
        self.data = data
        self._ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._last: tuple[Any, Tensor, Tensor] | None = None

    def at(self, context: ForwardContext, like: Tensor) -> Float[Tensor, "batch new n"]:
        """The entry of each text of a pass, or of each token if packed, in the dtype and on the device of `like`."""
        ready = self.ready(like)
        if context.row is None or ready.shape[0] == 1:
            return ready
        # Cached, since the rows of a batch stay the same from token to token.
        if self._last is None or self._last[0] is not context.row or self._last[1] is not ready:
            self._last = (context.row, ready, context.of_rows(ready))
        return self._last[2]

    def ready(self, like: Tensor) -> Tensor:
        """All entries, in the dtype and on the device of `like`. The copy is cached."""
        ready = self._ready.get((like.device, like.dtype))
        if ready is None:
            # Outside of inference mode, since passes that need gradients use the same copy.
            with torch.inference_mode(False):
                ready = self._ready[like.device, like.dtype] = self.data.to(like)
        return ready


class ReplyWindow:
    """On which reply tokens each column acts, and with what share: `Schedule.window` by row and column."""

    def __init__(self, data: Float[Tensor, "4 rows 1 n"]) -> None:
        self.start, self.end, self.ramp, self.part = map(PerRowTensor, data)
        self.splits_reply = bool(self.part.data.any())
        """Whether it needs `ForwardContext.answer`."""
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for windows that hold equal numbers."""
        return tuple(
            (tuple(t.data.shape), *t.data.flatten().tolist()) for t in (self.start, self.end, self.ramp, self.part)
        )

    def share(self, context: ForwardContext, like: Tensor) -> Float[Tensor, "batch new n"]:
        """The share of each column that acts on each token, from 0 to 1, in the dtype and on the device of `like`.

        Computed once per pass for all modules that have this window, since computing it costs more than applying it.
        """
        assert context.index is not None
        if self._last is not None:
            index, row, share = self._last
            if (
                index is context.index
                and row is context.row
                and (share.dtype, share.device) == (like.dtype, like.device)
            ):
                return share
        i = context.index.to(like.device, like.dtype)[..., None]
        start, end, ramp = (t.at(context, like) for t in (self.start, self.end, self.ramp))
        acts = None
        if self.splits_reply:
            assert context.answer is not None
            part, answer = self.part.at(context, like), context.answer.to(like.device, like.dtype)[..., None]
            acts = (part != THOUGHTS) | (i < answer)
            i = torch.where(part == ANSWER, i - answer, i)
        share = ((i - start + 1) / ramp).clamp(0, 1) * (i < end)
        if acts is not None:
            share = share * acts
        self._last = (context.index, context.row, share)
        return share


NO_ANSWER = 1 << 40
"""In place of the number of a token, while a reply is within its thoughts."""
_CACHED_SETS = 16
"""How many sets of encoder rows are cached for each dictionary."""


def amounts(target: Direction | Feature, h: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens"]:
    """What a direction or a feature reads from residual streams, in the units of slider amounts.

    Of a direction: `(projection - without_mean) / gap`. Of a feature: the mean over its latents of
    `activation / unit`, which is negative for a latent with a negative unit.
    """
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    if isinstance(target, Direction):
        return (x @ target.vector.to(x.device, x.dtype) - target.without_mean) / target.gap
    acts = encoder_rows(target.dictionary, target.indices, x.device, x.dtype)(x)
    return (acts / torch.tensor(target.units, device=x.device, dtype=x.dtype)).mean(-1)


def encoder_rows(
    dictionary: Dictionary, taken: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> EncoderRows:
    """The encoder rows of the latents `taken`, on a device and in a dtype.

    They are cached: sessions that take turns on a model apply and withdraw their sliders at every token, and that must
    not copy tensors each time. Of a topk dictionary all latents are copied and cached, since they compete. The cache
    belongs to the dictionary and is freed with it.
    """

    def cached(key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in dictionary.placed:
            # Outside of inference mode, since passes that need gradients use the cached tensors too.
            with torch.inference_mode(False):
                dictionary.placed[key] = make()
            while len(dictionary.placed) > _CACHED_SETS:
                dictionary.placed.pop(next(iter(dictionary.placed)))
        return dictionary.placed[key]

    if dictionary.architecture != "topk":
        return cached((taken, device, dtype), lambda: dictionary.rows(taken).to(device, dtype))
    whole = cached((device, dtype), lambda: dictionary.to(device, dtype))
    return cached((taken, device, dtype), lambda: whole.rows(taken))


@dataclass(frozen=True, eq=False)
class Term:
    """One entry of a low-rank edit's table: what the edit `row` does in one column."""

    row: int
    column: int
    move: Slider
    coefficients: tuple[float, float, float]
    """(alpha, beta, upper): a projection or activation `a` moves by `min(alpha * a + beta, upper)`."""


class _Numbers(NamedTuple):
    """The tensors that a low-rank edit computes passes with, for one `ForwardContext.row`, dtype and device."""

    row: Tensor | None
    dtype: torch.dtype
    device: torch.device
    alpha: Tensor
    beta: Tensor
    upper: Tensor | None
    limits: Tensor | None
    read: Tensor | None
    single: tuple[Tensor, Tensor | None] | None
    """Where one direction is read: `alpha` times the direction, `[batch, 1, d]` with `batch` 1 where all texts share
    it, and `beta`, or None where it is 0."""
    token: tuple[Tensor, Tensor | None, float] | None
    """`single` for one token of one text on a CPU: the direction as `[d]`, `beta`, and the square of its limit."""
    write: Tensor


@dataclass(eq=False)
class LowRankEdit:
    """Directions or latents that are moved together at one module.

    Column `j` reads a number `a` at each token, the projection on a direction or the activation of a latent, and moves
    it by `min(alpha * a + beta, upper)` times the share of its schedule that acts there. `write` turns these moves into
    a change of the residual stream. A row holds the numbers of one applied edit.
    """

    rows: int
    """How many edits are applied."""
    terms: list[Term]
    """What each row does in each of the columns that it uses; receipts leave an edit without terms out."""
    write: PerRowTensor
    """[1, columns, d]: the vector that each column adds per unit of its move. For directions set jointly it is their
    dual basis, so that each projection moves by the requested amount and the other columns do not change it; with
    `spread`, an orthonormal basis of their span."""
    read: PerRowTensor | None = None
    """[d, columns]: the directions projected on. None where `dictionary` is read, or nothing is."""
    dictionary: Dictionary | None = None
    """The dictionary whose latents are moved; None for directions."""
    latents: tuple[int, ...] = ()
    """The latent of each column, where there is a dictionary."""
    spread: PerRowTensor | None = None
    """[2^columns, columns, columns], where some of the directions set jointly act on some tokens only. Entry `n` is for
    tokens where the columns of the set bits of `n` act: it maps the moves of their projections to coefficients in the
    basis of `write`."""
    limits: PerRowTensor | None = None
    """[1, 1, columns]: tokens whose norm is above it are not moved. The first token of a text is an attention sink
    with a hundred times the norm of the others; its projection says nothing about a trait, and setting it breaks the
    text."""
    normed: PerRowTensor | None = None
    """[1, 1, columns]: the length of `gain * r`, where an RMSNorm stands between what is read and the residual stream.
    A projection that moves by `x` before the norm moves by `x * length / rms` in the stream, which receipts report."""
    account: LowRankEdit | None = None
    """The low-rank edit under which receipts sum this one's moves, where a slider has several; None: itself."""

    def __post_init__(self) -> None:
        self.columns = self.write.data.shape[1]
        # Filled in numpy, where setting one number takes a twentieth of the time: a new batch fills thousands.
        table = (self.rows, 1, self.columns)
        alpha, beta, used = np.zeros((3, *table))
        upper = np.full(table, math.inf)
        masks: dict[object, Tensor] = {}
        for t in self.terms:
            at, when = (t.row, 0, t.column), t.move.when
            alpha[at], beta[at], upper[at] = t.coefficients
            used[at] = 1.0
            if when.gate is not None:
                masks.setdefault(when.gate.key, torch.zeros(1, 1, self.columns))[0, 0, t.column] = 1.0
        # [rows, 1, columns]: as in `Term.coefficients`; 0 where a row does not use a column.
        self.alpha, self.beta = PerRowTensor(torch.from_numpy(alpha)), PerRowTensor(torch.from_numpy(beta))
        self.upper = PerRowTensor(torch.from_numpy(upper)) if np.isfinite(upper).any() else None
        self.window: ReplyWindow | None = None
        if any(t.move.when.timed for t in self.terms):
            window = np.broadcast_to(np.reshape(ALWAYS.window, (-1, 1, 1, 1)), (len(ALWAYS.window), *table)).copy()
            for t in self.terms:
                window[:, t.row, 0, t.column] = t.move.when.window
            self.window = ReplyWindow(torch.from_numpy(window))
        self._used = PerRowTensor(torch.from_numpy(used))
        self._masks = {key: PerRowTensor(mask) for key, mask in masks.items()}
        """`Gate.key` -> [1, 1, columns]: 1 for the columns that have this gate."""
        self._last: _Numbers | None = None

    @cached_property
    def sites(self) -> list[int]:
        """The site of the direction of each column."""
        site = {t.column: t.move.site for t in self.terms}
        return [site[column] for column in range(self.columns)]

    @cached_property
    def in_model_dtype(self) -> bool:
        """Whether it may be computed in the model's dtype, half precision included.

        True for one direction without a schedule: its move is rounded no more coarsely than the residual stream. False
        with a window, as bf16 cannot count the tokens of a reply, and for directions that are set jointly, as they may
        be nearly parallel.
        """
        return self.read is not None and self.columns == 1 and self.window is None and not self._masks

    def moved(
        self,
        x: Float[Tensor, "batch new d"],
        onto: Float[Tensor, "batch new d"],
        context: ForwardContext,
        writes_to: int | None,
    ) -> Float[Tensor, "batch new d"]:
        """`onto` plus the change of the residual stream, computed from `x`. `writes_to`: as `ModuleEdit.writes_to`.

        Deliberately one long function: between two blocks the weights push this code out of the CPU's caches, and
        fetching it again for another call takes longer than running it (tests/bench/sliders.py measures the hooks).
        """
        n = self._last
        if n is None or n.row is not context.row or n.dtype != x.dtype or n.device != x.device:
            n = self._numbers(context, x)
        if n.token is not None and x.shape[0] == x.shape[1] == 1:
            return self._token(n, n.token, x, onto, context, writes_to)
        if n.single is not None:
            # A product and a sum take half the time of so thin a matrix product, in half precision a fifth.
            read, beta = n.single
            change = (x * read).sum(-1, keepdim=True)
            change = change if beta is None else change + beta
        elif n.read is not None:
            change = torch.addcmul(n.beta, n.alpha, x @ n.read)
        elif self.dictionary is not None:
            rows = encoder_rows(self.dictionary, self.latents, x.device, x.dtype)
            change = torch.addcmul(n.beta, n.alpha, rows(x))
        else:
            change = n.beta
        if n.upper is not None:
            change = torch.minimum(change, n.upper)
        share = None
        if self.window is not None or self._masks:
            share = self._share(x, context)
            change = change * share
        if n.limits is not None:
            # Half the time of `x.norm`, which goes through Python. In place: an edit that has limits also reads, so
            # `change` is a new tensor here, not the cached `n.beta`.
            change.masked_fill_(torch.linalg.vector_norm(x, dim=-1, keepdim=True) > n.limits, 0.0)
        if context.tally is not None and self.terms:
            context.tally.note(self, self._in_stream(change, x), context, writes_to)
        if self.spread is not None:
            # Only the columns that act are set together; the projections of the others may change.
            assert share is not None
            acting = self._used.at(context, change) * (share > 0)
            subset = sum(acting[..., j].long() << j for j in range(change.shape[-1]))
            change = (self.spread.ready(change)[subset] @ change[..., None])[..., 0]
        return torch.addcmul(onto, change, n.write) if self.columns == 1 else onto + change @ n.write[0]

    def _token(
        self, n: _Numbers, token: tuple[Tensor, Tensor | None, float], x: Tensor, onto: Tensor, context: ForwardContext,
        writes_to: int | None,
    ) -> Tensor:  # fmt: skip
        """As `moved`, for one token of one text on a CPU, where fetching the code takes 30 times as long as running it.

        It takes two inner products. The limit is compared in Python, which costs nothing where there is no device to
        wait for.
        """
        read, beta, limit = token
        flat = x.reshape(-1)
        change = torch.dot(flat, read).reshape(1, 1, 1) if beta is None else torch.dot(flat, read) + beta
        if n.upper is not None:
            change = torch.minimum(change, n.upper)
        if limit < math.inf and torch.dot(flat, flat).item() > limit:
            change = torch.zeros_like(change)
        if context.tally is not None and self.terms:
            context.tally.note(self, self._in_stream(change, x), context, writes_to)
        return torch.addcmul(onto, change, n.write)

    def _in_stream(self, change: Tensor, x: Tensor) -> Tensor:
        """How far projections move in the residual stream that move by `change` in `x`, which a norm may follow."""
        if self.normed is None:
            return change
        return change * self.normed.ready(change) / x.square().mean(-1, keepdim=True).sqrt()

    def _numbers(self, context: ForwardContext, like: Tensor) -> _Numbers:
        """The tensors for a pass, in the dtype and on the device of `like`, cached for the passes after it."""
        alpha, beta = self.alpha.at(context, like), self.beta.at(context, like)
        read = None if self.read is None else self.read.ready(like)
        single = None
        # Not for packed texts: with one row per token these products would be as long as the texts, and would have to
        # be computed again at every pass.
        if read is not None and alpha.shape[1] == 1 and self.columns == 1:
            single = alpha * read[:, 0], beta if bool(self.beta.data.any()) else None
        token = None
        finite = like.dtype != torch.float16  # in which the square of a norm of 256 is infinite
        if single is not None and self.in_model_dtype and len(alpha) == 1 and like.is_cpu and finite:
            limit = math.inf if self.limits is None else float(self.limits.data) ** 2
            token = single[0].reshape(-1).contiguous(), single[1], limit
        self._last = _Numbers(
            context.row, like.dtype, like.device, alpha, beta,
            None if self.upper is None else self.upper.at(context, like),
            None if self.limits is None else self.limits.ready(like),
            read, single, token, self.write.ready(like),
        )  # fmt: skip
        return self._last

    def _share(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The share of each column that acts on each token, from windows and gates; there is at least one of either."""
        share = None if self.window is None else self.window.share(context, x)
        for key, table in self._masks.items():
            mask = table.ready(x)
            is_open = 1 - mask + mask * context.gates[key].to(x)
            share = is_open if share is None else share * is_open
        assert share is not None
        return share
