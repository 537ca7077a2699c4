"""Keys and values: a cache that grows in place, and one that is kept between the replies of a chat.

`growing_cache` is the cache of every generation. `branched` makes one from the rows of another, for `prefill.py`.
A chat session passes a `PrefixCache` to `decode` as `memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from steer.model.tokens import common_length

STEP = 64
"""For how many more tokens a buffer is made at a time, where nobody says how many will follow."""
Piece = tuple[list[int], int, slice]
"""(rows of a new cache, the row of an old cache that they begin with, the columns of that row)"""


class GrowingLayer(DynamicLayer):
    """One block's keys and values: views of larger buffers, which are copied once every `ahead` tokens.

    Each copy leaves a hole that the next, larger buffer does not fit: with 64 tokens at a time and replies of 96, twice
    the memory of the keys and values themselves. A caller that knows how many tokens will follow passes `ahead`.
    """

    def __init__(self, ahead: int = STEP) -> None:
        super().__init__()
        self.ahead = ahead
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
        new = key_states.shape[-2]
        for name, states in (("keys", key_states), ("values", value_states)):
            held = self._room(name, states, new)
            held[:, :, held.shape[-2] - new :] = states
            setattr(self, name, held)
        return self._held()

    @torch.inference_mode()  # its tensors were made in inference mode, and may be changed in it only
    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order. Where few rows move, they are copied over the rows that leave; else all are
        copied into new buffers."""
        if not self.get_seq_length():
            return
        rows, keys, values = indices.tolist(), *self._held()
        moved = {to: row for to, row in enumerate(rows) if to != row}
        if any(row < len(rows) for row in moved.values()):
            for name, held in (("keys", keys), ("values", values)):
                room = self._new_room(name, held, len(rows), held.shape[-2])
                setattr(self, name, room[:, :, : held.shape[-2]].copy_(held[indices]))
            return
        for to, row in moved.items():
            keys[to], values[to] = keys[row], values[row]
        self.keys, self.values = keys[: len(rows)], values[: len(rows)]

    def begin(self, other: GrowingLayer, pieces: Sequence[Piece], rows: int, columns: int) -> None:
        """Begin with `columns` tokens per row that are copied from another cache.

        A row with fewer has its tokens at the right end, and zeros before them.
        """
        self.lazy_initialization(*other._held())
        for name, held in zip(("keys", "values"), other._held(), strict=True):
            room = self._new_room(name, held, rows, columns)
            begins = dict.fromkeys(range(rows), columns)
            for to, row, taken in pieces:
                first = columns - (taken.stop - taken.start)
                room[to, :, first:columns] = held[row, :, taken]
                begins |= dict.fromkeys(to, first)
            # Masked columns have a weight of zero, but zero times NaN or infinity in unset memory is not zero.
            for i, first in begins.items():
                room[i, :, :first] = 0
            setattr(self, name, room[:, :, :columns])

    def extend(self) -> tuple[Float[Tensor, "batch groups room d"], Float[Tensor, "batch groups room d"]]:
        """Count one more token, whose keys and values the caller writes into the buffers that are returned."""
        keys, values = self._held()
        self.keys, self.values = self._room("keys", keys, 1), self._room("values", values, 1)
        return self._rooms["keys"][: len(keys)], self._rooms["values"][: len(values)]

    def _held(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.keys, Tensor)
        assert isinstance(self.values, Tensor)
        return self.keys, self.values

    def _room(self, name: str, like: Tensor, more: int) -> Tensor:
        """The keys or values with room for `more` tokens after them, which the caller writes."""
        held, room = getattr(self, name), self._rooms.get(name)
        seq = held.shape[-2] if held.numel() else 0
        rows, total = like.shape[0], seq + more
        # Rows may have been selected, or the cache cropped: then `held` is no longer the start of the buffer. A buffer
        # is never quite full, since compiled code would treat a full one as another case.
        in_room = room is not None and room.data_ptr() == held.data_ptr()
        if room is None or not in_room or room.shape[0] < rows or room.shape[-2] <= total:
            room = self._new_room(name, like, rows, total)
            if seq:
                room[:, :, :seq] = held
        return room[:rows, :, :total]

    def _new_room(self, name: str, like: Tensor, rows: int, tokens: int) -> Tensor:
        """A new buffer for the keys or values, with room for `ahead` more tokens."""
        self._rooms[name] = like.new_empty(rows, like.shape[1], tokens + self.ahead, like.shape[-1])
        return self._rooms[name]


