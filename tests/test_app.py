"""The Streamlit page on a tiny checkpoint: what people see and move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from tiny_chat import keep_direction, save_tiny_chat

from steer.values.direction import Direction

APP = Path(__file__).parents[1] / "app.py"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A STEER_HOME of its own, and no model cached from the test before."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    st.cache_resource.clear()
    yield tmp_path
    st.cache_resource.clear()


@pytest.fixture
def checkpoint(home: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that can chat, named to the page."""
    path = save_tiny_chat(tiny_llama, home / "chat", eos_token_id=None, max_position_embeddings=512)
    monkeypatch.setenv("STEER_MODEL", str(path))
    return path


@pytest.fixture
def moral(checkpoint: Path, make_direction: Callable[..., Direction]) -> Direction:
    """A direction known for the checkpoint."""
    direction = make_direction("moral")
    keep_direction(checkpoint, direction)
    return direction


def page() -> AppTest:
    at = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not at.exception
    return at


def say(at: AppTest, text: str) -> str:
    """Send a message; the reply on the page."""
    at.chat_input[0].set_value(text).run()
    assert not at.exception
    return at.chat_message[-1].markdown[0].value


def test_a_chat_streams_and_stays_on_the_page(moral):
    at = page()
    first = say(at, "hello")
    assert first
    second = say(at, "well")
    shown = [(m.name, m.markdown[0].value) for m in at.chat_message]
    assert shown == [("user", "hello"), ("assistant", first), ("user", "well"), ("assistant", second)]
    next(b for b in at.button if b.label == "New chat").click().run()
    assert len(at.chat_message) == 0
    assert say(at, "hello") == first


def test_a_slider_moved_between_messages_changes_the_reply_and_reset_puts_it_back(moral):
    at = page()
    (slider,) = at.sidebar.slider
    assert (slider.label, slider.min, slider.max, slider.step, slider.value) == (
        "moral",
        -2.0,
        2.0,
        0.25,
        0.0,
    )
    plain = say(at, "hello")
    at.button[1].click().run()
    at.sidebar.slider[0].set_value(-2.0).run()
    assert at.sidebar.caption[0].value == "4.00 of the residual norm after block 1"
    assert "fall apart" in at.sidebar.warning[0].value
    assert say(at, "hello") != plain
    at.button[1].click().run()
    at.button[0].click().run()
    assert at.sidebar.slider[0].value == 0.0
    assert len(at.sidebar.warning) == 0
    assert say(at, "hello") == plain


def test_the_system_prompt_is_heard(moral):
    at = page()
    plain = say(at, "hello")
    other = page()
    other.sidebar.text_area[0].set_value("truth").run()
    assert say(other, "hello") != plain


def test_two_browsers_have_sliders_of_their_own(moral):
    one, two = page(), page()
    plain = say(one, "hello")
    one.button[1].click().run()
    two.sidebar.slider[0].set_value(2.0).run()
    assert say(one, "hello") == plain
    assert say(two, "hello") != plain
    assert one.run().sidebar.slider[0].value == 0.0


def test_a_model_without_a_direction_chats_and_names_the_command_that_finds_one(checkpoint):
    at = page()
    assert f"steer find {checkpoint} moralizing" in at.sidebar.info[0].value
    assert say(at, "hello")


def test_a_model_that_cannot_be_loaded_is_told_of_without_a_traceback(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load it" in page().error[0].value


def test_a_model_that_is_not_there_is_told_of_without_a_traceback(home, monkeypatch):
    monkeypatch.setenv("STEER_MODEL", str(home / "nowhere"))
    at = page()
    assert "nowhere: expected a checkpoint directory" in at.error[0].value
    assert len(at.chat_input) == 0


def test_a_page_without_a_model_says_how_to_start_it(home, monkeypatch):
    monkeypatch.delenv("STEER_MODEL", raising=False)
    monkeypatch.setattr("sys.argv", ["app.py"])
    assert "steer ui MODEL" in page().info[0].value
