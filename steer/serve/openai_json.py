"""Replies in OpenAI's format, whole or as chunks of a stream, as the types of OpenAI's client library.

Input are the `Update`s of `steer.serve.writing`; `steer.serve.replies` sends the output.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import starmap
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from steer.serve.engine import Token
from steer.serve.requests import Prompt
from steer.serve.writing import Piece, Reason, Update

Json = dict[str, Any]
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_NEVER = -9999.0
"""The logprob that OpenAI reports for a token of probability 0."""


def usage(prompts: Sequence[Prompt], written: int) -> CompletionUsage:
    """Return the `usage` object. Each prompt counts once, however many choices it has; `written`: reply tokens."""
    read = sum(len(p.ids) for p in prompts)
    return CompletionUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class ChatFormat:
    """Writes the responses of /v1/chat/completions. `more` holds further fields of one, such as `steering`."""

    prefix = "chatcmpl"

    def __init__(self, model: str, tokenizer: Any, choices: Sequence[Prompt], logprobs: bool) -> None:
        """`choices`: the prompt of each choice. `logprobs`: whether choices report them."""
        self._tokenizer, self.choices, self._with_logprobs = tokenizer, choices, logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Update], more: Json) -> str:
        """Return a whole reply; `choices`: the whole text of each."""
        messages = [
            {"role": "assistant", "content": u.piece.text, **_thoughts(u.piece), "refusal": None} for u in choices
        ]
        made = [self._choice(u, message=message) for u, message in zip(choices, messages, strict=True)]
        return self._response(ChatCompletion, "chat.completion", made, more)

    def chunk(self, update: Update | None, more: Json) -> str:
        """Return a chunk of a streamed reply; without an update its list of choices is empty."""
        made = []
        if update is not None:
            answer = {"content": update.piece.text} if update.piece.text else {}
            made.append(self._choice(update, delta=_thoughts(update.piece) | answer))
        return self._response(ChatCompletionChunk, "chat.completion.chunk", made, more)

    def opening(self, more: Json) -> Iterator[str]:
        """Yield the chunks to send before any token: the role of a chat's reply, or the echoed prompt."""
        for index in range(len(self.choices)):
            delta = {"role": "assistant", "content": ""}
            first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._response(ChatCompletionChunk, "chat.completion.chunk", [first], more)

    def _response(self, form: type[BaseModel], name: str, choices: list[Json], more: Json) -> str:
        made = form.model_validate({**self._head, "object": name, "choices": choices, **more})
        # ASCII only: some readers take a Unicode line separator in a text for the end of an event's line.
        return made.model_dump_json(exclude_unset=True, ensure_ascii=True)

    def _choice(self, update: Update, **text: Any) -> Json:
        logprobs = self._logprobs(update) if self._with_logprobs else None
        return {"index": update.choice, **text, "logprobs": logprobs, "finish_reason": update.reason}

    def _logprobs(self, update: Update) -> Json:
        return {"content": [self._row(t.token) for t in update.piece.tokens], "refusal": None}

    def _row(self, token: Token) -> Json:
        return self._logprob(token.id, token.logprob) | {"top_logprobs": list(starmap(self._logprob, token.top))}

    def _logprob(self, token: int, logprob: float | None) -> Json:
        raw = token_bytes(self._tokenizer, token)
        finite = logprob if logprob is not None and math.isfinite(logprob) else _NEVER  # JSON has no infinities
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite, "bytes": list(raw)}


