"""The KV cache of one conversation, kept from reply to reply, and honest about what it was made under."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers.cache_utils import Cache, StaticCache


class Memory:
    """What the model has read of a conversation.

    Keys and values are kept as they were made, under the sliders of that moment: a slider that moves acts from here
    on. `forget` has everything read again under the sliders of now, in the midst of a reply too.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        """The tokens that the cache holds."""
        self.read = 0
        """Tokens that went through the model since the last reply began, the prompt's and the reply's."""
        self._cache: Cache | None = None

    def forget(self) -> None:
        """Have the whole chat read again before the next token."""
        self.ids, self._cache = [], None

    def recall(self, text: Sequence[int], make: Callable[[], Cache]) -> tuple[Cache, list[int]]:
        """The cache, cut to what it has in common with `text`, and the tokens that are yet to be read; one at least.
        `make` makes an empty one."""
        same = 0
        while same < min(len(self.ids), len(text) - 1) and self.ids[same] == text[same]:
            same += 1
        cut = same < len(self.ids)
        if self._cache is None or not same or (cut and isinstance(self._cache, StaticCache)):
            self._cache, same = make(), 0
        elif cut:
            self._cache.crop(same)
        self.ids = list(text[:same])
        return self._cache, list(text[same:])

    def holds(self, cache: Cache) -> bool:
        """Whether this is still its cache."""
        return self._cache is cache

    def add(self, tokens: Sequence[int]) -> None:
        """The model has read these as well."""
        self.ids += tokens
        self.read += len(tokens)
