"""The page as people use it: real clicks and keys in a real Chromium, on a tiny checkpoint that never ends a reply."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.baking.certificate import CERTIFICATE
from steer.checkpoint.fetch import DEFAULT_MODEL
from steer.checkpoint.library import direction_place
from steer.model.steered import load

pytestmark = pytest.mark.alone

PATIENCE = 60
FIRST = 240
"""Seconds for a page to come up: the first one has its server import and load everything."""
ALL_PROBES = 900
"""Seconds for a quick evaluation of two arms by every probe."""
MESSAGE = "hello friend"


class Page:
    """What a person sees and does in one tab."""

    def __init__(self, browser: Any, url: str, shows: str = "textarea[data-testid=stChatInputTextArea]") -> None:
        self.browser = browser
        browser.get(url)
        self.until(lambda: self.all(shows), FIRST)
        self.settled()

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements("css selector", css)

    def until(self, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """Wait for something that holds; what is being redrawn meanwhile does not yet."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except WebDriverException:
                pass
            time.sleep(0.05)
        pytest.fail(f"waited in vain; the page shows:\n{self.all('body')[0].text}")

    def settled(self) -> None:
        """No script is at work."""
        time.sleep(0.3)
        self.until(lambda: self.all("[data-testid=stApp][data-test-script-state=notRunning]"))

    def click(self, label: str) -> None:
        """A button, or what opens an expander, by the name that a screen reader reads."""

        def found() -> bool:
            for button in self.all("button, summary"):
                text = button.get_attribute("textContent") or ""
                if label in text and button.is_displayed() and button.is_enabled():
                    self.hit(button)
                    return True
            return False

        self.until(found)

    def hit(self, element: Any) -> None:
        """Click what may lie out of sight; what lies on top of it, or moves, is an error of this one try."""
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, css: str, which: int = 0) -> None:
        """Click the element that a selector finds, once it is there and nothing covers it: a toast goes away, a redraw
        ends."""
        self.until(lambda: self.all(css)[which:] and self.hit(self.all(css)[which]) is None)

    def fill(self, label: str, text: str) -> None:
        def typed() -> bool:
            field = self.all(f"[aria-label={json.dumps(label)}]")[0]
            field.send_keys("\ue009a\ue000" + text + "\ue007")  # in place of all there is
            return True

        self.until(typed)
        self.settled()

    def say(self, text: str) -> None:
        box = "textarea[data-testid=stChatInputTextArea]"
        self.until(lambda: self.all(box)[0].send_keys(text + "\ue007") is None)
        self.until(self.growing)

    def growing(self) -> list[Any]:
        return self.all(".st-key-growing")

    def texts(self) -> list[str]:
        """What every message says, without its buttons."""
        script = """return [...document.querySelectorAll('[data-testid=stChatMessage]')].map(m =>
            m.querySelector('[data-testid=stMarkdownContainer]').innerText)"""
        return [t.replace("▍", "").strip() for t in self.browser.execute_script(script)]

    def words(self, at_least: int) -> str:
        """The reply, once it has so many words."""
        return self.until(lambda: (t := self.texts()[-1]).count(" ") >= at_least and t)

    def stop(self) -> str:
        """Stop the reply, where it is not whole yet; what it is then."""
        if self.growing():
            self.until(lambda: not self.growing() or self.hit(self.all(".st-key-stop button")[0]) is None)
        self.until(lambda: not self.growing() and self.all("[class*=st-key-Regenerate]"))
        self.settled()
        return self.texts()[-1]

    def slider(self, label: str) -> Any:
        return self.all(f"[data-testid=stSidebar] input[type=range][aria-label={json.dumps(label)}]")[0]

    def move(self, label: str, keys: str) -> None:
        self.until(lambda: self.slider(label).send_keys(keys) is None)

    def bake(self) -> None:
        self.press(".stMain [data-testid=stBaseButton-primary]")

    def upload(self, profile: Path) -> None:
        self.until(lambda: self.all("[data-testid=stSidebar] input[type=file]")[0].send_keys(str(profile)) is None)
        self.click("Use it")

    def part(self, name: str) -> None:
        self.click(name)
        self.settled()


LEFT, RIGHT, END, BACKSPACE = "\ue012", "\ue014", "\ue010", "\ue003"


