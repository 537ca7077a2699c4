"""Norm-preserving ablations on the running model: two hooks per writer do what the bake does to its weights.

A writer computes `y = W x + b`. With `Q` a basis of the subspace and `s` the strength, the bake scales the part of each
column of `W` outside of `Q` by a factor `c` of that column, and the part inside by `1 - s` (`checkpoint.ablation`). The
baked writer computes

    y' = (1 - QQ^T) W (c * x) + (1 - s) QQ^T W x + b'

The hook before the module reads `Q^T W x` with the thin matrix `Q^T W`, and replaces `x` by `c * x`. The hook after the
module subtracts `QQ^T` times the output, and adds `(1 - s) Q` times what the first one read. No product as large as the
module's is made. An embedding has no input to scale; the factor is computed from the looked-up row.

`steering.py` puts these hooks on the model. All other edits go through `module_edits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.checkpoint.ablation import Ablation, ablate, growth, shadow
from steer.checkpoint.anatomy import Anatomy, LiveWriter
from steer.model.steering.low_rank import ForwardContext, PerRowTensor
from steer.model.steering.module_edits import Gain, Rows


@dataclass(frozen=True, eq=False)
class WriterHook:
    """One hook of one writer; `register` puts it on the model."""

    module: nn.Module
    hook: Callable[..., Any]
    before: bool
    """Whether it runs before the module, on its input; else after it, on its output."""

    def register(self) -> RemovableHandle:
        """Put the hook on the model."""
        if self.before:
            return self.module.register_forward_pre_hook(self.hook)
        return self.module.register_forward_hook(self.hook, prepend=True)


class NormPreservingHooks:
    """Makes the hooks for rows whose edits preserve norms; other rows of a batch pass through them unchanged."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, gain: Gain, text: Callable[[], ForwardContext]) -> None:
        self.model, self.anatomy, self._gain, self._text = model, anatomy, gain, text

    @property
    def cannot(self) -> str | None:
        """Why norm-preserving ablations cannot run on this model; None where they can.

        They scale the columns of every writer, so each has to be an unquantised matrix in memory.
        """
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
        """The hooks for rows that `keeping` returned."""
        edits = list(dict.fromkeys(e for e in rows if e is not None))
        # 0 stands for the rows that are not edited.
        of_row = torch.tensor([0 if e is None else 1 + edits.index(e) for e in rows]) if len(rows) > 1 else None
        ablations = [Ablation(e, self._gain) for e in edits]
        hooks: list[WriterHook] = []
        for writer, module in _writers(self.model, self.anatomy) if edits else ():
            if any(a.strength(writer) for a in ablations):
                tables = _WriterTables.of(writer, module, ablations, _axis(self.anatomy, writer))
                hooks += self._hooks(tables, module, of_row)
        return tuple(hooks)

    def _hooks(self, tables: _WriterTables, module: nn.Module, of_row: Int[Tensor, " rows"] | None) -> list[WriterHook]:
        inside: list[Tensor] = []

        def before(_: nn.Module, args: Any) -> Any:
            x, rows = args[0], _rows(self._text(), of_row, args[0].device)
            inside[:] = [tables.inside(x)]
            return (tables.scaled(x, rows), *args[1:])

        def behind(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            rows = _rows(self._text(), of_row, output.device)
            return tables.written(output, inside.pop(), rows) if tables.cast is not None else tables.row(output, rows)

        after = WriterHook(module, behind, before=False)
        return [after] if tables.cast is None else [WriterHook(module, before, before=True), after]


def keeping(rows: Rows) -> Rows:
    """The edits with a norm-preserving ablation, None in place of the others."""
    return tuple(e if e is not None and e.ablate and e.method.norm_preserving else None for e in rows)


_Picked = tuple[Int[Tensor, " texts"] | None, bool]
"""(which edit each text is under, or each token if packed, None where there is only one edit; whether packed)"""


@dataclass(eq=False)
class _WriterTables:
    """What is done at one writer. Tables by edit have one entry per edit, after one for rows that are not edited."""

    q: PerRowTensor
    """[1, d, k]: the bases of all edits, side by side."""
    used: PerRowTensor
    """[edits, 1, k]: 1 for the columns of `q` that belong to the edit's basis, else 0."""
    remaining: PerRowTensor
    """[edits, 1, k]: `1 - s` in those columns, else 0."""
    scale: PerRowTensor | None
    """[edits, 1, in]: the factor `c` of each input. None for an embedding."""
    cast: PerRowTensor | None
    """[1, in, k]: `(Q^T W)^T`. None for an embedding."""
    shift: PerRowTensor | None
    """[edits, 1, d]: `b' - b + QQ^T b`; None where there is no bias."""

    @classmethod
    def of(cls, writer: LiveWriter, module: nn.Module, ablations: Sequence[Ablation], axis: int) -> _WriterTables:
        """The tables for a writer that these ablations edit. `axis`: as `_axis`."""
        weight: Any = module.weight
        weight, bias = weight.detach(), getattr(module, "bias", None)
        strengths = [a.strength(writer) for a in ablations]
        bases = [a.subspace(writer)[:, : None if s else 0] for a, s in zip(ablations, strengths, strict=True)]
        q, embeds = torch.cat(bases, dim=1), writer.kind == "embedding"
        used, remaining = torch.zeros(2, 1 + len(ablations), 1, q.shape[1], dtype=torch.float64)
        scale = torch.ones(1 + len(ablations), 1, 0 if embeds else weight.shape[1 - axis], dtype=torch.float64)
        shift = torch.zeros(1 + len(ablations), 1, len(q), dtype=torch.float64)
        casts, at = [], 0
        for edit, (basis, strength) in enumerate(zip(bases, strengths, strict=True), 1):
            columns = slice(at, at := at + basis.shape[1])
            used[edit, 0, columns], remaining[edit, 0, columns] = 1.0, 1 - strength
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
            PerRowTensor(q[None]), PerRowTensor(used), PerRowTensor(remaining),
            None if embeds else PerRowTensor(scale),
            None if embeds else PerRowTensor(torch.cat(casts).T[None]),
            PerRowTensor(shift) if bias is not None and not embeds else None,
        )  # fmt: skip

    def inside(self, x: Float[Tensor, "batch new in"]) -> Float[Tensor, "batch new k"]:
        """`Q^T W x`: what the original weight writes into the subspaces."""
        assert self.cast is not None
        wide = _wide(x)
        return wide @ self.cast.ready(x.device, wide.dtype)[0]

    def scaled(self, x: Float[Tensor, "batch new in"], rows: _Picked) -> Float[Tensor, "batch new in"]:
        """`c * x`: the input of the module in place of `x`."""
        assert self.scale is not None
        wide = _wide(x)
        return (wide * _of(self.scale, rows, wide)).to(x.dtype)

    def written(self, z: Tensor, inside: Tensor, rows: _Picked) -> Tensor:
        """The edited output, from the output `z` for the scaled input and from `inside` of the original input."""
        wide = _wide(z)
        q = self.q.ready(z.device, wide.dtype)[0]
        change = _of(self.remaining, rows, wide) * inside.to(z.device) - _of(self.used, rows, wide) * (wide @ q)
        out = wide + change @ q.T
        return (out if self.shift is None else out + _of(self.shift, rows, wide)).to(z.dtype)

    def row(self, e: Float[Tensor, "batch new d"], rows: _Picked) -> Float[Tensor, "batch new d"]:
        """The edited output of an embedding, from the looked-up rows `e`: each row keeps its length."""
        wide = _wide(e)
        q = self.q.ready(e.device, wide.dtype)[0]
        inside = _of(self.used, rows, wide) * (wide @ q)
        inside_after = _of(self.remaining, rows, wide) * inside
        outside = wide - inside @ q.T
        have = outside.square().sum(-1, keepdim=True)
        want = have + inside.square().sum(-1, keepdim=True) - inside_after.square().sum(-1, keepdim=True)
        enough = have > torch.finfo(wide.dtype).eps ** (2 / 3) * want
        grown = torch.where(enough, want / torch.where(enough, have, 1.0), 1.0).sqrt()
        return (grown * outside + inside_after @ q.T).to(e.dtype)


