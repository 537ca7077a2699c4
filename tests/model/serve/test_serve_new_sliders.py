"""New sliders over the server: searched for beside it, polled, used at once; failures kept; off unless allowed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from serving import Served, served, until
from test_serve_errors import error
from tiny_chat import hooks_on
from tiny_parrot import save_parrot

from steer.finding.new_slider import NewSliderJob, failed_searches
from steer.model.steered import load
from steer.serve.server import Options

SLIDERS = "/v1/steering/sliders"
WANTED = {"sentence": 3 * "ta te ti to tu ", "opposite": 3 * "va ve vi vo vu ", "name": "ta"}
FOUND = 300
"""Seconds for a search: its process imports everything and loads the model."""


@pytest.fixture
def finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that allows searches, on a model that repeats its instruction."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    with served(load(save_parrot(tmp_path / "parrot")), Options(allow_find=True)) as server:
        yield server


def ended(server: Served, id: str) -> dict:
    assert until(lambda: server.get(f"{SLIDERS}/{id}").json()["status"] != "running", FOUND)
    return server.get(f"{SLIDERS}/{id}").json()


def test_nothing_is_searched_for_unless_the_server_allows_it(fresh):
    answer = error(fresh.post(SLIDERS, WANTED), 403)
    assert answer["code"] == "find_not_allowed"
    assert "--allow-find" in answer["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "sentence"),
        ({"sentence": " "}, "expected an instruction to the model"),
        ({"sentence": "be", "name": "../x"}, "expected a name of at most 64"),
        ({"sentence": "be", "name": "warmth"}, "no shipped trait has"),
        ({"sentence": "be", "opposite": "be"}, "expected opposite instructions"),
        ({"sentence": "x" * 2001}, "2000"),
        ({"sentence": "be", "site": 3}, "site"),
    ],
)
def test_what_is_no_slider_is_refused_before_anything_is_started(finding, body, says):
    assert says in error(finding.post(SLIDERS, body), 400)["message"]
    assert NewSliderJob.latest(finding.model) is None


@pytest.mark.slow
def test_a_slider_is_searched_for_polled_and_used_at_once(finding):
    model = finding.model
    before = finding.post("/v1/chat/completions", chat({})).json()["choices"][0]["message"]["content"]
    started = finding.post(SLIDERS, WANTED)
    assert started.status_code == 202
    assert (started.json()["status"], started.json()["name"]) == ("running", "ta")
    id = started.json()["id"]
    again = error(finding.post(SLIDERS, WANTED | {"name": "other"}), 409)
    assert "wait for it" in again["message"]
    seen = []
    assert until(lambda: seen.append(finding.get(f"{SLIDERS}/{id}").json()) or seen[-1]["status"] != "running", FOUND)
    assert (seen[-1]["status"], seen[-1]["error"], seen[-1]["progress"]) == ("done", None, 1.0)
    amounts = [s["progress"] for s in seen]
    assert amounts == sorted(amounts)
    assert len(set(amounts)) > 2
    found = seen[-1]
    assert found["auroc"] > 0.9
    assert found["verdict"]["says"]
    low, high = found["slider"]["range"]
    assert low <= 0 <= high
    assert found["slider"] in finding.get("/v1/steering").json()["sliders"]
    assert "no slider" in error(finding.post(SLIDERS, WANTED), 409)["message"]
    after = finding.post("/v1/chat/completions", chat({"ta": 8.0})).json()["choices"][0]["message"]["content"]
    assert after != before
    assert hooks_on(model) == 0


def chat(sliders: dict[str, float]) -> dict:
    said = [{"role": "user", "content": "hello"}]
    return {"messages": said, "temperature": 0, "max_tokens": 12, "steering": {"sliders": sliders}}


@pytest.mark.slow
def test_a_search_that_finds_nothing_says_why_and_is_kept_until_it_is_deleted(finding):
    wanted = {"sentence": "lie", "opposite": "truth", "name": "ta"}  # words that its replies hardly have
    found = ended(finding, finding.post(SLIDERS, wanted).json()["id"])
    assert (found["status"], found["slider"]) == ("failed", None)
    assert "expected replies that a classifier on words can learn from" in found["error"]
    (kept,) = failed_searches(finding.model)
    assert (kept.name, kept.sentence, kept.opposite) == ("ta", "lie", "truth")
    assert kept.error == found["error"]
    kept.delete()
    assert failed_searches(finding.model) == []


def test_a_search_can_be_cancelled_and_leaves_nothing(finding):
    id = finding.post(SLIDERS, WANTED).json()["id"]
    answer = httpx.delete(f"{finding.url}{SLIDERS}/{id}", timeout=60).json()
    assert (answer["status"], answer["error"]) == ("cancelled", "stopped; no slider was made")
    assert failed_searches(finding.model) == []
    assert "ta" not in finding.model.sliders.known()
    assert error(finding.get(f"{SLIDERS}/find-none"), 404)["code"] == "search_not_found"
