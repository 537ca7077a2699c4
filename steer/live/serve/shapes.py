"""Replies as OpenAI's clients read them, whole and in chunks."""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from steer.live.serve.engine import Token
from steer.live.serve.prompts import Prompt
from steer.live.serve.texts import Piece, TokenText, token_bytes
from steer.live.serve.writing import Update

Json = dict[str, Any]
_NEVER = -9999.0


def usage(prompts: Sequence[Prompt], written: int) -> Json:
    """Tokens of the prompts, each counted once however many choices it has, and of the choices."""
    read = sum(len(p.ids) for p in prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Shape(ABC):
    """One reply's envelope; what a choice holds is told by the kinds below."""

    whole_object: str
    chunk_object: str
    prefix: str

    def __init__(self, model: str, tokenizer: Any, choices: Sequence[Prompt], logprobs: bool) -> None:
        """`choices`: what each of them goes on from."""
        self._tokenizer, self._choices, self._logprobs = tokenizer, choices, logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Sequence[Update]], more: Json) -> Json:
        """A reply in one, from all updates of every choice; `more` stands beside them."""
        made = []
        for index, updates in enumerate(choices):
            piece = Piece("".join(u.piece.text for u in updates), tuple(t for u in updates for t in u.piece.tokens))
            made.append({"index": index, **self._whole(index, piece), "finish_reason": updates[-1].reason})
        return {**self._head, "object": self.whole_object, "choices": made, **more}

    def chunk(self, update: Update | None = None, more: Json | None = None) -> Json:
        """A part of a reply in a stream; without an update it has no choices."""
        made = []
        if update is not None:
            made.append(
                {"index": update.choice, **self._delta(update.choice, update.piece), "finish_reason": update.reason}
            )
        return {**self._head, "object": self.chunk_object, "choices": made, **(more or {})}

    def opening(self) -> list[Json]:
        """Chunks that come before any token."""
        made = ((i, self._opening(i)) for i in range(len(self._choices)))
        return [
            self.chunk() | {"choices": [{"index": i, **first, "logprobs": None, "finish_reason": None}]}
            for i, first in made
            if first
        ]

    @abstractmethod
    def _whole(self, index: int, piece: Piece) -> Json: ...

    @abstractmethod
    def _delta(self, index: int, piece: Piece) -> Json: ...

    @abstractmethod
    def _opening(self, index: int) -> Json: ...

    def _spelt(self, token: int) -> tuple[str, bytes]:
        raw = token_bytes(self._tokenizer, token)
        return raw.decode("utf-8", "replace"), raw


class ChatShape(Shape):
    """/v1/chat/completions"""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _whole(self, index: int, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, "logprobs": self._told(piece.tokens)}

    def _delta(self, index: int, piece: Piece) -> Json:
        return {"delta": {"content": piece.text} if piece.text else {}, "logprobs": self._told(piece.tokens)}

    def _opening(self, index: int) -> Json:
        return {"delta": {"role": "assistant", "content": ""}}

    def _told(self, tokens: Sequence[TokenText]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {**self._one(t.token.id, t.token.logprob), "top_logprobs": [self._one(i, p) for i, p in t.token.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> Json:
        text, raw = self._spelt(token)
        return {"token": text, "logprob": _told(logprob), "bytes": list(raw)}


class CompletionShape(Shape):
    """/v1/completions. What is echoed stands before each text, and its offsets count from there."""

    whole_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def _whole(self, index: int, piece: Piece) -> Json:
        return {"text": self._choices[index].echo + piece.text, "logprobs": self._told(index, piece.tokens)}

    def _delta(self, index: int, piece: Piece) -> Json:
        return {"text": piece.text, "logprobs": self._told(index, piece.tokens)}

    def _opening(self, index: int) -> Json:
        echo = self._choices[index].echo
        return {"text": echo} if echo else {}

    def _told(self, index: int, tokens: Sequence[TokenText]) -> Json | None:
        if not self._logprobs:
            return None
        begin = len(self._choices[index].echo)
        return {
            "tokens": [self._spelt(t.token.id)[0] for t in tokens],
            "token_logprobs": [_told(t.token.logprob) for t in tokens],
            "top_logprobs": [self._top(t.token) for t in tokens],
            "text_offset": [begin + t.start for t in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """By their texts, the token that was written among them; the likelier of two that read the same."""
        out: dict[str, float] = {}
        for i, p in (*token.top, (token.id, token.logprob)):
            out.setdefault(self._spelt(i)[0], _told(p))
        return out


def _told(logprob: float | None) -> float:
    """JSON has no infinities: what cannot be is told as OpenAI does."""
    return logprob if logprob is not None and math.isfinite(logprob) else _NEVER
