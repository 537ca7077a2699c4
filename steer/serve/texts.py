"""From tokens to text that can be sent: whole characters, no part of a stop string, each token with its text's place.

`steer.serve.writing` feeds it the engine's tokens; chats in this process (`steer.chat`) use it as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from steer.model.tokens import Detokeniser
from steer.serve.engine import Token

_BYTES = {c: b for b, c in bytes_to_unicode().items()}
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TokenText:
    """A written token and its place in the reply's text."""

    token: Token
    start: int
    """Place of the token's first character, in characters from the start of the reply. For a token inside a character,
    the place of that character."""


@dataclass(frozen=True)
class Piece:
    """Text that is final, and the tokens that begin in it."""

    text: str
    tokens: tuple[TokenText, ...] = ()


class ReplyText:
    """The text of one reply, built token by token.

    A piece never ends within a character. Text that may be the beginning of a stop string is held back until that is
    decided. The reply ends before the first complete stop string, so no piece contains any part of one.

        text = ReplyText(tokenizer, prompt, stop=["\\n\\n"])
        for token in tokens:
            print(text.add(token).text, end="")
        print(text.end().text)
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`tokenizer`: a transformers tokenizer with a fast backend. `prompt`: the token ids before the reply."""
        self._decoder = Detokeniser(tokenizer, prompt)
        self._stop = tuple(stop)
        self._held = ""
        self._sent = 0
        self._tokens: list[TokenText] = []
        self.stopped = False
        """Whether a stop string has ended the reply; later tokens are ignored."""

    def add(self, token: Token) -> Piece:
        """Add a token and return the text that can be sent now. An end token adds nothing."""
        if self.stopped or token.end:
            return Piece("")
        self._tokens.append(TokenText(token, self._sent + len(self._held)))
        return self._take(self._decoder.add(token.id), last=False)

    def end(self) -> Piece:
        """Return the text that was held back; no more tokens follow."""
        return Piece("") if self.stopped else self._take(self._decoder.end(), last=True)

    def _take(self, text: str, last: bool) -> Piece:
        self._held += text
        cut = find_stop(self._held, self._stop)
        self.stopped = cut is not None
        if cut is None:
            cut = len(self._held) if last else len(self._held) - begun(self._held, self._stop)
        out, self._held = self._held[:cut], "" if self.stopped else self._held[cut:]
        self._sent += len(out)
        # A token that only begins a character is reported together with that character.
        ready = [t for t in self._tokens if t.start < self._sent or (last and not self.stopped)]
        self._tokens = self._tokens[len(ready) :]
        return Piece(out, tuple(ready))


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string in a text begins; None if there is none."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found, default=None)


def begun(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of a token's text, which may be part of a character.

    An id without a token, as an embedding larger than the vocabulary has, gives no bytes.
    """
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if token in tokenizer.all_special_ids:
        return piece.encode()
    if _BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    # Byte-level vocabularies write each byte as one of 256 printable characters; other vocabularies hold plain text.
    if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) and all(c in _BYTES for c in piece):
        return bytes(_BYTES[c] for c in piece)
    return piece.replace("\u2581", " ").encode()
