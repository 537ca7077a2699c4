"""`steer evolve vote` from a pipe and in a terminal: blind, one key a vote, every vote kept."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from test_judging import make_lineage, models  # noqa: F401

from steer.errors import UsageError
from steer.lineage.lineage import Lineage
from steer.verbs.vote import vote


@pytest.fixture
def lineage(tmp_path: Path, models: Path) -> Lineage:  # noqa: F811
    return make_lineage(tmp_path / "lineage", models)


def piped(lineage: Lineage, lines: str, **options: object) -> str:
    out = io.StringIO()
    vote(
        lineage.place,
        "kim",
        stdin=io.StringIO(lines),
        console=Console(file=out, width=100),
        max_new_tokens=6,
        **options,
    )  # pyright: ignore
    return out.getvalue()


def test_lines_of_a_pipe_are_votes_messages_and_mistakes(lineage: Lineage) -> None:
    said = piped(lineage, "1\n\n2\nu\nhello friend\n3\n9\n4\n")
    assert [(v.outcome, v.chat[0][1] == "hello friend") for v in lineage.votes][1:] == [("same", True), ("bad", False)]
    assert "no votes on 3 merges yet" in said
    assert "after 1 vote " in said
    assert said.count("taken back; after 1 vote") == 1
    assert "you: hello friend" in said
    assert "found '9'" in said


def test_nothing_before_a_vote_says_whose_replies_they_are(lineage: Lineage, capfd: pytest.CaptureFixture) -> None:
    said = piped(lineage, "q\n")
    captured = capfd.readouterr()
    for text in (said, captured.out, captured.err):
        assert not re.search(r"models/|\b1[abc]\b", text)


def test_a_message_that_is_too_long_is_refused_and_the_votes_go_on(lineage: Lineage) -> None:
    said = piped(lineage, "hello " * 200 + "\n1\n")
    assert "128" in said
    assert len(lineage.votes) == 1


def test_a_scene_goes_on_in_a_pipe_with_suggestions_or_messages(lineage: Lineage) -> None:
    piped(lineage, "1\n2\nwell well\n3\n", scene=True)
    first, second, third = (v.chat for v in lineage.votes)
    assert (len(first), len(second), len(third)) == (1, 3, 5)
    assert second[:1] == first
    assert third[-1] == ["user", "well well"]


def test_mistakes_of_the_call_are_one_line(lineage: Lineage) -> None:
    with pytest.raises(UsageError, match="--prompt: expected some text"):
        piped(lineage, "", prompt=" ")
    with pytest.raises(UsageError, match="--voter: expected a name"):
        vote(lineage.place, "../kim", stdin=io.StringIO("1\n"))


class Terminal:
    """`steer evolve vote` in a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.process, self.fd = pty.fork()
        if self.process == 0:
            os.environ |= {"COLUMNS": "100", "TERM": "xterm"}
            os.execv(sys.executable, [sys.executable, "-m", "steer.cli.main", "evolve", "vote", *map(str, arguments)])
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 400) -> str:
        """Return the screen's text when it has the pattern after what was waited for before, and forget it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, self.text
            if select.select([self.fd], [], [], 1)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def ended(self, seconds: float = 100) -> int:
        end = time.monotonic() + seconds
        while True:  # what is left on the screen, or the process would wait for a reader
            assert time.monotonic() < end, "still running"
            try:
                if select.select([self.fd], [], [], 1)[0] and not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def terminal(lineage: Lineage) -> Iterator[Callable[..., Terminal]]:
    started = []

    def start(*arguments: object) -> Terminal:
        started.append(Terminal(lineage.place, "--voter", "kim", "--max-new-tokens", 6, *arguments))
        return started[-1]

    yield start
    for one in started:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(one.process, signal.SIGKILL)
        os.close(one.fd)


@pytest.mark.slow
def test_a_key_is_a_vote_in_a_terminal(lineage: Lineage, terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    screen.wait_for("─ 2 ─")
    screen.press("1")
    screen.wait_for("after 1 vote .*")
    screen.wait_for("─ 2 ─")
    screen.press("m")
    screen.wait_for("you: ")
    screen.press("hello friend\r")
    screen.wait_for("you: hello friend")
    screen.wait_for("─ 2 ─")
    screen.press("3")
    screen.wait_for("after 2 votes")
    screen.wait_for("─ 2 ─")
    screen.press("u")
    screen.wait_for("taken back; after 1 vote")
    screen.wait_for("─ 2 ─")  # a key before the pair is shown is dropped
    screen.press("q")
    assert screen.ended() == 0
    assert len(lineage.votes) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_with_every_vote_kept(lineage: Lineage, terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--scene")
    screen.wait_for("─ 2 ─")
    screen.press("2")
    screen.wait_for(r"you \[.*\]: ")
    screen.press("\r")  # the suggestion
    screen.wait_for("─ 2 ─")
    screen.press("\x03")
    assert screen.ended() == 130
    assert [len(v.chat) for v in lineage.votes] == [1]


@pytest.mark.slow
def test_sigterm_ends_in_one_line_and_keeps_the_votes(lineage: Lineage) -> None:
    command = [sys.executable, "-m", "steer.cli.main", "evolve", "vote", str(lineage.place), "--voter", "kim"]
    command += ["--max-new-tokens", "6"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as p:
        assert p.stdin is not None
        assert p.stdout is not None
        p.stdin.write("1\n")
        p.stdin.flush()
        while not p.stdout.readline().startswith("after 1 vote"):
            pass
        p.send_signal(signal.SIGTERM)
        p.stdin.close()
        p.wait(60)
        assert p.stderr is not None
        assert p.stderr.read().splitlines()[-1] == (
            "steer: stopped by SIGTERM; every vote is kept, run the same command again to go on"
        )
        assert p.returncode == 143
    assert len(lineage.votes) == 1
