"""The thoughts that a reasoning model writes before its answer: their marks, and splitting a reply at them."""

from __future__ import annotations

from dataclasses import dataclass

from steer.core.stops import begun


@dataclass(frozen=True)
class ThoughtMarks:
    """The texts that a model writes around its thoughts."""

    open: str
    close: str
    answer: str = ""
    """The text before an answer without thoughts; empty if there is none."""


THINK = ThoughtMarks("<think>", "</think>")
MARKS = (
    THINK,
    ThoughtMarks("<thinking>", "</thinking>"),
    ThoughtMarks("<reasoning>", "</reasoning>"),
    ThoughtMarks("<thought>", "</thought>"),
    ThoughtMarks("[THINK]", "[/THINK]"),
    ThoughtMarks("<seed:think>", "</seed:think>"),
    ThoughtMarks("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThoughtMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    ThoughtMarks(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
)
"""The marks that are known. `steer.model.chat_template.marks_of` chooses those of a tokenizer."""


class ThoughtSplitter:
    """Splits a reply into thoughts and answer while it is written. Thoughts are recognised at its beginning alone.

    Text that may be part of a mark is held back, and so are spaces around the thoughts, which belong to neither.

    >>> text = ThoughtSplitter(THINK)
    >>> [text.add(piece) for piece in ("<th", "ink>so", " so</think>", "yes")]
    [('', ''), ('so', ''), (' so', ''), ('', 'yes')]
    """

    def __init__(self, marks: ThoughtMarks, begun: str = "") -> None:
        """`begun`: the beginning of the reply that exists already; it is not returned."""
        self._marks, self._held = marks, ""
        self.opened = False
        """Whether the reply begins with thoughts."""
        self._answering = self._trim = False
        self.add(begun)

    @property
    def thinking(self) -> bool:
        """Whether the reply is within its thoughts."""
        return self.opened and not self._answering

    @property
    def answering(self) -> bool:
        """Whether the answer has begun: the thoughts are closed, or there are none."""
        return self._answering

    def add(self, text: str) -> tuple[str, str]:
        """Add text; return (thoughts, answer) that are decided now."""
        return self._take(text, False)

    def end(self) -> tuple[str, str]:
        """Return what was held back; no more text follows."""
        return self._take("", True)

    def _take(self, text: str, last: bool) -> tuple[str, str]:
        self._held += text
        thoughts = ""
        if not self.opened and not self._answering:
            begin = self._held.lstrip()
            marks = [m for m in (self._marks.open, self._marks.answer) if m]
            found = next((m for m in marks if begin.startswith(m)), None)
            if found is None and not last and any(m.startswith(begin) for m in marks):
                return "", ""
            self.opened, self._answering = found == self._marks.open, found != self._marks.open
            if found is not None:
                self._held, self._trim = begin[len(found) :], True
        if not self._answering:
            inside, closed, after = self._held.partition(self._marks.close)
            cut = len(inside) if closed or last else len(inside) - begun(inside, (self._marks.close,))
            thoughts = inside[:cut].rstrip()
            if self._trim:
                thoughts = thoughts.lstrip()
                self._trim = not thoughts
            if not closed:
                self._held = "" if last else inside[len(inside[:cut].rstrip()) :]
                return thoughts, ""
            self._answering, self._trim, self._held = True, True, after
        answer = self._held
        if self._trim:
            answer = answer.lstrip()
            self._trim = not answer
        self._held = ""
        return thoughts, answer


def split_thoughts(text: str, marks: ThoughtMarks) -> tuple[str, str]:
    """Return a whole reply as (thoughts, answer); both without the marks."""
    splitter = ThoughtSplitter(marks)
    pieces = [splitter.add(text), splitter.end()]
    return "".join(p[0] for p in pieces), "".join(p[1] for p in pieces)