@pytest.fixture
def page(chromium: Any, page_url: str) -> Iterator[Page]:
    """A new tab's page, which shows no traceback to its end, and no advert of Streamlit's."""
    page = Page(chromium, page_url)
    yield page
    assert not page.all("[data-testid=stException], [data-testid=stSkillsNudge]")


def test_a_slider_that_moves_during_a_reply_changes_the_words_that_follow_and_no_earlier_one(page):
    page.say(MESSAGE)
    page.words(20)
    plain = page.stop()
    page.click("New chat")
    page.until(lambda: not page.texts())
    page.say(MESSAGE)
    before = page.words(10)
    page.move("moral", END)
    page.until(lambda: page.slider("moral").get_attribute("value") == page.slider("moral").get_attribute("max"))
    page.words(len(before.split()) + 60)
    moved = page.stop()
    assert moved.startswith(before)
    assert len(moved) > len(before)
    # The same seed, the same message: the two agree while the slider stood still, and part after it.
    agree = next((i for i, (a, b) in enumerate(zip(plain.split(), moved.split(), strict=False)) if a != b), None)
    shared = min(len(plain.split()), len(before.split()))
    assert plain.split()[:shared] == moved.split()[:shared]
    assert agree is None or agree >= shared
    page.click("What the sliders did")
    page.until(lambda: "moral (add" in page.all("[data-testid=stPopoverBody]")[0].text)
    assert "The sliders moved during it" in page.all("[data-testid=stPopoverBody]")[0].text


def test_a_click_before_the_page_has_heard_of_a_reset_does_not_bring_the_old_amount_back(chromium, page_url):
    held = """const add = WebSocket.prototype.addEventListener;
        WebSocket.prototype.addEventListener = function (type, hear, ...more) {
            const late = e => window.held ? window.held.push(() => hear(e)) : hear(e);
            add.call(this, type, type === 'message' ? late : hear, ...more);
        };"""
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": held})
    try:
        page = Page(chromium, page_url)
        page.move("moral", END)
        page.settled()
        chromium.execute_script("window.held = []")
        page.click("Reset all")
        time.sleep(3)  # its run has ended, and the browser still has the slider of before
        page.click("New chat")
        time.sleep(1)
        chromium.execute_script("const late = window.held; window.held = null; late.forEach(hear => hear())")
        page.until(lambda: float(page.slider("moral").get_attribute("value")) == 0)
        page.settled()
        page.say(MESSAGE)
        page.words(5)
        page.stop()
        page.click("What the sliders did")
        page.until(lambda: "No slider moved it." in page.all("[data-testid=stPopoverBody]")[0].text)
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_swipes_edits_and_a_chat_that_is_opened_again(page):
    page.say(MESSAGE)
    page.words(5)
    first = page.stop()
    page.click("Regenerate")
    page.until(page.growing)
    page.words(5)
    second = page.stop()
    assert second != first
    page.click("Previous")
    page.until(lambda: page.texts()[-1] == first)
    page.click("Continue")
    page.until(page.growing)
    page.words(first.count(" ") + 5)
    assert page.stop().startswith(first)
    page.click("New chat")
    page.until(lambda: not page.texts())
    page.click("Old chats")
    page.click("Open")
    page.until(lambda: page.texts() and page.texts()[0] == MESSAGE)


def test_side_by_side_marks_words_that_differ_and_a_blind_vote_reveals_which_was_which(page, tiny_page_home):
    page.move("moral", END)
    page.settled()
    page.part("Compare")
    page.fill("Message", MESSAGE)
    page.press(".stMain [data-testid=stCheckbox] label")
    page.press(".stMain [data-testid=stFormSubmitButton] button")
    time.sleep(1)
    page.click("Stop")
    page.until(lambda: page.all("mark.st-differs"))
    assert "with these sliders" not in page.all(".stMain [data-testid=stColumn] p")[2].text
    page.click("Neither")
    page.until(lambda: "You chose neither" in page.all(".stMain")[0].text)
    vote = json.loads((tiny_page_home / "home" / "votes.jsonl").read_text().splitlines()[-1])
    assert (vote["chat"][-1]["content"], vote["outcome"], vote["blind"]) == (MESSAGE, "neither", True)
    assert vote["replies"][1]["profile"]["sliders"][0]["slider"] == "moral"


