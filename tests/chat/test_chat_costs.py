"""What a profile or a bake cost, measured by the real command: its progress, its verdict, and who finds it again."""

from __future__ import annotations

import json

import pytest

from steer.baking.certificate import CERTIFICATE
from steer.chat import costs
from steer.chat.costs import bake_cost, costs_of
from steer.chat.jobs import plan
from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.page.parts.cost import sliders_cost


@pytest.fixture(autouse=True)
def one_probe(monkeypatch):
    monkeypatch.setattr(costs, "PROBES", ("capability",))


def test_sliders_that_move_nothing_and_folders_that_are_no_bake_are_refused(chat, tmp_path, home):
    with pytest.raises(UsageError, match="found none; move one first"):
        sliders_cost(chat, "")
    with pytest.raises(CheckpointError, match="expected a bake"):
        bake_cost(chat.model, tmp_path)
    (tmp_path / CERTIFICATE).write_text("{}")
    with pytest.raises(UnsupportedError, match="found another form; bake a checkpoint"):
        bake_cost(chat.model, tmp_path)
    assert costs_of(chat.model) == []
    assert not (home / "costs").exists()


def test_other_sliders_another_bake_and_another_name_are_kept_apart(chat, tmp_path):
    chat.panel.set("moral", -0.25)
    one, named = sliders_cost(chat, ""), sliders_cost(chat, "noir")
    assert sliders_cost(chat, "") == one
    chat.panel.set("moral", -0.5)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / CERTIFICATE).write_text("{}")
    bake = bake_cost(chat.model, tmp_path)
    (tmp_path / CERTIFICATE).write_text("{ }")
    costs = [one, named, sliders_cost(chat, ""), bake, bake_cost(chat.model, tmp_path)]
    assert len({c.folder for c in costs}) == 5
    assert (one.job, one.report, one.lines) == (None, None, [])


@pytest.mark.slow
def test_one_is_measured_at_a_time_found_by_another_tab_and_done(new_chat, tmp_path):
    chat = new_chat()
    chat.panel.set("moral", -0.25)
    cost = sliders_cost(chat, "noir")
    job = cost.start()
    assert cost.start() is job
    chat.panel.set("moral", -0.5)
    with pytest.raises(UsageError, match="wait for it, or cancel it"):
        sliders_cost(chat, "").start()
    (found,) = costs_of(new_chat().model)
    assert (found, found.job, found.name) == (cost, job, "noir")
    seen = []
    while job.running:
        seen.append(job.progress or 0.0)
        job.wait(0.2)
    assert job.error is None
    assert [*seen, job.progress] == sorted([*seen, 1.0])
    assert found.lines
    assert found.report is not None
    assert "<h2>In words</h2>" in found.report.read_text()
    arms = json.loads((found.report.parent / "eval.json").read_text())["arms"]
    assert [a["name"] for a in arms][1:] == ["noir"]


@pytest.mark.slow
def test_what_a_bake_cost_is_measured_beside_its_model_and_a_stop_keeps_what_is_done(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "PROBES", ("capability", "consequences", "positions"))  # there is much left after one
    chat.panel.set("moral", -0.25)
    bake = plan(chat.model, chat.profile("baked")).start(tmp_path / "calm")
    assert bake.wait(120)
    cost = bake_cost(chat.model, tmp_path / "calm")
    stopped = cost.start()
    while stopped.running and not stopped.progress:  # its first lines may be notices
        stopped.wait(0.1)
    stopped.cancel()
    assert stopped.error == "stopped; what was measured is kept, and the next start goes on from there"
    done = {f: f.stat().st_mtime_ns for f in cost.folder.rglob("parts/*")}
    job = cost.start()
    assert job is not stopped
    assert job.wait(300)
    assert job.error is None
    assert cost.lines
    assert [c.name for c in costs_of(chat.model)] == ["calm"]
    parts = {f: f.stat().st_mtime_ns for f in cost.folder.rglob("parts/*")}
    assert 0 < len(done) < len(parts)
    assert done.items() <= parts.items(), "nothing is measured twice"
    assert cost.start().wait(300)
    assert {f: f.stat().st_mtime_ns for f in cost.folder.rglob("parts/*")} == parts, "nothing is measured twice"
    assert cost.start(fresh=True).wait(300)
    assert all(f.stat().st_mtime_ns > parts[f] for f in parts)