def _writers(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[LiveWriter, nn.Module]]:
    """Every writer with its module, and every embedding where the residual stream begins with a sum of several."""
    for writer in anatomy.live_writers:
        if writer.kind != "embedding":
            yield writer, model.get_submodule(writer.module)
    for name in anatomy.layout.embeddings:
        path = anatomy.layout.base + name
        yield LiveWriter("embedding", None, path), model.get_submodule(path)


def _axis(anatomy: Anatomy, writer: LiveWriter) -> int:
    """The axis of the writer's weight that faces the residual stream, 0 or 1."""
    parts = {"embedding": 1, "attention": anatomy.layout.attention.axis, "mlp": anatomy.layout.mlp[-1][0].axis}
    return parts[writer.kind]


def _rows(text: ForwardContext, of_row: Int[Tensor, " rows"] | None, device: torch.device) -> _Picked:
    if of_row is None:
        return None, False
    of_row = of_row.to(device)
    return (of_row if text.row is None else of_row[text.row.to(device)]), text.packed


def _of(table: PerRowTensor, rows: _Picked, like: Tensor) -> Tensor:
    """The entry of a table for each text, or for each token if packed."""
    picked, packed = rows
    ready = table.ready(like.device, like.dtype)
    if picked is None:
        return ready[1:]
    return ready[picked].transpose(0, 1) if packed else ready[picked]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
