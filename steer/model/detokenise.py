"""Turns token ids into text while a reply is being written, decoding each token once.

`SteeredModel.stream` and the server use it to send a reply in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_CONTEXT = 8
"""How many tokens of the prompt are decoded first: some tokenizers drop the space before the first word of a text."""


class Detokeniser:
    """The text of one reply, as its tokens come: whole characters only, without special tokens.

        text = Detokeniser(tokenizer, prompt_ids)
        pieces = [text.add(token) for token in reply_ids] + [text.end()]

    It uses the incremental decoder of the tokenizers library, which keeps only as many earlier tokens as it needs, so
    that the time per token does not grow with the reply.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """`tokenizer`: one of transformers, with a fast backend. `prompt`: the tokens before the reply."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._seen = list(prompt[-_CONTEXT:])
        self._open: list[int] = []
        """Tokens that do not make a whole character yet."""
        self._begin()

    def add(self, token: int) -> str:
        """The text that this token completes; empty while bytes of a character are missing."""
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
            # With byte fallback, bytes that are not UTF-8 change how earlier bytes are decoded; the library then fails.
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
        """Start a new stream and feed it the last tokens."""
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in self._seen:
            try:
                self._stream.step(self._tokenizer, token)
            except Exception:
                self._stream = DecodeStream(skip_special_tokens=True)
