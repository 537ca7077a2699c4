"""Low-rank edits: the arithmetic that sliders do on the output of one module, for a batch of texts.

A `LowRankEdit` adds `f(x @ read) @ write` to the residual stream. Its columns are directions or latents, its rows are
the edits applied to a batch, so that each text can be under its own edit. `joint`, `latents`, `timed_adds` and
`subspaces` build one from interventions; `module_edits.py` decides which module gets which, `steering.py` puts the
hooks on the model, and `receipts.py` reports what they did.

`ForwardContext` says which edit each token of a forward pass is under. `PerRowTensor` and `ReplyWindow` hold numbers
that differ from row to row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.core.dictionary import Dictionary, EncoderRows
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.fit import OUTLIER
from steer.core.intervention import Intervention
from steer.core.schedule import PARALLEL, Gate


class EffectLog(Protocol):
    """Records what low-rank edits did in a forward pass, as `receipts.Tally` does."""

    def note(self, columns: LowRankEdit, by: Tensor, text: ForwardContext, writes_to: int | None) -> None:
        """`columns` moved its projections or activations by `by`, `[batch, new, columns]`.

        `writes_to`: as `ModuleEdit.writes_to`.
        """


@dataclass(eq=False)
class ForwardContext:
    """What hooks need to know of a forward pass over `[batch, new]` tokens or `[1, tokens]` of several packed texts."""

    row: Int[Tensor, " texts"] | None = None
    """Index into the applied edits, one per text, or one per token if `packed`. None: text i of the batch is under edit
    i, or every text is under the only edit."""
    index: Int[Tensor, "batch new"] | None = None
    """The number of the reply token that each position writes: its position in the text minus (prompt length - 1).
    Negative in the prompt, except for its last position, which writes reply token 0. Needed where `Steering.timed`."""
    packed: bool = False
    """Whether several texts are packed into one, so that `row` has one entry per token."""
    valid: Bool[Tensor, "batch new"] | None = None
    """False for padding, which receipts leave out. None: there is no padding."""
    tally: EffectLog | None = None
    """Collects how far each slider moved the residual stream, for receipts. None: nothing is recorded."""
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

    def at(self, text: ForwardContext, like: Tensor, dtype: torch.dtype) -> Float[Tensor, "batch new n"]:
        """The entry of each text of a pass, or of each token if packed, in `dtype` and on the device of `like`."""
        ready = self.ready(like.device, dtype)
        if text.row is None or ready.shape[0] == 1:
            return ready
        # Cached, since the rows of a batch stay the same from token to token.
        if self._last is None or self._last[0] is not text.row or self._last[1] is not ready:
            self._last = (text.row, ready, text.of_rows(ready))
        return self._last[2]

    def ready(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """All entries, on a device and in a dtype. The copy is cached."""
        ready = self._ready.get((device, dtype))
        if ready is None:
            # Outside of inference mode, since passes that need gradients use the same copy.
            with torch.inference_mode(False):
                ready = self._ready[device, dtype] = self.data.to(device, dtype)
        return ready


class ReplyWindow:
    """On which reply tokens each column acts, and with what share: `Schedule.window` by row and column."""

    def __init__(self, data: Float[Tensor, "3 rows 1 n"]) -> None:
        self.start, self.end, self.ramp = (PerRowTensor(part) for part in data)
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for windows that hold equal numbers."""
        return tuple((tuple(t.data.shape), *t.data.flatten().tolist()) for t in (self.start, self.end, self.ramp))

    def share(self, text: ForwardContext, like: Tensor) -> Float[Tensor, "batch new n"]:
        """The share of each column that acts on each token, from 0 to 1, in the dtype and on the device of `like`.

        Computed once per pass for all modules that have this window, since computing it costs more than applying it.
        """
        assert text.index is not None
        if self._last is not None:
            index, row, share = self._last
            if index is text.index and row is text.row and (share.dtype, share.device) == (like.dtype, like.device):
                return share
        i = text.index.to(like.device, like.dtype)[..., None]
        start, end, ramp = (t.at(text, like, like.dtype) for t in (self.start, self.end, self.ramp))
        share = ((i - start + 1) / ramp).clamp(0, 1) * (i < end)
        self._last = (text.index, text.row, share)
        return share


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
    move: Intervention
    coefficients: tuple[float, float, float]
    """(alpha, beta, upper): a projection or activation `a` moves by `min(alpha * a + beta, upper)`."""


