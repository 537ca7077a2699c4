"""Norm-preserving ablations on the running model: two hooks on each writer that do what the bake does to its columns.

With `y = W x + b`, `Q` the subspace and `s` the strength, the bake scales what each column of `W` writes outside of `Q`
by its own factor `c`, and what it writes inside by `1 - s` (`weights.arithmetic`). So it puts out

    y' = (1 - QQ^T) W (c * x) + (1 - s) QQ^T W x + b'

A hook before the module hands it `c * x`; the one behind it takes `QQ^T` of what came out away, and puts `(1 - s)` of
`Q^T W x` there, which the first one read with the thin matrix `Q^T W`. No product as large as the module's own is made.
An embedding has no input to scale; each of its rows is told its factor by the row itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.live.frame import TextPass
from steer.live.program import Gain, Rows
from steer.live.table import Table
from steer.weights.ablation import Ablation
from steer.weights.anatomy import Anatomy, LiveWriter
from steer.weights.arithmetic import ablate, growth, shadow


@dataclass(frozen=True, eq=False)
class WriterHook:
    """One hook of one writer, not on the model until it is registered."""

    module: nn.Module
    hook: Callable[..., Any]
    before: bool
    """Whether it is given the module's input, not its output."""

    def register(self) -> RemovableHandle:
        """Put it on the model."""
        if self.before:
            return self.module.register_forward_pre_hook(self.hook)
        return self.module.register_forward_hook(self.hook, prepend=True)