def test_a_feature_that_is_found_by_words_and_pinned_becomes_a_slider(page):
    page.part("Features")
    page.fill("Words", "word8")
    page.until(lambda: "word8" in page.all(".stMain")[0].text)
    page.click("Pin")
    page.until(lambda: len(page.all("[data-testid=stSidebar] input[type=range]")) == 2)
    page.click("Unpin")
    page.until(lambda: len(page.all("[data-testid=stSidebar] input[type=range]")) == 1)


def test_past_ten_sliders_a_few_words_find_one_and_hidden_ones_keep_their_amounts(
    page, chromium, tiny_page_home, make_direction, monkeypatch
):
    monkeypatch.setenv("STEER_HOME", str(tiny_page_home / "home"))
    about = {"with": "You answer as a pirate.", "without": "You answer as a clerk."}
    made = [make_direction(f"voice-{number}", seed=number) for number in range(10)]
    made.append(replace(make_direction("sailor"), provenance=about))
    sketch = load(tiny_page_home / "chat").sketch()
    for direction in made:
        direction.provenance["sketch"] = sketch.to_header()
    files = [direction.save(direction_place(sketch, direction.name)) for direction in made]
    try:
        chromium.refresh()
        page.until(lambda: len(sliders(page)) == 12)
        page.move("voice 3", END)
        page.settled()
        moved = float(page.slider("voice 3").get_attribute("value"))
        assert moved > 0
        page.fill("Find a slider", "PIRATE clerk")  # the words of its two ends
        page.until(lambda: sliders(page) == ["sailor"])
        page.fill("Find a slider", "voice 1")
        page.until(lambda: sliders(page) == ["voice 1"])
        page.move("voice 1", END)
        page.settled()
        page.fill("Find a slider", "nobody")
        page.until(lambda: "Nothing found." in page.all("[data-testid=stSidebar]")[0].text)
        assert sliders(page) == []
        page.fill("Find a slider", BACKSPACE)
        page.until(lambda: len(sliders(page)) == 12)
        assert [float(page.slider(f"voice {n}").get_attribute("value")) > 0 for n in range(5)] == [
            n in (1, 3) for n in range(5)
        ]
        assert float(page.slider("voice 3").get_attribute("value")) == moved
        page.click("Mine")  # folded
        page.until(lambda: not page.slider("voice 3").is_displayed())
    finally:
        for file in files:
            file.unlink()


def sliders(page: Page) -> list[str]:
    """The names of the sliders in the sidebar."""
    return [x.get_attribute("aria-label") for x in page.all("[data-testid=stSidebar] input[type=range]")]


def test_a_profile_goes_out_as_a_file_and_comes_back(page, tmp_path, chromium):
    page.move("moral", LEFT * 10)
    page.until(lambda: page.slider("moral").get_attribute("value").startswith("-"))
    page.settled()
    amount = float(page.slider("moral").get_attribute("value"))
    page.click("Profiles")
    page.fill("Save as", "stern")
    page.press("[data-testid=stDownloadButton] button")
    file: Path = chromium.downloads / "stern.yaml"
    page.until(file.is_file)
    assert yaml.safe_load(file.read_text())["sliders"] == [{"slider": "moral", "amount": amount}]
    page.click("Reset all")
    page.until(lambda: float(page.slider("moral").get_attribute("value")) == 0)
    page.upload(file)
    page.until(lambda: float(page.slider("moral").get_attribute("value")) == amount)


def test_two_tabs_do_not_touch_each_other(page, chromium, page_url):
    page.move("moral", END)
    page.settled()
    one = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    try:
        other = Page(chromium, page_url)
        assert float(other.slider("moral").get_attribute("value")) == 0
        other.say(MESSAGE)
        plain = other.words(10)
        chromium.switch_to.window(one)
        page.say(MESSAGE)
        moved = page.words(10)
        page.stop()
        n = min(len(plain.split()), len(moved.split()))
        assert plain.split()[:n] != moved.split()[:n]
        chromium.switch_to.window(chromium.window_handles[-1])
        assert other.stop().startswith(plain)
        chromium.close()
    finally:
        chromium.switch_to.window(one)


