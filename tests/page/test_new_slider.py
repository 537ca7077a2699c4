"""A person who never read README goes from a fresh page to a bake, with the keyboard alone where the slider is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_browser import END, FIRST, Page, verify
from tiny_parrot import save_parrot

from steer.baking.certificate import CERTIFICATE
from steer.files import read_json_object

pytestmark = pytest.mark.alone

HIGH, LOW = 3 * "ta te ti to tu ", 3 * "va ve vi vo vu "
FOUND = 300
"""Seconds for a search: its process imports everything and loads the model."""
TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(scope="module")
def parrot_url(tmp_path_factory: pytest.TempPathFactory, served_page: Any) -> Iterator[str]:
    """The page on a model that repeats the words of its prompt."""
    folder = tmp_path_factory.mktemp("walk")
    with served_page(folder, str(save_parrot(folder / "parrot"))) as url:
        yield url


@pytest.fixture
def page(chromium: Any, parrot_url: str) -> Iterator[Page]:
    page = Page(chromium, parrot_url)
    yield page
    assert not page.all("[data-testid=stException]")


def keys(page: Page, text: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page.browser).send_keys(text).perform()


def tab_to(page: Page, label: str) -> None:
    """Press Tab until what has the focus is called `label`."""
    script = "const a = document.activeElement; return (a.getAttribute('aria-label') || '') + '|' + a.textContent"

    def reached() -> bool:
        if label in page.browser.execute_script(script)[:80]:
            return True
        keys(page, TAB)
        return False

    page.until(reached)


def text(page: Page, css: str) -> str:
    return page.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", css)


def ask(page: Page, high: str, low: str, name: str) -> None:
    """Fill the dialog by keys, and wait for the preview."""
    tab_to(page, "New slider")
    keys(page, ENTER)
    page.until(lambda: page.all("[data-testid=stDialog] textarea"))
    page.settled()
    for label, words in (("At the high end", high), ("At the low end", low), ("Name (may be empty)", name)):
        tab_to(page, label)
        keys(page, words)
    tab_to(page, "Preview")
    keys(page, ENTER)
    page.until(lambda: "Make the slider" in text(page, "[data-testid=stDialog]"))
    page.settled()


def test_from_a_fresh_page_to_a_chat_a_new_slider_a_comparison_and_a_bake(page: Page, tmp_path: Path) -> None:
    sidebar = "[data-testid=stSidebar]"
    page.say("ba be bi bo bu da de di do du")
    page.until(lambda: not page.growing() and len(page.texts()) == 2)
    page.settled()
    ask(page, HIGH, LOW, "ta")
    shown = text(page, "[data-testid=stDialog]")
    assert (shown.count("High end"), shown.count("Low end")) == (2, 2)
    tab_to(page, "Make the slider")
    keys(page, ENTER)
    page.until(lambda: "Making “ta”" in text(page, sidebar))
    page.until(lambda: "is among your sliders" in text(page, sidebar), FOUND)
    assert "Replies hold together from" in text(page, sidebar)
    assert "held-out AUROC" in text(page, sidebar)
    page.click("OK")
    page.until(lambda: "is among your sliders" not in text(page, sidebar))
    assert len(page.texts()) == 2
    assert "Mine" in text(page, sidebar)
    page.move("ta", END)
    page.settled()
    page.part("Compare")
    page.press(".stMain [data-testid=stFormSubmitButton] button")
    page.until(lambda: "Which reads better?" in text(page, ".stMain"))
    page.part("Bake")
    out = tmp_path / "baked"
    page.fill("Folder to write", str(out))
    page.bake()
    page.until(lambda: "Written:" in text(page, ".stMain"), FIRST)
    assert [add["name"] for add in read_json_object(out / CERTIFICATE)["edit"]["add"]] == ["ta"]
    verify(out)


def test_a_search_that_finds_nothing_stands_in_the_page_until_it_is_deleted(page: Page) -> None:
    sidebar = "[data-testid=stSidebar]"
    ask(page, "lie", "truth", "nothing")
    page.click("Make the slider")
    page.until(lambda: "“nothing” was not found" in text(page, sidebar), FOUND)
    page.browser.refresh()
    page.until(lambda: "“nothing” was not found" in text(page, sidebar), FIRST)
    page.settled()
    page.click("Try again")
    fields = "[data-testid=stDialog] textarea"
    page.until(lambda: [field.get_attribute("value") for field in page.all(fields)] == ["lie", "truth"])
    page.press("[data-testid=stDialog] [aria-label=Close]")
    page.until(lambda: not page.all(fields))
    page.press(".st-key-forget-nothing button")
    page.until(lambda: "was not found" not in text(page, sidebar))
