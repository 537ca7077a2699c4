"""A person who never read README goes from a fresh page to a bake, with the keyboard alone."""

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
TAB, ENTER, SPACE, RIGHT = "\ue004", "\ue007", " ", "\ue014"
FIELDS = ("Instruction at the high end", "Instruction at the low end (may be empty)", "Name (may be empty)")


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


def focused(page: Page) -> str:
    """What a screen reader calls the element with the focus: its label, or its text without the picture before it."""
    script = "const a = document.activeElement; return a.getAttribute('aria-label') || a.textContent.slice(0, 80)"
    return page.browser.execute_script(script)


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element with that name has the focus."""

    def reached() -> bool:
        if focused(page).endswith(name):
            return True
        keys(page, TAB)
        return False

    page.until(reached)


def press(page: Page, name: str) -> None:
    """Press the button with that name, by keys."""
    tab_to(page, name)
    keys(page, ENTER)


def part(page: Page, name: str) -> None:
    """Choose a part of the page by keys: Tab to the row of parts, and arrows in it. The focus stays on the part."""
    radio = "return document.activeElement.getAttribute('role') === 'radio'"
    page.until(lambda: page.browser.execute_script(radio) or keys(page, TAB))
    page.until(lambda: focused(page).endswith(name) or keys(page, RIGHT))
    keys(page, SPACE)
    page.settled()
    page.until(lambda: focused(page).endswith(name))


def text(page: Page, css: str) -> str:
    return page.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", css)


def test_by_keys_alone_from_a_fresh_page_to_a_chat_a_new_slider_a_comparison_and_a_bake(
    page: Page, tmp_path: Path
) -> None:
    sidebar, dialog = "[data-testid=stSidebar]", "[data-testid=stDialog]"
    tab_to(page, "Say something")
    keys(page, "ba be bi bo bu da de di do du" + ENTER)
    page.until(lambda: not page.growing() and len(page.texts()) == 2)
    page.settled()
    press(page, "New slider")
    page.until(lambda: page.all(f"{dialog} textarea"))
    page.settled()
    for label, words in zip(FIELDS, (HIGH, LOW, "ta"), strict=True):
        tab_to(page, label)
        keys(page, words)
    press(page, "Preview")
    page.until(lambda: "Make the slider" in text(page, dialog))
    page.settled()
    shown = text(page, dialog)
    assert (shown.count("High end"), shown.count("Low end")) == (2, 2)
    press(page, "Make the slider")
    page.until(lambda: "Making “ta”" in text(page, sidebar))
    page.until(lambda: "is among your sliders" in text(page, sidebar), FOUND)
    assert "Replies hold together from" in text(page, sidebar)
    assert "held-out AUROC" in text(page, sidebar)
    press(page, "OK")
    page.until(lambda: "is among your sliders" not in text(page, sidebar))
    assert len(page.texts()) == 2
    assert "Mine" in text(page, sidebar)
    page.settled()
    tab_to(page, "ta")
    keys(page, END)
    page.settled()
    assert float(page.slider("ta").get_attribute("value")) > 0
    part(page, "Compare")
    tab_to(page, "Blind: hide which is which until you have chosen")
    keys(page, SPACE)
    press(page, "Compare")
    page.until(lambda: "Which reads better?" in text(page, ".stMain"))
    page.settled()
    press(page, "Neither")
    page.until(lambda: "You chose neither" in text(page, ".stMain"))
    page.settled()
    part(page, "Bake")
    out = tmp_path / "baked"
    tab_to(page, "Folder to write")
    keys(page, str(out) + ENTER)  # in place of what stands there: Tab has selected it
    page.settled()
    press(page, "Bake")
    page.until(lambda: "Written:" in text(page, ".stMain"), FIRST)
    assert [add["name"] for add in read_json_object(out / CERTIFICATE)["edit"]["add"]] == ["ta"]
    verify(out)


def test_a_search_that_finds_nothing_stands_in_the_page_until_it_is_deleted(page: Page) -> None:
    sidebar = "[data-testid=stSidebar]"
    page.click("New slider")
    page.until(lambda: page.all("[data-testid=stDialog] textarea"))
    for label, words in zip(FIELDS, ("lie", "truth", "nothing"), strict=True):
        page.fill(label, words)
    page.click("Preview")
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