def test_getting_the_default_merge_is_stopped_and_begun_again(chromium, empty_page_url, tmp_path):
    page = Page(chromium, empty_page_url, ".stMain button")
    page.click("Get the default merge")
    for again in (True, False):
        page.until(lambda: " of 3: " in page.all(".stMain")[0].text)
        page.click("Cancel")
        page.until(lambda: "stopped; nothing half-written was left" in page.all(".stMain")[0].text)
        if again:
            page.click("Try again")
    # A model that was fetched faster than the click came is whole, and its mark is written last.
    for left in (tmp_path / "home" / "models").glob("*"):
        assert left.name == DEFAULT_MODEL
        assert (left / ".steer-fetch.json").is_file()


FILES = {"checkpoint": "model.safetensors", "adapter": "adapter_model.safetensors"}


@pytest.mark.parametrize("form", list(FILES))
def test_a_bake_shows_its_certificate_and_verifies(page, tmp_path, form):
    page.move("moral", LEFT * 4)
    page.settled()
    page.part("Bake")
    page.part(form)
    out = tmp_path / "out"
    page.fill("Folder to write", str(out))
    page.bake()
    page.until(lambda: "Written:" in page.all(".stMain")[0].text)
    assert (out / FILES[form]).is_file()
    page.click("Certificate")
    page.until(lambda: "writers_found" in page.all(".stMain [data-testid=stJson]")[0].text)
    verify(out)


def test_a_bake_says_what_cannot_be_written_and_writes_the_rest(page, tmp_path):
    profile = tmp_path / "two.yaml"
    sliders = [{"slider": "moral", "amount": -0.4}, {"slider": "L1/8", "amount": 0.5, "operation": "clamp"}]
    profile.write_text(yaml.safe_dump({"name": "two", "sliders": sliders}))
    page.click("Profiles")
    page.upload(profile)
    page.part("Bake")
    page.until(lambda: "clamp: " in page.all(".stMain")[0].text)
    assert not page.all(".stMain [data-testid=stBaseButton-primary]:enabled")
    out = tmp_path / "out"
    page.fill("Folder to write", str(out))
    page.click("Bake what can be")
    page.until(lambda: "Written:" in page.all(".stMain")[0].text)
    edit = json.loads((out / CERTIFICATE).read_text())["edit"]
    assert ([add["name"] for add in edit["add"]], "moves" in edit) == (["moral"], False)
    verify(out)


def test_what_sliders_cost_is_measured_while_the_page_is_loaded_again_and_its_report_opens(page, chromium):
    page.move("moral", LEFT * 4)
    page.settled()
    page.click("Profiles")
    page.fill("Save as", "noir")
    page.click("What did this cost?")
    page.until(lambda: "Measuring, " in page.all(".stMain")[0].text)
    chromium.refresh()
    page.until(lambda: page.all("textarea[data-testid=stChatInputTextArea]"), FIRST)
    page.settled()
    page.part("Cost")
    page.until(lambda: "noir" in page.all(".stMain")[0].text)
    page.until(lambda: "Download it" in page.all(".stMain")[0].text, ALL_PROBES)
    assert page.all(".stMain li")
    page.click("Download it")
    report: Path = chromium.downloads / "eval.html"
    page.until(report.is_file)
    page.click("Open the report")
    frame = page.until(lambda: page.all("[data-testid=stDialog] iframe"))[0]
    chromium.switch_to.frame(frame)
    page.until(lambda: "What changed" in page.all("h1")[0].text)
    assert page.all("figure svg")
    chromium.switch_to.default_content()


def test_what_a_bake_cost_is_asked_under_it_and_can_be_stopped_and_go_on(page, tmp_path):
    page.move("moral", LEFT * 4)
    page.settled()
    page.part("Bake")
    page.fill("Folder to write", str(tmp_path / "calm"))
    page.bake()
    page.until(lambda: "Written:" in page.all(".stMain")[0].text)
    page.click("What did this cost?")
    page.until(lambda: "Measuring, " in page.all(".stMain")[0].text)
    page.click("Cancel")
    page.until(lambda: "what was measured is kept" in page.all(".stMain")[0].text)
    page.settled()  # the part is drawn again without its timer, and a button of before is gone
    page.click("Go on")
    page.until(lambda: "Open the report" in page.all(".stMain")[0].text, ALL_PROBES)


def verify(out: Path) -> None:
    """As a user does, or the test fails."""
    command = [sys.executable, "-c", "from steer.cli.main import main; main()", "verify", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