class GrowingCache(DynamicCache):
    """The keys and values of one generation."""

    stretched = False
    """Whether the keys were rotated for a text that is longer than `Anatomy.rotary_limit`."""


def growing_cache(config: PretrainedConfig, ahead: int = STEP) -> GrowingCache:
    """An empty cache for one generation, with room for `ahead` more tokens than were read. Layers other than plain full
    attention are those of transformers."""
    cache = GrowingCache(config=config)
    cache.layers = [GrowingLayer(ahead) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def branched(cache: Cache, pieces: Sequence[Piece], rows: int, columns: int, ahead: int) -> GrowingCache:
    """A cache of `rows` texts that begin with tokens of another cache, with room for `ahead` more; see
    `GrowingLayer.begin`."""
    new = GrowingCache()
    new.layers = []
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        branch = GrowingLayer(ahead)
        branch.begin(layer, pieces, rows, columns)
        new.layers.append(branch)
    return new


def has_states(cache: Cache) -> bool:
    """Whether some blocks keep a state of all tokens, as linear attention does, in place of keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def has_only_states(cache: Cache) -> bool:
    """Whether no block keeps keys and values."""
    return not any(isinstance(layer, DynamicLayer) for layer in cache.layers)


def select_rows(cache: Cache, rows: Int[Tensor, " rows"], ahead: int | None = None) -> None:
    """Keep these rows of a cache, in this order. `ahead`: how many more tokens will follow, if that was not known when
    the cache was made."""
    for layer in cache.layers:
        if ahead is not None and isinstance(layer, GrowingLayer):
            layer.ahead = ahead
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                states |= {i: state.index_select(0, rows) for i, state in states.items() if state is not None}
        if isinstance(layer, DynamicLayer):
            layer.batch_select_indices(rows)


class PrefixCache:
    """The keys and values of a conversation, kept between its replies so that only new messages are read.

        memory = PrefixCache()
        for piece in model.stream(chat, memory=memory):
            print(piece, end="")

    They stay as they were made, under the sliders of that moment: a slider that moves acts on later tokens only. After
    `forget` everything is read again under the current sliders, even in the middle of a reply.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        """The tokens that the cache holds."""
        self.read = 0
        """How many tokens of prompt and reply have gone through the model since the last reply began."""
        self._cache: GrowingCache | None = None

    def forget(self) -> None:
        """Drop everything, so that the whole chat is read again before the next token."""
        self.ids, self._cache = [], None

    def recall(self, text: Sequence[int], config: PretrainedConfig) -> tuple[GrowingCache, list[int]]:
        """The cache, cut to the beginning that it shares with `text`, and the tokens still to be read, at least one."""
        same, cache = min(common_length(self.ids, text), len(text) - 1), self._cache
        if cache is None or not same or not _cut(cache, len(self.ids), same):
            cache, same = growing_cache(config), 0
        self._cache, self.ids = cache, list(text[:same])
        return cache, list(text[same:])

    def holds(self, cache: Cache) -> bool:
        """Whether `cache` is still the one in use; not after `forget`."""
        return self._cache is cache

    def add(self, tokens: Sequence[int]) -> None:
        """Note that the model has read these tokens too."""
        self.ids += tokens
        self.read += len(tokens)


def _cut(cache: Cache, length: int, to: int) -> bool:
    """Cut a cache of `length` tokens to its first `to` tokens.

    False where that cannot be done, or where the cache does not hold `length` tokens in every block: a pass that was
    interrupted leaves its tokens in some blocks only.
    """
    layers: list[Any] = cache.layers
    if has_states(cache):  # they hold all tokens at once, also those of a pass that was interrupted
        return False
    if any(int(layer.get_seq_length()) != length for layer in layers):
        return False
    if to == length:
        return True
    windows = (layer for layer, slides in zip(layers, cache.is_sliding, strict=True) if slides)
    # A sliding window that is full has dropped tokens.
    if not cache.is_croppable or any(length >= layer.sliding_window for layer in windows):
        return False
    cache.crop(to - length)
    return True
