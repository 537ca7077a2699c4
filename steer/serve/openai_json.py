"""Replies as JSON in OpenAI's format, whole or as chunks of a stream.

Input are the `Update`s of `steer.serve.writing`; `steer.serve.replies` sends the output.
"""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from steer.serve.engine import Token
from steer.serve.prompts import Prompt
from steer.serve.texts import Piece, TokenText, token_bytes
from steer.serve.writing import Update

Json = dict[str, Any]
_NEVER = -9999.0
"""The logprob that OpenAI reports for a token of probability 0."""


def usage(prompts: Sequence[Prompt], written: int) -> Json:
    """Return the `usage` object. Each prompt counts once, however many choices it has; `written`: reply tokens."""
    read = sum(len(p.ids) for p in prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Shape(ABC):
    """Common fields of one OpenAI response. Subclasses fill in each choice."""

    whole_object: str
    chunk_object: str
    prefix: str

    def __init__(self, model: str, tokenizer: Any, choices: Sequence[Prompt], logprobs: bool) -> None:
        """`choices`: the prompt of each choice. `logprobs`: whether choices report them."""
        self._tokenizer, self._choices, self._logprobs = tokenizer, choices, logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Sequence[Update]], more: Json) -> Json:
        """Return a whole reply, from all updates of every choice; `more` is merged into the top level."""
        made = []
        for index, updates in enumerate(choices):
            piece = Piece("".join(u.piece.text for u in updates), tuple(t for u in updates for t in u.piece.tokens))
            made.append({"index": index, **self._whole(index, piece), "finish_reason": updates[-1].reason})
        return {**self._head, "object": self.whole_object, "choices": made, **more}

    def chunk(self, update: Update | None = None, more: Json | None = None) -> Json:
        """Return a chunk of a streamed reply; without an update its list of choices is empty."""
        made = []
        if update is not None:
            made.append(
                {"index": update.choice, **self._delta(update.choice, update.piece), "finish_reason": update.reason}
            )
        return {**self._head, "object": self.chunk_object, "choices": made, **(more or {})}

    def opening(self) -> list[Json]:
        """Return the chunks to send before any token: the role of a chat's reply, or the echoed prompt."""
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

    def _token_text(self, token: int) -> tuple[str, bytes]:
        raw = token_bytes(self._tokenizer, token)
        return raw.decode("utf-8", "replace"), raw


class ChatShape(Shape):
    """Responses of /v1/chat/completions."""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _whole(self, index: int, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, "logprobs": self._logprob_fields(piece.tokens)}

    def _delta(self, index: int, piece: Piece) -> Json:
        return {"delta": {"content": piece.text} if piece.text else {}, "logprobs": self._logprob_fields(piece.tokens)}

    def _opening(self, index: int) -> Json:
        return {"delta": {"role": "assistant", "content": ""}}

    def _logprob_fields(self, tokens: Sequence[TokenText]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._token_json(t.token.id, t.token.logprob),
                "top_logprobs": [self._token_json(i, p) for i, p in t.token.top],
            }
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token_json(self, token: int, logprob: float | None) -> Json:
        text, raw = self._token_text(token)
        return {"token": text, "logprob": _finite_logprob(logprob), "bytes": list(raw)}


class CompletionShape(Shape):
    """Responses of /v1/completions. An echoed prompt precedes each text, and text offsets count from its beginning."""

    whole_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def _whole(self, index: int, piece: Piece) -> Json:
        return {"text": self._choices[index].echo + piece.text, "logprobs": self._logprob_fields(index, piece.tokens)}

    def _delta(self, index: int, piece: Piece) -> Json:
        return {"text": piece.text, "logprobs": self._logprob_fields(index, piece.tokens)}

    def _opening(self, index: int) -> Json:
        echo = self._choices[index].echo
        return {"text": echo} if echo else {}

    def _logprob_fields(self, index: int, tokens: Sequence[TokenText]) -> Json | None:
        if not self._logprobs:
            return None
        begin = len(self._choices[index].echo)
        return {
            "tokens": [self._token_text(t.token.id)[0] for t in tokens],
            "token_logprobs": [_finite_logprob(t.token.logprob) for t in tokens],
            "top_logprobs": [self._top(t.token) for t in tokens],
            "text_offset": [begin + t.start for t in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """Return text -> logprob of the likeliest tokens and the written one.

        If two tokens have the same text, the likelier one counts.
        """
        out: dict[str, float] = {}
        for i, p in (*token.top, (token.id, token.logprob)):
            out.setdefault(self._token_text(i)[0], _finite_logprob(p))
        return out


def _finite_logprob(logprob: float | None) -> float:
    """Return a logprob as JSON can hold it: minus infinity becomes -9999, as in OpenAI's replies."""
    return logprob if logprob is not None and math.isfinite(logprob) else _NEVER
