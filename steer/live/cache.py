"""A KV cache that grows in place. transformers' own copies all of itself at every token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

STEP = 64
"""Tokens of room made at a time."""


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

    def _appended(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        seq = held.shape[-2] if held is not None and held.numel() else 0
        total = seq + new.shape[-2]
        room = self._rooms.get(name)
        # Rows may have been selected, or the cache cropped: then `held` is no longer the start of the buffer.
        ours = room is not None and held is not None and room.data_ptr() == held.data_ptr()
        if not ours or room is None or room.shape[0] != new.shape[0] or room.shape[-2] < total:
            room = new.new_empty(*new.shape[:2], total + STEP, new.shape[-1])
            if held is not None and seq:
                room[:, :, :seq] = held
            self._rooms[name] = room
        room[:, :, seq:total] = new
        return room[:, :, :total]


def growing_cache(config: PretrainedConfig) -> Cache:
    """A cache for one generation; layers of another kind than plain full attention stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
