"""A KV cache that grows in place. transformers' own copies all of itself at every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

STEP = 64
"""Tokens of room made at a time."""
Piece = tuple[list[int], int, slice]
"""(rows of a new cache, the row of an old one that they begin with, its columns)"""


class GrowingLayer(DynamicLayer):
    """One block's keys and values: views of larger buffers that are copied once in `STEP` tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def update(
        self,
        key_states: Float[Tensor, "batch groups new d"],
        value_states: Float[Tensor, "batch groups new d"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "batch groups seq d"], Float[Tensor, "batch groups seq d"]]:
        """Append the new keys and values and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    @torch.inference_mode()  # its tensors are of passes in it, and change nowhere else
    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order. Rows that leave are overwritten by others where that moves few of them."""
        rows = indices.tolist()
        moved = {to: row for to, row in enumerate(rows) if to != row}
        if not self.get_seq_length() or any(row < len(rows) for row in moved.values()):
            super().batch_select_indices(indices)
            return
        (_, keys), (_, values) = self._held()
        for to, row in moved.items():
            keys[to], values[to] = keys[row], values[row]
        self.keys, self.values = keys[: len(rows)], values[: len(rows)]

    def begin(self, other: GrowingLayer, pieces: Sequence[Piece], rows: int, columns: int) -> None:
        """Begin with `columns` tokens that another cache holds, each row's at its right end; zeros before them."""
        (_, keys), (_, values) = other._held()
        self.lazy_initialization(keys, values)
        for name, held in (("keys", keys), ("values", values)):
            room = held.new_empty(rows, held.shape[1], columns + STEP, held.shape[-1])
            # Masked columns have no weight, but nothing times zero is not always zero.
            room[:, :, :columns] = 0
            for to, row, taken in pieces:
                room[to, :, columns - (taken.stop - taken.start) : columns] = held[row, :, taken]
            self._rooms[name] = room
        self.keys, self.values = (self._rooms[name][:, :, :columns] for name in ("keys", "values"))

    def extend(self) -> tuple[Float[Tensor, "batch groups room d"], Float[Tensor, "batch groups room d"]]:
        """Count one more token, whose keys and values the caller writes into the buffers that are returned."""
        self.keys, self.values = (self._room(name, held, held, 1) for name, held in self._held())
        return self._rooms["keys"][: len(self.keys)], self._rooms["values"][: len(self.values)]

    def _held(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        assert isinstance(self.keys, Tensor)
        assert isinstance(self.values, Tensor)
        return ("keys", self.keys), ("values", self.values)

    def _appended(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        out = self._room(name, held, new, new.shape[-2])
        out[:, :, out.shape[-2] - new.shape[-2] :] = new
        return out

    def _room(self, name: str, held: Tensor | None, like: Tensor, more: int) -> Tensor:
        """`held` with `more` tokens after it that are yet to be written."""
        seq = held.shape[-2] if held is not None and held.numel() else 0
        rows, total = like.shape[0], seq + more
        room = self._rooms.get(name)
        # Rows may have been selected, or the cache cropped: then `held` is no longer the start of the buffer. A buffer
        # is never quite full, which compiled code would take for another case.
        ours = room is not None and held is not None and room.data_ptr() == held.data_ptr()
        if not ours or room is None or room.shape[0] < rows or room.shape[-2] <= total:
            room = like.new_empty(*like.shape[:2], total + STEP, like.shape[-1])
            if held is not None and seq:
                room[:, :, :seq] = held
            self._rooms[name] = room
        return room[:rows, :, :total]


def growing_cache(config: PretrainedConfig) -> Cache:
    """A cache for one generation; layers of another kind than plain full attention stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def branched(cache: Cache, pieces: Sequence[Piece], rows: int, columns: int) -> Cache:
    """A cache of `rows` texts that begin with what some rows of another one hold; see `GrowingLayer.begin`."""
    new = DynamicCache()
    new.layers = []
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        mine = GrowingLayer()
        mine.begin(layer, pieces, rows, columns)
        new.layers.append(mine)
    return new
