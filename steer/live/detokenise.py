"""Token ids to text while a reply is being written, each token decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_CONTEXT = 8
"""Tokens of the prompt that the decoder sees first, as some tokenizers drop the space before a text's first word."""


class Detokeniser:
    """The text of one reply as its tokens come: whole characters only, special tokens left out.

    The tokenizers library's incremental decoder, which keeps as much as it needs of what came before, so that the time
    a token takes does not grow with the reply.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """`tokenizer`: transformers' own, with a fast backend. `prompt`: the tokens before the reply."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._seen = list(prompt[-_CONTEXT:])
        self._open: list[int] = []
        """Tokens that are no whole character yet."""
        self._begin()

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        self._open.append(token)
        text = self._step(token)
        if text is None:
            return ""
        self._close()
        return text

    def end(self) -> str:
        """The rest of the text: a character that was never completed shows as U+FFFD."""
        text = self._tokenizer.decode(self._open, skip_special_tokens=True)
        self._close()
        return text

    def _step(self, token: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception as e:
            # With byte fallback, bytes that are no UTF-8 change how those before them read; the library then gives up.
            if "prefix" not in str(e):
                raise
            text = self._tokenizer.decode(self._open, skip_special_tokens=True)
            self._close()
            self._begin()
            return text

    def _close(self) -> None:
        self._seen = [*self._seen, *self._open][-_CONTEXT:]
        self._open = []

    def _begin(self) -> None:
        """A stream that has seen the last tokens."""
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in self._seen:
            try:
                self._stream.step(self._tokenizer, token)
            except Exception:
                self._stream = DecodeStream(skip_special_tokens=True)
