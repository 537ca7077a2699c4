"""Hooks that apply an Edit to the running model: shifts and moved features after blocks, ablation at every writer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.values.dictionary import Dictionary, EncoderRows
from steer.values.edit import Edit
from steer.values.feature import FeatureMove
from steer.values.fit import OUTLIER
from steer.weights.anatomy import Anatomy

Rows = tuple[Edit | None, ...]
"""One entry: the same edit for every row of the batch. Several: one a row, None for an untouched row."""
NEUTRAL: Rows = (None,)
_T = TypeVar("_T")


@dataclass(eq=False)
class _Moved:
    """The latents of one dictionary that some row moves by what it reads: `h += (alpha * a + beta) @ decoder`."""

    dictionary: Dictionary
    latents: dict[int, int]
    """Latent -> its column below."""
    alpha: Tensor
    """[rows, 1, latents]"""
    beta: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, moves: Sequence[Sequence[FeatureMove]]) -> _Moved:
        """`moves`: those of this dictionary, a row each."""
        latents = sorted({i for row in moves for m in row for i in m.feature.indices})
        column = {latent: j for j, latent in enumerate(latents)}
        alpha, beta = torch.zeros(2, len(moves), 1, len(latents), dtype=torch.float64)
        for r, row in enumerate(moves):
            for m in row:
                for latent, (a, b) in zip(m.feature.indices, m.coefficients, strict=True):
                    alpha[r, 0, column[latent]] += a
                    beta[r, 0, column[latent]] += b
        return cls(dictionary, column, alpha, beta)


class Steering:
    """Owns every hook on one model. With neutral rows there is none.

    Per site it keeps a shift `[rows, 1, d]` and the features moved there, per writer a strength `[rows, 1, 1]`,
    and one basis `Q [rows, d, k]`, zero-padded where rows ablate fewer directions. Hooks read these tensors at
    every call, so a changed amount costs no registration.

    A feature that is clamped, scaled or ablated is read from the stream as the block left it, before anything is
    added at this site, so that the order of the sliders does not matter; what the dictionary cannot reconstruct
    stays as it is. Tokens with a norm over ten times the dictionary's are none of its business and stay too.
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
        self._moved: dict[str, list[_Moved]] = {}
        self._active: dict[tuple[object, ...], Tensor] = {}
        self._encoders: dict[tuple[object, ...], EncoderRows] = {}
        self._wholes: dict[tuple[object, ...], Dictionary] = {}
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
            outer, selected = self.rows, self._selected
            self._use(rows)
        try:
            yield
        finally:
            with self.lock:
                self._over = before
                self._use(self._base if before is None else before)
                if self.rows is outer:  # a batch in the midst of being written goes on with the rows it has left
                    self._selected = selected

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
        self._shifts, self._strengths, self._basis, self._moved = {}, {}, None, {}
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
            for site, shift in edit.with_adds_as_directions().biases().items():
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
        self._compile_features()

    def _compile_features(self) -> None:
        moves = [[m for m in (e.features if e else ()) if m.reads and not m.neutral] for e in self.rows]
        # A dict, for its order.
        for d in {m.feature.dictionary: None for row in moves for m in row}:
            here = [[m for m in row if m.feature.dictionary is d] for row in moves]
            name = self.anatomy.block_module(next(m for row in here for m in row).feature.site)
            self._moved.setdefault(name, []).append(_Moved.of(d, here))

    def _sync_hooks(self) -> None:
        wanted = set(self._shifts) | set(self._strengths) | set(self._moved)
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
            delta = self._delta(name, h) if name in self._moved else None
            if name in self._shifts:
                wide = h.dtype if delta is None else delta.dtype
                shift = self._ready((name + "+", wide), self._shifts[name], h, wide)
                delta = shift if delta is None else delta + shift
            if delta is not None:
                h = (h.to(delta.dtype) + delta).to(h.dtype)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return apply

    def _delta(self, name: str, h: Tensor) -> Tensor:
        """What the features at a site add to the stream, fp32 at least."""
        wide = torch.promote_types(h.dtype, torch.float32)
        x, out = h.to(wide), None
        for moved in self._moved[name]:
            rows = self._encoder(moved, h.device, wide)
            alpha, beta = (
                self._ready((f"{name} {what}", moved, wide), tensor, h, wide)
                for what, tensor in (("alpha", moved.alpha), ("beta", moved.beta))
            )
            by = alpha * rows(x) + beta
            if moved.dictionary.norm is not None:
                by = by.masked_fill(x.norm(dim=-1, keepdim=True) > OUTLIER * moved.dictionary.norm, 0.0)
            more = by @ rows.decoder.to(wide)
            out = more if out is None else out + more
        assert out is not None
        return out

    def _encoder(self, moved: _Moved, device: torch.device, wide: torch.dtype) -> EncoderRows:
        """The rows of a dictionary that are moved, on the device and in the dtype wanted, made once.

        A topk dictionary goes there as a whole, since all latents compete.
        """
        d, latents = moved.dictionary, tuple(moved.latents)

        def copied() -> EncoderRows:
            if d.architecture != "topk":
                return d.rows(latents).to(device, wide)
            whole = _kept(self._wholes, (d, device, wide), lambda: d.to(device, wide), 2)
            return whole.rows(latents)

        return _kept(self._encoders, (d, latents, device, wide), copied, 16)

    def _ready(self, key: tuple[object, ...], tensor: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The selected rows of `tensor` on the device and in the dtype wanted, made once."""
        key = (*key, h.device)
        if key not in self._active:
            rows = tensor if self._selected is None else tensor[self._selected]
            self._active[key] = rows.to(h.device, dtype)
        return self._active[key]


def _kept(cache: dict[tuple[object, ...], _T], key: tuple[object, ...], make: Callable[[], _T], most: int) -> _T:
    """What the cache holds under `key`, made if need be. The oldest makes room: sessions that take turns on a model
    apply and withdraw their edits at every token, which must not copy anything anew."""
    if key not in cache:
        while len(cache) >= most:
            cache.pop(next(iter(cache)))
        cache[key] = make()
    return cache[key]
