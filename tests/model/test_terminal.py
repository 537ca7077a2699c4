"""The terminal chat: what it answers to lines that people type, through a pipe and at a prompt."""

from __future__ import annotations

import io
import signal
import sys

import pytest
from rich.console import Console
from tiny_chat import hooks_on

from steer.chat.session import Session
from steer.chat.terminal import run_chat
from steer.chat.voting import kept_votes
from steer.core.cards import load_card
from steer.core.sampler import Sampler
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.model.steered import SteeredModel

SHORT = Sampler(max_new_tokens=8, temperature=0)


def chat(model: SteeredModel, *lines: str, **options: object) -> list[str]:
    """What the chat prints for lines from a pipe."""
    out = io.StringIO()
    console = Console(file=out, width=100)
    session = Session(model, sampler=SHORT, sliders=model.sliders, **options)
    run_chat(session, stdin=io.StringIO("".join(f"{n}\n" for n in lines)), console=console)
    return out.getvalue().splitlines()


def plain_reply(model: SteeredModel, *turns: str, system: str | None = None) -> str:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    return model.chat(said, system=system, **SHORT.__dict__)


@pytest.fixture
def model(model: SteeredModel) -> SteeredModel:
    model.end_token_ids = frozenset()
    return model


def test_a_pipe_gets_the_replies_alone_and_ends_with_the_input(model):
    first = plain_reply(model, "hello")
    second = plain_reply(model, "hello", first, "well")
    assert first != second
    assert chat(model, "hello", "", "well") == [first, second]
    assert chat(model) == []


def test_the_system_prompt_is_heard(model):
    wanted = plain_reply(model, "hello", system="truth")
    assert wanted != plain_reply(model, "hello")
    assert chat(model, "hello", system="truth") == [wanted]


def test_a_slider_moves_by_its_name_and_reset_puts_all_back(model, known_moral):
    plain = plain_reply(model, "hello")
    with model.steered({known_moral: -6.0}):
        moved = plain_reply(model, "hello")
    assert moved != plain
    said = chat(model, "/moral -6", "hello", "/clear", "/moral", "/reset", "hello", "/moral")
    assert said[0] == "moral -6: 12.00 of the residual norm after block 1"
    assert "fall apart" in said[1]
    assert said[2:4] == [moved or "(no reply)", "conversation forgotten"]
    assert said[4] == said[0]
    assert said[6:] == ["no slider moves anything", plain, "moral 0: 0.00 of the residual norm after block 1"]
    assert hooks_on(model) == 0


