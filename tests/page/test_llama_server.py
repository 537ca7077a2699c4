"""The page straight on a real llama-server with the LoRAs and the control vector of a bake: in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_desk import Desk
from llama_server import LlamaServer
from test_browser import END, MESSAGE, Page

pytestmark = pytest.mark.alone


@pytest.fixture
def page(chromium: Any, served_page: Any, llama: LlamaServer, desk: Desk, tmp_path: Path) -> Iterator[Page]:
    with served_page(tmp_path, "--server", llama.url) as url:
        page = Page(chromium, url)
        yield page
        assert not page.all("[data-testid=stException]")


def test_a_lora_moves_during_the_chat_and_a_control_vector_says_why_it_needs_a_restart(page, desk):
    plain = reply(page)
    page.move("a (ablate)", END)
    page.until(lambda: float(page.slider("a (ablate)").get_attribute("value")) == 1)
    page.settled()
    moved = reply(page)
    assert moved != plain
    page.click("Reset all")
    page.until(lambda: float(page.slider("a (ablate)").get_attribute("value")) == 0)
    page.settled()
    assert reply(page) == plain

    assert page.slider("b (ablate)").is_enabled()
    assert not page.slider("c").is_enabled()
    sidebar = page.all("[data-testid=stSidebar]")[0].text
    assert "Moves only when the server starts again" in sidebar
    assert str(desk.baked / "control_vector.gguf") in sidebar


def reply(page: Page) -> str:
    """The whole reply to the message in a new chat."""
    if page.texts():
        page.click("New chat")
        page.until(lambda: not page.texts())
        page.settled()
    page.say(MESSAGE)
    page.until(lambda: not page.growing() and page.all("[class*=st-key-Regenerate]"))
    page.settled()
    return page.until(lambda: len(page.texts()) == 2 and page.texts()[-1])
