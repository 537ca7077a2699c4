"""Hooks that apply an Edit to the running model: shifts after blocks, ablation at every writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.values.edit import Edit
from steer.weights.anatomy import Anatomy

Rows = tuple[Edit | None, ...]
"""One entry: the same edit for every row of the batch. Several: one a row, None for an untouched row."""
NEUTRAL: Rows = (None,)


class Steering:
    """Owns every hook on one model. With neutral rows there is none.

    Per site it keeps a shift `[rows, 1, d]`, per writer a strength `[rows, 1, 1]`, and one basis
    `Q [rows, d, k]`, zero-padded where rows ablate fewer directions. Hooks read these tensors at every
    call, so a changed amount costs no registration.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.lock = threading.RLock()
        """Held by the decode loop during a forward: a change waits for the token being made."""
        self.rows: Rows = NEUTRAL
        """What is applied now: the rows of the innermost `applied`, else those of `set`."""
        self._base: Rows = NEUTRAL
        self._over: Rows | None = None
        self._selected: list[int] | None = None
        self._basis: Tensor | None = None
        self._shifts: dict[str, Tensor] = {}
        self._strengths: dict[str, Tensor] = {}
        self._active: dict[tuple[str, object], Tensor] = {}
        self._handles: dict[str, RemovableHandle] = {}

    def set(self, rows: Sequence[Edit | None]) -> None:
        """Replace what is applied, felt by the next forward pass, or by the first one after `applied` ends.

        Errors: MismatchError for a direction of another width, UsageError for a site the model lacks.
        """
        rows = self._checked(rows)
        with self.lock:
            self._base = rows
            if self._over is None:
                self._use(rows)

    def select(self, keep: Sequence[int] | None) -> None:
        """Apply rows `keep` only, in that order: what is left of a batch whose other rows have ended."""
        with self.lock:
            self._selected = None if keep is None or len(self.rows) == 1 else list(keep)
            self._active.clear()

    @contextmanager
    def applied(self, rows: Sequence[Edit | None]) -> Iterator[None]:
        """Apply `rows` inside the block; what was applied before comes back, exceptions included.

        What `set` is told inside the block is not lost: it holds once the block ends.
        """
        rows = self._checked(rows)
        with self.lock:
            before, self._over = self._over, rows
            self._use(rows)
        try:
            yield
        finally:
            with self.lock:
                self._over = before
                self._use(self._base if before is None else before)

    def check(self, edit: Edit) -> None:
        """Raise unless the edit fits this model."""
        self.anatomy.check_edit(edit)

    @property
    def hook_count(self) -> int:
        """How many hooks are on the model."""
        return len(self._handles)

    def _checked(self, rows: Sequence[Edit | None]) -> Rows:
        for edit in rows:
            if edit is not None:
                self.check(edit)
        return tuple(rows) or NEUTRAL

    def _use(self, rows: Rows) -> None:
        self.rows, self._selected = rows, None
        self._compile()
        self._sync_hooks()

    def _compile(self) -> None:
        rows, a = self.rows, self.anatomy
        self._active.clear()
        self._shifts, self._strengths, self._basis = {}, {}, None
        bases = [e.basis() if e is not None and e.ablate else None for e in rows]
        rank = max((q.shape[1] for q in bases if q is not None), default=0)
        if rank:
            self._basis = torch.zeros(len(rows), a.width, rank, dtype=torch.float64)
            for i, q in enumerate(bases):
                if q is not None:
                    self._basis[i, :, : q.shape[1]] = q
        for i, edit in enumerate(rows):
            if edit is None:
                continue
            for site, shift in edit.biases().items():
                if bool(shift.any()):
                    at = self._shifts.setdefault(
                        a.block_module(site), torch.zeros(len(rows), 1, a.width, dtype=torch.float64)
                    )
                    at[i, 0] = shift
            writers = [a.embedding_module] if edit.embedding else []
            for block in range(a.blocks):
                if edit.edits_block(block):
                    writers += list(a.writer_modules(block))
            for name in writers:
                at = self._strengths.setdefault(name, torch.zeros(len(rows), 1, 1, dtype=torch.float64))
                at[i] = edit.strength

    def _sync_hooks(self) -> None:
        wanted = set(self._shifts) | set(self._strengths)
        for name in set(self._handles) - wanted:
            self._handles.pop(name).remove()
        for name in wanted - set(self._handles):
            module = self.model.get_submodule(name)
            # First in line, so that a hook that reads the module sees it steered, whichever came earlier.
            self._handles[name] = module.register_forward_hook(self._hook(name), prepend=True)

    def _hook(self, name: str) -> Any:
        def apply(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            if name in self._strengths and self._basis is not None:
                wide = torch.promote_types(h.dtype, torch.float32)
                q = self._ready(("basis", wide), self._basis, h, wide)
                s = self._ready((name + "*", wide), self._strengths[name], h, wide)
                y = h.to(wide)
                h = (y - s * ((y @ q) @ q.transpose(1, 2))).to(h.dtype)
            if name in self._shifts:
                h = h + self._ready((name + "+", h.dtype), self._shifts[name], h, h.dtype)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return apply

    def _ready(self, key: tuple[str, object], tensor: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The selected rows of `tensor` on the device and in the dtype wanted, made once."""
        key = (f"{key[0]}@{h.device}", key[1])
        if key not in self._active:
            rows = tensor if self._selected is None else tensor[self._selected]
            self._active[key] = rows.to(h.device, dtype)
        return self._active[key]
