"""Replies split into thoughts and answer, however the text comes in pieces."""

from __future__ import annotations

import pytest

from steer.core.thoughts import MARKS, THINK, ThoughtSplitter, split_thoughts

CASES = [
    ("<think>so so</think>yes", "so so", "yes"),
    ("\n<think>\nso\n\nso\n</think>\n\nyes <think>x</think>", "so\n\nso", "yes <think>x</think>"),
    ("<think>\n\n</think>\n\nyes", "", "yes"),
    ("<think>so so", "so so", ""),
    ("<think>so </thin", "so </thin", ""),
    ("<thinker>yes", "", "<thinker>yes"),
    ("<thi", "", "<thi"),
    (" yes\n", "", " yes\n"),
    ("yes </think>", "", "yes </think>"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "thoughts", "answer"), CASES)
def test_a_reply_is_split_the_same_in_any_pieces(text: str, thoughts: str, answer: str) -> None:
    assert split_thoughts(text, THINK) == (thoughts, answer)
    for size in (1, 2, 3, 5, 8):
        splitter = ThoughtSplitter(THINK)
        pieces = [splitter.add(text[i : i + size]) for i in range(0, len(text), size)]
        pieces.append(splitter.end())
        assert ("".join(p[0] for p in pieces), "".join(p[1] for p in pieces)) == (thoughts, answer)


@pytest.mark.parametrize("marks", MARKS)
def test_every_kind_of_marks_goes_there_and_back(marks) -> None:
    assert split_thoughts(f"{marks.open}\nso so\n{marks.close}\n\nyes", marks) == ("so so", "yes")
    assert split_thoughts("yes", marks) == ("", "yes")
    assert split_thoughts(f"{marks.answer}yes", marks) == ("", "yes")


def test_thoughts_that_the_prompt_has_opened_go_on() -> None:
    splitter = ThoughtSplitter(THINK, "<think>")
    assert [splitter.add("\nso"), splitter.add("</think>"), splitter.add("\n\nyes")] == [
        ("so", ""), ("", ""), ("", "yes")
    ]  # fmt: skip
    assert splitter.opened
    assert ThoughtSplitter(THINK, "yes").add("<think>so") == ("", "<think>so")
