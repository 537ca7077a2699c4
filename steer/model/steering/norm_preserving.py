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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.checkpoint.ablation import Ablation
from steer.checkpoint.anatomy import Anatomy, LiveWriter
from steer.checkpoint.projection import ablate, growth, shadow
from steer.model.steering.low_rank import ForwardContext, PerRowTensor
from steer.model.steering.module_edits import Gain, Rows

WriterHook = Callable[[], RemovableHandle]
"""Puts one hook of one writer on the model."""


def obstacle(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Why norm-preserving ablations cannot run on this model; None where they can.

    They scale the columns of every writer, so each has to be an unquantised matrix in memory.
    """
    for writer, module in _writers(model, anatomy):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
            return (
                f"{anatomy.where}: a norm-preserving ablation scales the columns of {writer.module}, expected "
                f"a matrix in memory that is not quantised, found {type(module).__name__} without one; bake it, or "
                "take another method"
            )
    return None


def keeping(rows: Rows) -> Rows:
    """The edits with a norm-preserving ablation, None in place of the others."""
    return tuple(e if e is not None and e.ablate and e.method.norm_preserving else None for e in rows)


def writer_hooks(
    rows: Rows, model: nn.Module, anatomy: Anatomy, gain: Gain, current: Callable[[], ForwardContext]
) -> tuple[WriterHook, ...]:
    """The hooks for rows that `keeping` returned; rows without an edit pass through them unchanged.

    `current`: returns the context of the forward pass that is being made.
    """
    edits = list(dict.fromkeys(rows))
    entries = torch.tensor([edits.index(e) for e in rows])
    ablations = [None if e is None else Ablation(e, gain) for e in edits]

    def entry_of(device: torch.device) -> ForwardContext:
        """The pass, with each text's entry in the tables in place of its row."""
        now, entry = current(), entries.to(device)
        return replace(now, row=entry if now.row is None else entry[now.row.to(device)])

    out: list[WriterHook] = []
    for writer, module in _writers(model, anatomy) if any(edits) else ():
        if any(a is not None and a.strength(writer) for a in ablations):
            tables = _WriterTables.of(writer, module, ablations)
            out += _hooks(tables, module, entry_of)
    return tuple(out)


def _hooks(
    tables: _WriterTables, module: nn.Module, entry_of: Callable[[torch.device], ForwardContext]
) -> Iterator[WriterHook]:
    inside: list[Tensor] = []

    def before(_: nn.Module, args: Any) -> Any:
        inside[:] = [tables.inside(args[0])]
        return (tables.scaled(args[0], entry_of(args[0].device)), *args[1:])

    def behind(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if tables.cast is None:
            return tables.row(output, entry_of(output.device))
        return tables.written(output, inside.pop(), entry_of(output.device))

    if tables.cast is not None:
        yield partial(module.register_forward_pre_hook, before)
    yield partial(module.register_forward_hook, behind, prepend=True)


@dataclass(eq=False)
class _WriterTables:
    """What is done at one writer. Tables have one entry per edit; rows that are not edited are under an edit as well,
    which changes nothing."""

    q: PerRowTensor
    """[1, d, k]: the bases of all edits, side by side."""
    used: PerRowTensor
    """[edits, 1, k]: 1 for the columns of `q` that belong to the edit's basis, else 0."""
    remaining: PerRowTensor
    """[edits, 1, k]: `1 - s` in those columns, else 0."""
    scale: PerRowTensor
    """[edits, 1, in]: the factor `c` of each input; empty for an embedding."""
    cast: PerRowTensor | None
    """[1, in, k]: `(Q^T W)^T`. None for an embedding."""
    shift: PerRowTensor
    """[edits, 1, d]: `b' - b + QQ^T b`; 0 where there is no bias."""

    @classmethod
    def of(cls, writer: LiveWriter, module: nn.Module, ablations: list[Ablation | None]) -> _WriterTables:
        """The tables of a writer."""
        weight: Any = module.weight
        weight, bias, embeds = weight.detach(), getattr(module, "bias", None), writer.kind == "embedding"
        axis = writer.axis
        strengths = [0.0 if a is None else a.strength(writer) for a in ablations]
        bases = [a.subspace(writer) for a, s in zip(ablations, strengths, strict=True) if a is not None and s]
        q = torch.cat(bases, dim=1)
        used, remaining = torch.zeros(2, len(ablations), 1, q.shape[1], dtype=torch.float64)
        scale = torch.ones(len(ablations), 1, 0 if embeds else weight.shape[1 - axis], dtype=torch.float64)
        shift = torch.zeros(len(ablations), 1, len(q), dtype=torch.float64)
        casts, at = [], 0
        edited = [(edit, strength) for edit, strength in enumerate(strengths) if strength]
        for (edit, strength), basis in zip(edited, bases, strict=True):
            columns = slice(at, at := at + basis.shape[1])
            used[edit, 0, columns], remaining[edit, 0, columns] = 1.0, 1 - strength
            if embeds:
                continue
            cast = shadow(weight, basis, axis)
            casts.append(cast.double().cpu())
            scale[edit, 0] = growth(weight, cast, axis, strength).double().cpu()
            if bias is not None:
                before = bias.detach().to("cpu", torch.float64)
                after = before[None].clone()
                ablate(after, basis, 1, strength, norm_preserving=True)
                shift[edit, 0] = after[0] - before + basis @ (basis.T @ before)
        cast_all = None if embeds else PerRowTensor(torch.cat(casts).T[None])
        return cls(
            PerRowTensor(q[None]), PerRowTensor(used), PerRowTensor(remaining), PerRowTensor(scale), cast_all,
            PerRowTensor(shift),
        )  # fmt: skip

    def inside(self, x: Float[Tensor, "batch new in"]) -> Float[Tensor, "batch new k"]:
        """`Q^T W x`: what the original weight writes into the subspaces."""
        assert self.cast is not None
        wide = _wide(x)
        return wide @ self.cast.ready(wide)[0]

    def scaled(self, x: Float[Tensor, "batch new in"], context: ForwardContext) -> Float[Tensor, "batch new in"]:
        """`c * x`: the input of the module in place of `x`."""
        wide = _wide(x)
        return (wide * _of(self.scale, context, wide)).to(x.dtype)

    def written(self, z: Tensor, inside: Tensor, context: ForwardContext) -> Tensor:
        """The edited output, from the output `z` for the scaled input and from `inside` of the original input."""
        wide = _wide(z)
        q = self.q.ready(wide)[0]
        change = _of(self.remaining, context, wide) * inside.to(z.device) - _of(self.used, context, wide) * (wide @ q)
        return (wide + change @ q.T + _of(self.shift, context, wide)).to(z.dtype)

    def row(self, e: Float[Tensor, "batch new d"], context: ForwardContext) -> Float[Tensor, "batch new d"]:
        """The edited output of an embedding, from the looked-up rows `e`: each row keeps its length."""
        wide = _wide(e)
        q = self.q.ready(wide)[0]
        inside = _of(self.used, context, wide) * (wide @ q)
        inside_after = _of(self.remaining, context, wide) * inside
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


def _of(table: PerRowTensor, context: ForwardContext, like: Tensor) -> Tensor:
    """The entry of a table for each text, or for each token if packed."""
    return context.of_rows(table.ready(like))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
