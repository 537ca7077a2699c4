"""From tokens to text that can be sent: whole characters, no part of a stop string, logprobs beside their text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from steer.live.detokenise import Detokeniser
from steer.live.serve.engine import Token

_BYTES = {c: b for b, c in bytes_to_unicode().items()}
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TokenText:
    """A token that was written, by its place in the reply's text."""

    token: Token
    start: int
    """In characters from the start of the reply; where the characters it begins or goes on with will stand."""


@dataclass(frozen=True)
class Piece:
    """Text that nothing can take back, and the tokens that begin in it."""

    text: str
    tokens: tuple[TokenText, ...] = ()


class ReplyText:
    """The text of one reply as its tokens come.

    A piece never ends within a character. What may yet become a stop string is held back until it is one, or is not;
    the text ends before the first stop string that is complete, so no part of one is ever in a piece.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`tokenizer`: transformers' own, with a fast backend."""
        self._decoder = Detokeniser(tokenizer, prompt)
        self._stop = tuple(stop)
        self._held = ""
        self._sent = 0
        self._tokens: list[TokenText] = []
        self.stopped = False
        """Whether a stop string has ended it. Nothing is added from then on."""

    def add(self, token: Token) -> Piece:
        """What can be sent once this token is written. An end token adds nothing."""
        if self.stopped or token.end:
            return Piece("")
        self._tokens.append(TokenText(token, self._sent + len(self._held)))
        return self._take(self._decoder.add(token.id), last=False)

    def end(self) -> Piece:
        """What was held back, as no more tokens come."""
        return Piece("") if self.stopped else self._take(self._decoder.end(), last=True)

    def _take(self, text: str, last: bool) -> Piece:
        self._held += text
        cut = find_stop(self._held, self._stop)
        self.stopped = cut is not None
        if cut is None:
            cut = len(self._held) if last else len(self._held) - begun(self._held, self._stop)
        out, self._held = self._held[:cut], "" if self.stopped else self._held[cut:]
        self._sent += len(out)
        # A token without text of its own yet goes with the character that it begins.
        ready = [t for t in self._tokens if t.start < self._sent or (last and not self.stopped)]
        self._tokens = self._tokens[len(ready) :]
        return Piece(out, tuple(ready))


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins; None without one."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found, default=None)


def begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for, which need not be whole characters; none where the id is no token's, as in
    an embedding that is larger than the vocabulary."""
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if token in tokenizer.all_special_ids:
        return piece.encode()
    if _BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    # Byte-level vocabularies are spelt in an alphabet of 256 printable characters, the others in text itself.
    if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) and all(c in _BYTES for c in piece):
        return bytes(_BYTES[c] for c in piece)
    return piece.replace("\u2581", " ").encode()
