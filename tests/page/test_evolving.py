"""A person evolves merges in the page: start, votes, next generation, export, in Chromium, on tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_browser import FIRST, Page
from tiny_chat import save_tiny_chat
from tiny_family import recipe, tune, written

from steer.lineage.lineage import Lineage

pytestmark = pytest.mark.alone

BUILT = 600
"""Seconds for a generation: each child is merged, loaded and measured."""


@pytest.fixture(scope="module")
def family(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, three tunes of it, and a recipe that merges one."""
    folder = tmp_path_factory.mktemp("family")
    base = save_tiny_chat(tiny_llama, folder / "base", by_bytes=True, max_position_embeddings=1024)
    for seed, name in enumerate(("calm", "dry", "loud")):
        tune(base, folder / name, seed, 0.05)
    written(folder / "start.yml", recipe(folder, "base", "calm"))
    return folder


def test_start_three_votes_next_generation_export(chromium, page_url, family, tmp_path):
    from selenium.webdriver import ActionChains

    place, out = tmp_path / "lineage", tmp_path / "best"
    page = Page(chromium, page_url)
    page.part("Evolve")
    page.fill("Folder of the lineage", str(place))
    page.fill("Models that may be added, one a line", f"{family / 'dry'}\n{family / 'loud'}")
    page.fill("Recipe to start from", str(family / "start.yml"))
    page.click("Start")
    page.until(lambda: "At work, " in main(page))
    page.until(lambda: "no votes on " in main(page), BUILT)
    page.until(lambda: page.all("[class*=st-key-vote-left] button"), FIRST)
    page.settled()
    page.until(lambda: page.all("[aria-label='Vote as']"))
    page.fill("Vote as", "kim")
    lineage = Lineage(place)
    for number, key in enumerate("123", 1):
        page.until(lambda: page.all("[class*=st-key-vote-left] button"))
        page.settled()
        page.until(lambda: page.all("[data-testid=stChatMessage]")[-1].click() is None)  # keys in a field are text
        ActionChains(chromium).send_keys(key).perform()
        page.until(lambda number=number: len(lineage.votes) == number)
    assert [v.outcome for v in lineage.votes][2:] == ["same"]
    assert [v.outcome == v.left for v in lineage.votes][:2] == [True, False]
    assert all(v.voter == "kim" and v.replies[0] != v.replies[1] for v in lineage.votes)
    page.until(lambda: "after 3 votes" in main(page))

    message = "Your message, in place of this one"
    page.settled()  # the page is drawn again after a vote
    page.fill(message, "what is 1 and 2")  # the keys of a text are no votes
    page.until(lambda: "what is 1 and 2" in page.all("[data-testid=stChatMessage]")[-1].text)
    page.settled()
    assert len(lineage.votes) == 3

    page.click("Next generation")
    page.until(lambda: len(lineage.generations) == 3, BUILT)
    page.until(lambda: page.all("[class*=st-key-vote-left] button"), FIRST)
    page.click("Family tree")
    frame = page.until(lambda: page.all(".stMain iframe"))[0]
    chromium.switch_to.frame(frame)
    page.until(lambda: len(page.all("article")) == len(lineage.nodes))
    voted = lineage.votes[0]
    votes = f"details[data-node='{voted.a}']"
    page.press(f"{votes} > summary")
    page.press(f"{votes} details > summary")
    replies = [q.text for q in page.all(f"{votes} details blockquote") if q.is_displayed()]
    assert len(replies) == len(voted.chat) + 2
    page.hit(page.all("#copy")[0])
    page.until(lambda: page.all("#copy")[0].text in ("Copied", "Selected: press Ctrl-C"))
    chromium.switch_to.default_content()

    page.fill("Folder for the best one", str(out))
    page.click("Export")
    page.until(lambda: "Written: " in main(page))
    assert yaml.safe_load((out / "recipe.yml").read_text())["merge_method"] == "linear"
    assert not page.all("[data-testid=stException], [data-testid=stAlertContentError]")


def main(page: Page) -> str:
    """What the part says, read at once: it is drawn again and again while a job runs."""
    return page.browser.execute_script("return document.querySelector('.stMain').innerText")