class KeptNorms:
    """Makes the hooks of the rows whose edits keep norms; other rows of a batch pass through them as they are."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, gain: Gain, text: Callable[[], TextPass]) -> None:
        self.model, self.anatomy, self._gain, self._text = model, anatomy, gain, text

    @property
    def cannot(self) -> str | None:
        """Why this model's norms cannot be kept: of every writer the columns are scaled, so it has to be a matrix in
        memory. None where they can."""
        for writer, module in _writers(self.model, self.anatomy):
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
                return (
                    f"{self.anatomy.where}: a norm-preserving ablation scales the columns of {writer.module}, expected "
                    f"a matrix in memory that is not quantised, found {type(module).__name__} without one; bake it, or "
                    "take another method"
                )
        return None

    def hooks(self, rows: Rows) -> tuple[WriterHook, ...]:
        """Those of rows out of `keeping`."""
        edits = list(dict.fromkeys(e for e in rows if e is not None))
        # 0 stands for the rows that are left alone.
        of_row = torch.tensor([0 if e is None else 1 + edits.index(e) for e in rows]) if len(rows) > 1 else None
        each = [Ablation(e, self._gain) for e in edits]
        made: list[WriterHook] = []
        for writer, module in _writers(self.model, self.anatomy) if edits else ():
            if any(a.strength(writer) for a in each):
                what = _Writer.of(writer, module, each, _axis(self.anatomy, writer))
                made += self._hooks(what, module, of_row)
        return tuple(made)

    def _hooks(self, what: _Writer, module: nn.Module, of_row: Int[Tensor, " rows"] | None) -> list[WriterHook]:
        inside: list[Tensor] = []

        def before(_: nn.Module, args: Any) -> Any:
            x, rows = args[0], _rows(self._text(), of_row, args[0].device)
            inside[:] = [what.inside(x)]
            return (what.scaled(x, rows), *args[1:])

        def behind(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            rows = _rows(self._text(), of_row, output.device)
            return what.written(output, inside.pop(), rows) if what.cast is not None else what.row(output, rows)

        after = WriterHook(module, behind, before=False)
        return [after] if what.cast is None else [WriterHook(module, before, before=True), after]


def keeping(rows: Rows) -> Rows:
    """The edits that keep norms, None in place of the others."""
    return tuple(e if e is not None and e.ablate and e.method.norm_preserving else None for e in rows)


_Picked = tuple[Int[Tensor, " texts"] | None, bool]
"""Which edit each text goes by, or, packed, each token; None for the one that there is."""


@dataclass(eq=False)
class _Writer:
    """What is done at one writer: an entry an edit, the first for rows that are left alone."""

    q: Table
    """[1, d, k]: the bases of all edits, side by side."""
    mine: Table
    """[edits, 1, k]: 1 for the columns of the edit's own basis."""
    left: Table
    """[edits, 1, k]: `1 - s` there."""
    scale: Table | None
    """[edits, 1, in]"""
    cast: Table | None
    """[1, in, k]: `(Q^T W)^T`. None for an embedding."""
    shift: Table | None
    """[edits, 1, d]: `b' - b + QQ^T b`, where there is a bias."""

    @classmethod
    def of(cls, writer: LiveWriter, module: nn.Module, each: Sequence[Ablation], axis: int) -> _Writer:
        """For the writer as these ablations edit it."""
        weight: Any = module.weight
        weight, bias = weight.detach(), getattr(module, "bias", None)
        strengths = [a.strength(writer) for a in each]
        bases = [a.subspace(writer)[:, : None if s else 0] for a, s in zip(each, strengths, strict=True)]
        q, embeds = torch.cat(bases, dim=1), writer.kind == "embedding"
        mine, left = torch.zeros(2, 1 + len(each), 1, q.shape[1], dtype=torch.float64)
        scale = torch.ones(1 + len(each), 1, 0 if embeds else weight.shape[1 - axis], dtype=torch.float64)
        shift = torch.zeros(1 + len(each), 1, len(q), dtype=torch.float64)
        casts, at = [], 0
        for edit, (basis, strength) in enumerate(zip(bases, strengths, strict=True), 1):
            here = slice(at, at := at + basis.shape[1])
            mine[edit, 0, here], left[edit, 0, here] = 1.0, 1 - strength
            if embeds or not strength:
                continue
            cast = shadow(weight, basis, axis)
            casts.append(cast.double().cpu())
            scale[edit, 0] = growth(weight, cast, axis, strength).double().cpu()
            if bias is not None:
                before = bias.detach().to("cpu", torch.float64)
                after = before[None].clone()
                ablate(after, basis, 1, strength, norm_preserving=True)
                shift[edit, 0] = after[0] - before + basis @ (basis.T @ before)
        return cls(
            Table(q[None]), Table(mine), Table(left),
            None if embeds else Table(scale),
            None if embeds else Table(torch.cat(casts).T[None]),
            Table(shift) if bias is not None and not embeds else None,
        )  # fmt: skip

    def inside(self, x: Float[Tensor, "batch new in"]) -> Float[Tensor, "batch new k"]:
        """What the untouched weight would write into the subspaces."""
        assert self.cast is not None
        wide = _wide(x)
        return wide @ self.cast.ready(x.device, wide.dtype)[0]

    def scaled(self, x: Float[Tensor, "batch new in"], rows: _Picked) -> Float[Tensor, "batch new in"]:
        """What the weight is given in place of `x`."""
        assert self.scale is not None
        wide = _wide(x)
        return (wide * _of(self.scale, rows, wide)).to(x.dtype)

    def written(self, z: Tensor, inside: Tensor, rows: _Picked) -> Tensor:
        """What the module puts out, having put out `z` for the scaled input."""
        wide = _wide(z)
        q = self.q.ready(z.device, wide.dtype)[0]
        by = _of(self.left, rows, wide) * inside.to(z.device) - _of(self.mine, rows, wide) * (wide @ q)
        out = wide + by @ q.T
        return (out if self.shift is None else out + _of(self.shift, rows, wide)).to(z.dtype)

    def row(self, e: Float[Tensor, "batch new d"], rows: _Picked) -> Float[Tensor, "batch new d"]:
        """What an embedding puts out, having put out the row `e`: each keeps its length."""
        wide = _wide(e)
        q = self.q.ready(e.device, wide.dtype)[0]
        mine = _of(self.mine, rows, wide) * (wide @ q)
        left = _of(self.left, rows, wide) * mine
        outside = wide - mine @ q.T
        have = outside.square().sum(-1, keepdim=True)
        want = have + mine.square().sum(-1, keepdim=True) - left.square().sum(-1, keepdim=True)
        enough = have > torch.finfo(wide.dtype).eps ** (2 / 3) * want
        grown = torch.where(enough, want / torch.where(enough, have, 1.0), 1.0).sqrt()
        return (grown * outside + left @ q.T).to(e.dtype)


def _writers(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[LiveWriter, nn.Module]]:
    """Every writer with its module; of several embeddings whose sum begins the stream, each."""
    for writer in anatomy.live_writers:
        if writer.kind != "embedding":
            yield writer, model.get_submodule(writer.module)
    for name in anatomy.layout.embeddings:
        path = anatomy.layout.base + name
        yield LiveWriter("embedding", None, path), model.get_submodule(path)


def _axis(anatomy: Anatomy, writer: LiveWriter) -> int:
    """The axis of the writer's weight that faces the residual stream."""
    parts = {"embedding": 1, "attention": anatomy.layout.attention.axis, "mlp": anatomy.layout.mlp[-1][0].axis}
    return parts[writer.kind]


def _rows(text: TextPass, of_row: Int[Tensor, " rows"] | None, device: torch.device) -> _Picked:
    if of_row is None:
        return None, False
    of_row = of_row.to(device)
    return (of_row if text.row is None else of_row[text.row.to(device)]), text.packed


def _of(table: Table, rows: _Picked, like: Tensor) -> Tensor:
    """Each text's entry of a table, or, packed, each token's."""
    picked, packed = rows
    ready = table.ready(like.device, like.dtype)
    if picked is None:
        return ready[1:]
    return ready[picked].transpose(0, 1) if packed else ready[picked]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
