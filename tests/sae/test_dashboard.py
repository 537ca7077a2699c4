"""The dashboard: whole in one file, safe whatever the text, and quick with thousands of latents."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from steer.sae.dashboard import rate_histogram, script_json, write_page
from steer.sae.records import Context, FeatureRecord, TraitScore

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028 ]]> <!--"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(index: int, token: str = " word", auroc: float = 0.6) -> FeatureRecord:
    return FeatureRecord(
        index, 10 ** -(1 + index % 4), 2.0, 4.0, [(token, 1.5)], [(" low", -1.0)],
        [Context("before " + token, token, token + " after", 4.0)], [(index + 1, 0.25)],
        {"moralizing": TraitScore(auroc, auroc, auroc, 0.01)},
    )  # fmt: skip


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture
def page(tmp_path: Path) -> str:
    made = [record(0, HOSTILE), *(record(i) for i in range(1, 500))]
    path = write_page(
        made,
        tmp_path / "page.html",
        title=HOSTILE,
        summary={"FVU" + HOSTILE: 0.25, "tokens": 1_000_000, "control": None},
        traits=[{"trait": HOSTILE, "note": HOSTILE, "columns": ["latent", HOSTILE], "rows": [[HOSTILE, 0.123456]]}],
    )
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    return path.read_text(encoding="utf-8")


def test_nothing_is_fetched(page: str) -> None:
    made = Elements(page)
    assert not [t for t, a in made.tags if "src" in a or t == "link" or re.match(r"\w+:", a.get("href") or "")]
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for t, a in made.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_stays_text_wherever_it_stands(page: str) -> None:
    made = Elements(page)
    assert len(made.scripts) == 2
    assert not {"img", "b", "i"} & {t for t, _ in made.tags}
    # Title, heading, summary, and the table's name, note, column and cell.
    assert made.text.count("onerror=alert(1)") == 7
    latents = json.loads(made.scripts[0])
    assert latents[0][4] == [[HOSTILE, 1.5]]
    assert latents[0][6][0][:3] == ["before " + HOSTILE, HOSTILE, HOSTILE + " after"]


def test_every_latent_is_in_the_page_and_none_is_drawn_before_it_is_seen(page: str) -> None:
    made = Elements(page)
    assert [r[0] for r in json.loads(made.scripts[0])] == list(range(500))
    assert "article" not in {t for t, _ in made.tags}


def test_json_in_a_script_has_nothing_that_could_end_it() -> None:
    text = script_json({"a": HOSTILE})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": HOSTILE}


def test_figures_are_shown_short_and_absent_ones_as_a_dash(page: str) -> None:
    text = Elements(page).text
    assert "0.25" in text
    assert "1,000,000" in text
    assert "0.123" in text
    assert "0.123456" not in text
    assert "–" in text


def test_the_histogram_counts_every_latent_on_a_log_scale() -> None:
    found = rate_histogram([1e-3, 1.1e-3, 0.02, 0.5, 1.0])
    assert sum(found["counts"]) == 5
    assert found["ticks"] == ["0.1 %", "1 %", "10 %", "100 %"]
    assert found["counts"][0] == found["most"] == 2
    assert found["counts"][-1] == 1
    assert sum(rate_histogram([])["counts"]) == 0
    assert sum(rate_histogram([0.01])["counts"]) == 1


def test_a_page_of_no_latents_is_a_page(tmp_path: Path) -> None:
    assert write_page([], tmp_path / "new" / "page.html", title="none", summary={}).is_file()


def drawn(page: Path, fragment: str = "") -> str:
    """What Chromium makes of a page."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900",
               "--virtual-time-budget=3000", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]  # fmt: skip
    done = subprocess.run([*command, page.as_uri() + fragment], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_traits_named_as_what_every_object_has_and_numbers_that_are_none_are_drawn(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    names = ["constructor", "__proto__", "toString", "moralizing"]
    made = [record(i) for i in range(2)]
    for i, name in enumerate(names, 2):
        made.append(replace(record(i), traits={name: TraitScore(0.7, 0.7, 0.7, 0.01)}))
    odd = FeatureRecord(
        6, nan, nan, inf, [("token", nan)], [("low", -inf)], [Context("a", "b", "c", nan)], [(0, nan)],
        {"moralizing": TraitScore(nan, nan, nan, nan)},
    )  # fmt: skip
    path = write_page([*made, odd], tmp_path / "page.html", title="t", summary={"a": nan, "b": inf})
    shown = drawn(path)
    elements = Elements(shown)
    assert [t for t, _ in elements.tags].count("article") == 7
    options = re.findall(r'<option value="([^"]*)"', shown)
    assert options[:5] == ["", "__proto__", "constructor", "moralizing", "toString"]
    assert shown.count('<div class="trait"') == 2 + len(names) + 1
    assert "NaN" not in elements.text
    assert "Infinity" not in elements.text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.parametrize(("fragment", "cards"), [("", 60), ("#f0", 2)])
def test_a_browser_draws_one_screen_of_cards_and_runs_no_text(
    page: str, tmp_path: Path, fragment: str, cards: int
) -> None:
    shown = drawn(tmp_path / "page.html", fragment)
    tags = [t for t, _ in Elements(shown).tags]
    assert tags.count("article") == cards
    assert "img" not in tags
    assert "<title>owned" not in shown
    if fragment:
        assert shown.count("onerror=alert(1)") > page.count("onerror=alert(1)")