class CompletionFormat(ChatFormat):
    """Writes the responses of /v1/completions. An echoed prompt precedes each text, and text offsets count from its
    beginning."""

    prefix = "cmpl"

    def whole(self, choices: Sequence[Update], more: Json) -> str:
        made = [self._choice(u, text=self.choices[u.choice].echo + u.piece.text) for u in choices]
        for choice in made:
            if self._with_logprobs and (prompt := self._echoed(self.choices[choice["index"]])) is not None:
                choice["logprobs"] = {k: prompt[k] + values for k, values in choice["logprobs"].items()}
        return self._response(_Completion, "text_completion", made, more)

    def chunk(self, update: Update | None, more: Json) -> str:
        made = [] if update is None else [self._choice(update, text=update.piece.text)]
        return self._response(_Completion, "text_completion", made, more)

    def opening(self, more: Json) -> Iterator[str]:
        for index, prompt in enumerate(self.choices):
            if prompt.echo:
                logprobs = self._echoed(prompt) if self._with_logprobs else None
                first = {"index": index, "text": prompt.echo, "logprobs": logprobs, "finish_reason": None}
                yield self._response(_Completion, "text_completion", [first], more)

    def _logprobs(self, update: Update) -> Json:
        begin, rows = len(self.choices[update.choice].echo), super()._logprobs(update)["content"]
        return self._columns(rows, [begin + t.start for t in update.piece.tokens])

    def _echoed(self, prompt: Prompt) -> Json | None:
        """Return the log-probabilities of an echoed prompt, null for its first token; None where none is echoed."""
        if not prompt.echo:
            return None
        first = self._logprob(prompt.ids[0], None)
        rows = [self._row(token) for token in prompt.scored]
        # In the echoed text special tokens are left out, and so they take no room in it.
        special, place, offsets = set(self._tokenizer.all_special_ids), 0, []
        for token, row in zip(prompt.ids, [first, *rows], strict=True):
            offsets.append(place)
            place = min(place + (0 if token in special else len(row["token"])), len(prompt.echo))
        columns = self._columns(rows, offsets[1:])
        return {
            "tokens": [first["token"], *columns["tokens"]],
            "token_logprobs": [None, *columns["token_logprobs"]],
            "top_logprobs": [None, *columns["top_logprobs"]],
            "text_offset": offsets,
        }

    def _columns(self, rows: list[Json], offsets: list[int]) -> Json:
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": [self._top(row) for row in rows],
            "text_offset": offsets,
        }

    def _top(self, row: Json) -> dict[str, float]:
        """Return text -> logprob of the likeliest tokens and the written one; of two with one text the likelier."""
        out: dict[str, float] = {}
        for token in (*row["top_logprobs"], row):
            out.setdefault(token["token"], token["logprob"])
        return out


def _thoughts(piece: Piece) -> Json:
    """Return the field of thoughts that servers of reasoning models add to OpenAI's messages, if there are any."""
    return {"reasoning_content": piece.thoughts} if piece.thoughts else {}


class _Logprobs(Logprobs):
    token_logprobs: list[float | None] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    top_logprobs: list[dict[str, float] | None] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Null for the first token of an echoed prompt, as OpenAI sends it, which its types do not foresee."""


class _CompletionChoice(CompletionChoice):
    logprobs: _Logprobs | None = None
    finish_reason: Reason | None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    """Null in the chunks of a stream that goes on, which OpenAI's type does not foresee."""


class _Completion(Completion):
    choices: list[_CompletionChoice]  # pyright: ignore[reportIncompatibleVariableOverride]


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of a token's text, which may be part of a character.

    An id without a token, as an embedding larger than the vocabulary has, gives no bytes.
    """
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    special, by_bytes = _alphabet(tokenizer)
    if token in special:
        return piece.encode()
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    # Byte-level vocabularies write each byte as one of 256 printable characters; other vocabularies hold plain text.
    if by_bytes and all(c in _BYTES for c in piece):
        return bytes(_BYTES[c] for c in piece)
    return piece.replace("\u2581", " ").encode()


@lru_cache(maxsize=4)
def _alphabet(tokenizer: Any) -> tuple[frozenset[int], bool]:
    """(ids of the special tokens, whether other tokens are written in bytes) of a tokenizer, which computes them anew
    whenever it is asked."""
    return frozenset(tokenizer.all_special_ids), "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
