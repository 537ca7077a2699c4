"""Texts whose replies are being written, and which of a reply's tokens are thoughts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from steer.core.thoughts import ThoughtSplitter
from steer.model.chat_template import known_marks
from steer.model.steering.low_rank import NO_ANSWER
from steer.model.tokens import Detokeniser

_BEFORE = 16
"""In how many tokens before a reply the mark is looked for with which the template opens or closes thoughts."""


class WrittenText:
    """A prompt and its reply as token ids; `append` adds a token."""

    def __init__(self, tokenizer: Any, ids: Sequence[int], start: int) -> None:
        """`start`: how many of the `ids` come before the reply."""
        self.ids, self.start = list(ids), start
        self._answers = self._find_answer(tokenizer)

    def append(self, token: int) -> None:
        """Add a token to the reply."""
        self.ids.append(token)

    @property
    def answer(self) -> int:
        """The number of the reply token that the answer begins with; `NO_ANSWER` if the next token is one of thoughts.

        See `steer.core.schedule.Part` for what counts as thoughts. No token after the answer's begin changes it, so it
        is the same for a whole text as it was when that token was written.
        """
        return next(self._answers)

    def _find_answer(self, tokenizer: Any) -> Iterator[int]:
        """Yield `answer` each time it is asked for, from the tokens written so far."""
        marks, before = known_marks(tokenizer), ""
        if marks is not None:
            pieces = Detokeniser(tokenizer, ())
            before = "".join(map(pieces.add, self.ids[max(0, self.start - _BEFORE) : self.start])).rstrip()
        if marks is None or before.endswith(tuple(mark for mark in (marks.close, marks.answer) if mark)):
            while True:
                yield 0
        pieces = Detokeniser(tokenizer, ())
        split = ThoughtSplitter(marks, marks.open if before.endswith(marks.open) else "")
        read = self.start
        while not split.answering:
            if read == len(self.ids):
                yield NO_ANSWER
            else:
                split.add(pieces.add(self.ids[read]))
                read += 1
        while True:
            yield read - self.start