class _Numbers(NamedTuple):
    """The tensors that a low-rank edit computes a pass with, in the dtype and on the device of the pass."""

    row: Tensor | None
    """`ForwardContext.row` of the pass."""
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
    """What each row does in each of the columns that it uses."""
    write: PerRowTensor
    """[1, columns, d]: the vector that each column adds per unit of its move. For directions set jointly it is their
    dual basis, so that each projection moves by what was asked and the other columns do not change it; with `spread`,
    an orthonormal basis of their span."""
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
    sites: tuple[int, ...] = ()
    """The site of each column's direction; empty where receipts do not need it."""
    gates: tuple[Gate | None, ...] = ()
    """The gate of each column, None for a column without one."""
    told: bool = True
    """Whether receipts report it."""
    limits: PerRowTensor | None = None
    """[1, 1, columns]: tokens whose norm is above it are not moved. The first token of a text is an attention sink
    with a hundred times the norm of the others; its projection says nothing about a trait, and setting it breaks the
    text."""
    normed: PerRowTensor | None = None
    """[1, 1, columns]: the length of `gain * r`, where an RMSNorm stands between what is read and the residual stream.
    A projection that moves by `x` before the norm moves by `x * length / rms` in the stream, which receipts report."""
    account: LowRankEdit | None = None
    """The low-rank edit under which receipts sum this one's moves, where a slider has several; None: itself."""
    alpha: PerRowTensor = field(init=False)
    """[rows, 1, columns]: as in `Term.coefficients`; 0 where a row does not use a column."""
    beta: PerRowTensor = field(init=False)
    """[rows, 1, columns]: as `alpha`."""
    upper: PerRowTensor | None = field(init=False)
    """[rows, 1, columns]: as `alpha`, inf where a move is not bounded; None where none is."""
    window: ReplyWindow | None = field(init=False)
    """On which reply tokens each column acts; None where none depends on the position."""
    used: PerRowTensor | None = field(init=False)
    """[rows, 1, columns]: 1 where the row uses the column, else 0; None without `spread`."""

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
        self.alpha, self.beta = PerRowTensor(alpha), PerRowTensor(beta)
        self.upper = PerRowTensor(upper) if any(t.coefficients[2] < math.inf for t in self.terms) else None
        timed = any(t.move.when.timed for t in self.terms)
        self.window = ReplyWindow(window) if timed else None
        self.used = PerRowTensor(used) if self.spread is not None else None
        self._last: _Numbers | None = None
        self._masks = {
            gate.key: PerRowTensor(torch.tensor([[[float(g is not None and g.key == gate.key) for g in self.gates]]]))
            for gate in self.gates
            if gate is not None
        }

    @property
    def timed(self) -> bool:
        """Whether it needs `ForwardContext.index`, the reply token of every position."""
        return self.window is not None

    @cached_property
    def short(self) -> bool:
        """Whether the model's dtype is precise enough for it, half precision included.

        It is for one direction without a schedule: its move is rounded no more coarsely than the residual stream. It is
        not with a window, as bf16 cannot count the tokens of a reply, nor for directions that are set jointly,
        which may be nearly parallel.
        """
        return self.read is not None and len(self.gates) == 1 and self.window is None and not self._masks

    def moved(
        self,
        x: Float[Tensor, "batch new d"],
        onto: Float[Tensor, "batch new d"],
        text: ForwardContext,
        writes_to: int | None,
    ) -> Float[Tensor, "batch new d"]:
        """`onto` plus the change of the residual stream, computed from `x`. `writes_to`: as `ModuleEdit.writes_to`.

        Deliberately one long function: between two blocks the weights push this code out of the CPU's caches, and
        fetching it again for another call takes longer than running it (tests/bench/sliders.py measures the hooks).
        """
        n = self._last
        if n is None or n.row is not text.row or n.dtype != x.dtype or n.device != x.device:
            n = self._numbers(text, x)
        if n.token is not None and x.shape[0] == x.shape[1] == 1:
            return self._token(n, n.token, x, onto, text, writes_to)
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
            share = self._share(x, text)
            change = change * share
        if n.limits is not None:
            # Half the time of `x.norm`, which goes through Python. In place: an edit that has limits also reads, so
            # `change` is a new tensor here, not the cached `n.beta`.
            change.masked_fill_(torch.linalg.vector_norm(x, dim=-1, keepdim=True) > n.limits, 0.0)
        if text.tally is not None and self.told:
            text.tally.note(self, self._in_stream(change, x), text, writes_to)
        if self.spread is not None:
            # Only the columns that act are set together; the projections of the others may change.
            assert self.used is not None
            assert share is not None
            acting = self.used.at(text, change, change.dtype) * (share > 0)
            subset = sum(acting[..., j].long() << j for j in range(change.shape[-1]))
            change = (self.spread.ready(change.device, change.dtype)[subset] @ change[..., None])[..., 0]
        return torch.addcmul(onto, change, n.write) if len(self.gates) == 1 else onto + change @ n.write[0]

    def _token(
        self, n: _Numbers, token: tuple[Tensor, Tensor | None, float], x: Tensor, onto: Tensor, text: ForwardContext,
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
        if text.tally is not None and self.told:
            text.tally.note(self, self._in_stream(change, x), text, writes_to)
        return torch.addcmul(onto, change, n.write)

    def _in_stream(self, change: Tensor, x: Tensor) -> Tensor:
        """How far projections move in the residual stream that move by `change` in `x`, which a norm may follow."""
        if self.normed is None:
            return change
        return change * self.normed.ready(change.device, change.dtype) / x.square().mean(-1, keepdim=True).sqrt()

    def _numbers(self, text: ForwardContext, like: Tensor) -> _Numbers:
        """The tensors for a pass, in the dtype and on the device of `like`, cached for the passes after it."""
        dtype, device = like.dtype, like.device
        alpha, beta = self.alpha.at(text, like, dtype), self.beta.at(text, like, dtype)
        read = None if self.read is None else self.read.ready(device, dtype)
        single = None
        # Not for packed texts: with one row per token these products would be as long as the texts, and would have to
        # be computed again at every pass.
        if read is not None and alpha.shape[1] == 1 and len(self.gates) == 1:
            single = alpha * read[:, 0], beta if bool(self.beta.data.any()) else None
        token = None
        # Not in fp16, where the square of a norm of 256 is infinite.
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

    def _share(self, x: Tensor, text: ForwardContext) -> Tensor:
        """The share of each column that acts on each token, from windows and gates; there is at least one of either."""
        share = None if self.window is None else self.window.share(text, x)
        for key, table in self._masks.items():
            mask = table.ready(x.device, x.dtype)
            is_open = 1 - mask + mask * text.gates[key].to(x.device, x.dtype)
            share = is_open if share is None else share * is_open
        assert share is not None
        return share


def joint(
    moves: Sequence[tuple[int, Intervention]],
    rows: int,
    order: Sequence[Place],
    gain: Float[Tensor, " d"] | None = None,
) -> LowRankEdit:
    """An edit that sets the projections on several directions together, whatever the angles between them.

    With `R` the directions as rows and `R^+` its pseudoinverse, `h += R^+ (wanted - R h)` is the smallest change after
    which every projection is `wanted`. For ablation at full strength it is the orthogonal projection.

    `moves`: (row, intervention). `rows`: how many edits are applied. `order`: the place of each column. `gain`: of the
    RMSNorm between the module and the residual stream, where there is one; before it, direction `r` is read and written
    along `gain * r` (see `checkpoint.ablation`).
    """
    r, lengths = torch.stack([p.direction.vector.double() for p in order]), None
    if gain is not None:
        r = r * gain
        lengths = r.norm(dim=-1)
        r = r / lengths[:, None]
    column = {p.key: j for j, p in enumerate(order)}
    of_row: dict[int, list[Intervention]] = {}
    for row, m in moves:
        of_row.setdefault(row, []).append(m)
    terms = [
        Term(row, column[place.key], m, m.coefficients[0])
        for row, row_moves in of_row.items()
        for m, place in zip(row_moves, places(row_moves), strict=True)
    ]
    spread = None
    if len(order) > 1 and not all(t.move.when.always for t in terms):
        left, sizes, basis = torch.linalg.svd(r, full_matrices=False)
        write, spread = basis, PerRowTensor(_pseudoinverses(left * sizes))
    else:
        write = torch.zeros_like(r)
        taken = sorted({t.column for t in terms})
        if taken:
            write[taken] = torch.linalg.pinv(r[taken], rtol=PARALLEL).T
    return LowRankEdit(
        rows, terms, PerRowTensor(write[None]), PerRowTensor(r.T), spread=spread,
        sites=tuple(p.direction.site for p in order), gates=tuple(p.gate for p in order),
        # Ablation edits the outputs of writers, where no token has an outlying norm.
        limits=None if moves[0][1].operation == "ablate" else _limits([p.direction.residual_norm for p in order]),
        normed=None if lengths is None else PerRowTensor(lengths[None, None]),
    )  # fmt: skip


def subspaces(parts: Sequence[tuple[Float[Tensor, "d k"], Mapping[int, float]]], rows: int) -> LowRankEdit:
    """An edit that ablates subspaces. It belongs to no slider, so receipts leave it out.

    `parts`: (an orthonormal basis, the strength by row). A row has a strength in one of them at most.
    """
    q = torch.cat([basis.double() for basis, _ in parts], dim=1)
    out = LowRankEdit(rows, [], PerRowTensor(q.T[None]), PerRowTensor(q), told=False)
    first = 0
    for basis, strengths in parts:
        for row, strength in strengths.items():
            out.alpha.data[row, 0, first : first + basis.shape[1]] = -strength
        first += basis.shape[1]
    return out


@dataclass(frozen=True)
class Place:
    """What one column of jointly set directions is for."""

    direction: Direction
    gate: Gate | None
    number: int
    """0, or higher where earlier moves of the row have the same direction and gate, at other times."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for places that can share a column."""
        return id(self.direction), self.gate and self.gate.key, self.number


def places(moves: Sequence[Intervention]) -> list[Place]:
    """The place of each of one row's moves, all of them on directions."""
    out: list[Place] = []
    for m in moves:
        assert isinstance(m.target, Direction)
        place = Place(m.target, m.when.gate, 0)
        out.append(replace(place, number=sum(replace(p, number=0).key == place.key for p in out)))
    return out


def _limits(norms: Sequence[float]) -> PerRowTensor | None:
    """`LowRankEdit.limits` from each column's median residual norm (nan: not known); None where none is known."""
    known = [math.inf if math.isnan(norm) else OUTLIER * norm for norm in norms]
    return PerRowTensor(torch.tensor([[known]], dtype=torch.float64)) if min(known) < math.inf else None


def _pseudoinverses(r: Float[Tensor, "n d"]) -> Float[Tensor, "subsets d n"]:
    """The pseudoinverse of every subset of the rows; bit `j` of a subset's number is set where row `j` is in it."""
    numbers = torch.arange(2 ** len(r))
    acting = (numbers[:, None] >> torch.arange(len(r))) & 1
    return torch.linalg.pinv(r * acting[..., None], rtol=PARALLEL)


def latents(moves: Sequence[tuple[int, Intervention]], rows: int, dictionary: Dictionary) -> LowRankEdit:
    """An edit that moves activations of one dictionary's latents along their decoder rows.

    The part of the residual stream that the dictionary cannot reconstruct stays. `moves` and `rows`: as `joint`.
    """
    order: dict[tuple[object, ...], tuple[int, Gate | None]] = {}
    terms: list[Term] = []
    times: Counter[tuple[object, ...]] = Counter()
    for row, m in moves:
        gate = m.when.gate
        for latent, coefficients in zip(m.target.indices, m.coefficients, strict=True):  # type: ignore[union-attr]
            key = (latent, gate and gate.key)
            # A row's second move of the same latent, at another time, takes another column.
            times[row, *key] += 1
            key = (*key, times[row, *key])
            order.setdefault(key, (latent, gate))
            terms.append(Term(row, list(order).index(key), m, coefficients))
    taken = tuple(latent for latent, _ in order.values())
    gates = tuple(gate for _, gate in order.values())
    # To fp64 first, since `decoder_rows` may scale the rows.
    write = dictionary.part(taken).to("cpu", torch.float64).decoder_rows(range(len(taken)))
    norm = math.nan if dictionary.norm is None else dictionary.norm
    limits = _limits([norm] * len(taken))
    return LowRankEdit(rows, terms, PerRowTensor(write[None]), None, dictionary, taken, gates=gates, limits=limits)


def timed_adds(moves: Sequence[tuple[int, Intervention]], rows: int) -> LowRankEdit:
    """An edit that adds vectors on some tokens only, and reads nothing. `moves` and `rows`: as `joint`."""
    terms, vectors, gates = [], [], []
    for row, m in moves:
        direction = m.target if isinstance(m.target, Direction) else m.target.direction
        terms.append(Term(row, len(vectors), m, (0.0, m.amount * direction.gap, math.inf)))
        vectors.append(direction.vector.double())
        gates.append(m.when.gate)
    return LowRankEdit(rows, terms, PerRowTensor(torch.stack(vectors)[None]), gates=tuple(gates))