def test_good_and_bad_keep_a_vote_on_the_last_reply(model, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_HOME", str(tmp_path))
    said = chat(model, "/good", "hello", "/good", "/bad", "well", "/bad")
    assert "expected a reply, found none" in said[0]
    assert said[2:4] == ["kept; 1 vote; a slider wants 20"] * 2  # the second replaces the first
    assert said[5] == "kept; 2 votes; a slider wants 20"
    assert [v.outcome for v in kept_votes()] == ["good", "bad", "bad"]


def test_a_slider_whose_label_has_a_space_moves_too(model, known_moral, make_direction):
    model.sliders.put(Slider(make_direction("other", seed=4), label="moral (2)"), 0.0)
    said = chat(model, "/moral (2) -0.1", "/moral (2)", "/moral 0.1", "/moral (3) 1")
    assert said[0].startswith("moral (2) -0.1")
    assert said[1] == said[0]
    assert said[2].startswith("moral 0.1")
    assert "found '(3) 1'" in said[3]
    assert {n: a for n, a in model.sliders.items() if a} == {"moral (2)": -0.1, "moral": 0.1}


def test_invalid_utf8_is_reported_and_the_chat_goes_on(model):
    latin = io.TextIOWrapper(io.BytesIO("caf\u00e9 hello\nhello\n".encode("latin-1")), encoding="utf-8")
    out = io.StringIO()
    run_chat(Session(model, sampler=SHORT, sliders=model.sliders), stdin=latin, console=Console(file=out, width=100))
    first = plain_reply(model, "caf\ufffd hello")
    assert out.getvalue().splitlines() == [
        "input: expected UTF-8, found other bytes, read as \ufffd; set the terminal to UTF-8",
        first,
        plain_reply(model, "caf\ufffd hello", first, "hello"),
    ]


def test_a_chat_that_outgrows_the_context_goes_on_without_its_first_messages(model):
    turns = ["hello truth lie abab", "well", "truth", "lie", "hello", "well", "abab"]
    model.context = 2 * len(model.prompt_ids([{"role": "user", "content": turns[0]}]))
    said = chat(model, *turns)
    cut = [line for line in said if "the chat is read without its first" in line]
    assert cut
    assert cut[0].startswith(f"the context of {model.context} tokens is full")
    assert len(said) - len(cut) == len(turns)
    assert all(line for line in said)


def test_sliders_shows_every_direction_with_its_site_and_share(model, known_moral, make_direction):
    model.sliders.put(make_direction("other", site=2), 0.25)
    heading, *rows = chat(model, "/moral -0.1", "/sliders")[1:]
    assert heading.split() == ["slider", "amount", "site", "share", "of", "residual", "norm"]
    assert sorted(r.split() for r in rows) == [["moral", "-0.1", "1", "0.20"], ["other", "0.25", "2", "0.50"]]
    model.sliders["moral"] = 0.5
    assert "after block 1 by 1.00 of its norm" in chat(model, "/sliders")[-1]


def test_sliders_names_the_command_that_finds_one_when_none_is_known(model, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_HOME", str(tmp_path))
    (line,) = chat(model, "/sliders")
    assert f"steer find {model.name} moralizing" in line


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/moral much", "expected NAME=AMOUNT with a number"),
        ("/moral nan", "expected NAME=AMOUNT with a number"),
        ("/kindness 1", "unknown command /kindness"),
        ("/", "unknown command /: expected one of /help"),
        ("/[bold]", "unknown command /[bold]"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_the_chat_goes_on(model, known_moral, line, says):
    answer, reply = chat(model, line, "hello")
    assert says in answer
    assert reply == plain_reply(model, "hello")


def test_a_checkpoint_without_a_chat_template_is_reported_in_one_line(model):
    model.tokenizer.chat_template = None
    first, second = chat(model, "hello", "hello")
    assert first == second
    assert "expected a chat template" in first


def test_quit_leaves_and_help_names_the_commands(model):
    said = "\n".join(chat(model, "/help", "/quit", "hello"))
    for command in ("/NAME AMOUNT", "/sliders", "/reset", "/clear", "/quit"):
        assert command in said
    assert plain_reply(model, "hello") not in said


def interrupt_at(model: SteeredModel, calls: int) -> None:
    """Send this process a Ctrl-C in the middle of the forward pass `calls` from now."""
    left = iter([False] * calls + [True])

    def hook(*_: object) -> None:
        if next(left, False):
            signal.raise_signal(signal.SIGINT)

    model.hf.model.layers[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("made", [0, 3])
def test_ctrl_c_stops_the_reply_and_keeps_the_chat(model, moral, made):
    whole = plain_reply(model, "hello")
    words = whole.split()[:made]
    # A message that got no word of reply is taken back.
    after = plain_reply(model, *(["hello", " ".join(words)] if made else []), "well")
    model.sliders.put(moral)
    interrupt_at(model, made)
    said = chat(model, "hello", "well")
    assert said == ([" ".join(words)] if made else []) + ["(stopped)", after]
    assert hooks_on(model) == 1  # the one that interrupts


class Keys(io.StringIO):
    """Lines that are typed at a prompt; the line "^C" is a Ctrl-C there."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline() if size is None else super().readline(size)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def test_at_a_prompt_ctrl_c_asks_and_ctrl_d_leaves(model, known_moral, monkeypatch, capsys):
    wanted = plain_reply(model, "hello")
    monkeypatch.setattr(sys, "stdin", Keys("^C\nhello\n"))
    out = io.StringIO()
    run_chat(Session(model, sampler=SHORT, sliders=model.sliders), console=Console(file=out, width=100))
    said = out.getvalue().splitlines()
    assert said[0] == f"{model.name}. Sliders: moral. /help lists the commands."
    assert [n for n in said[1:] if n] == ["/quit or Ctrl-D leaves", wanted]
    assert capsys.readouterr().out == "> " * 3


def test_undo_redo_and_another_operation_of_a_name(model, known_moral):
    lines = ("/moral -0.1", "/moral:cap 0.5", "/undo", "/redo", "/undo", "/undo", "/undo", "/moral:clip 1")
    said = chat(model, *lines)
    assert said[1] == "moral:cap 0.5"
    rows = [line.split() for line in said if line.startswith("moral")]
    assert ["moral:cap", "0.5", "1", "cap"] in rows
    assert ["moral:cap", "off", "1", "cap"] in rows
    assert "nothing to undo" in said
    assert "add, ablate, clamp, cap, scale" in said[-1]


def test_a_receipt_shows_what_each_slider_did_and_one_that_never_fired_is_a_warning(model, known_moral):
    late = Schedule("reply", after=50)
    model.sliders.put(Slider(known_moral, "add", when=late, label="late"), 1.0)
    said = chat(model, "/receipt", "/moral -0.1", "hello", "/receipt")
    assert said[0] == "no reply yet"
    warning = "slider 'late' (add 1) never fired in this reply"
    assert said[4] == warning
    # The last of the 8 new tokens is not read any more.
    read = len(model.prompt_ids([{"role": "user", "content": "hello"}])) + 7
    assert said[-4:] == [
        f"{read} tokens went through the model",
        "late add 1: 0 tokens, 0.00 of the residual norm on average",
        f"moral add -0.1: {read} tokens, 0.20 of the residual norm on average",
        warning,
    ]


def test_a_profile_is_written_and_read_again(model, known_moral, tmp_path):
    file = tmp_path / "calm.yaml"
    said = chat(model, "/moral -0.1", "/moral:cap 0.5", f"/save {file}", "/reset", f"/profile {file}", "/profile")
    assert f"{file} written" in said
    assert dict(model.sliders) == {"moral": -0.1, "moral:cap": 0.5}
    assert "/profile: expected a file" in said[-1]


def test_a_profile_is_put_into_a_character_card(model, known_moral, tmp_path):
    card, other = tmp_path / "duke.json", tmp_path / "none.json"
    card.write_text('{"name": "Duke", "first_mes": "Well?", "extra": 1}')
    said = chat(model, "/moral -0.1", f"/save {card}", f"/save {other}")
    assert f"{card} written" in said
    profile = load_card(card).profile
    assert profile is not None
    assert [(s.slider, s.amount) for s in profile.sliders] == [("moral", -0.1)]
    assert load_card(card).first_message == "Well?"
    assert f"{other}: " in said[-1]
    assert not other.exists()


def test_reread_has_the_earlier_turns_read_under_the_sliders_of_now(model, known_moral):
    here = chat(model, "hello", "/moral -6", "well")[-1]
    model.sliders.reset()
    first = plain_reply(model, "hello")
    anew = chat(model, "hello", "/moral -6", "/reread", "well")[-1]
    model.sliders["moral"] = -6
    assert anew == plain_reply(model, "hello", first, "well")
    assert here != anew


def test_a_terminal_gets_colour_and_a_pipe_none(model, known_moral):
    out = io.StringIO()
    run_chat(
        Session(model, sliders=model.sliders),
        stdin=io.StringIO("/nothing\n"),
        console=Console(file=out, force_terminal=True, width=100),
    )
    assert "\x1b[31m" in out.getvalue()
    assert "\x1b" not in "".join(chat(model, "/nothing", "/sliders", "hello"))
