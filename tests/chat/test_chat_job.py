"""Work in a separate process: the real command, its progress, its end, and what stays when it is stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from steer.chat.jobs import get_default, plan, ready
from steer.checkpoint.shipped import RECIPE
from steer.core.slider import Slider
from steer.errors import OutputExistsError, SteerError
from steer.jobs import Job


@pytest.fixture
def file(moral, tmp_path) -> Path:
    return moral.save(tmp_path / "moral.safetensors")


@pytest.mark.slow
def test_a_bake_is_done_elsewhere_and_brings_its_result(checkpoint, file, tmp_path):
    out = tmp_path / "baked"
    size = (checkpoint / "model.safetensors").stat().st_size
    job = Job(["bake", str(checkpoint), str(out), "--ablate", str(file), "--json"], out=out, expected=size)
    assert job.running
    assert job.progress == 0.0
    assert job.wait(120)
    assert (job.done, job.error, job.progress) == (True, None, 1.0)
    assert job.result["checkpoint"] == str(out)
    assert (out / "steer_certificate.json").is_file()


@pytest.mark.slow
def test_a_mistake_is_one_line(checkpoint, tmp_path):
    job = Job(["bake", str(checkpoint), str(tmp_path / "out"), "--ablate", "nothing.safetensors", "--json"])
    assert job.wait(120)
    assert (job.done, job.result) == (False, None)
    assert job.error.startswith("nothing.safetensors: expected a direction file")
    assert job.progress is None


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["front", "background"])
def test_stopped_it_leaves_nothing_behind(checkpoint, file, tmp_path, handler):
    out = tmp_path / "out" / "baked"
    before = signal.signal(signal.SIGINT, handler)
    try:
        job = Job(["bake", str(checkpoint), str(out), "--ablate", str(file), "--json"], out=out, expected=1)
    finally:
        signal.signal(signal.SIGINT, before)
    job.cancel()
    assert not job.running
    assert (job.done, job.cancelled, job.error) == (False, True, "stopped; nothing half-written was left")
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())
    job.cancel()


def test_the_default_merge_is_not_ready_before_it_is_made(home):
    assert RECIPE.is_file()
    assert not ready()


@pytest.mark.slow
@pytest.mark.model
def test_the_default_merge_is_made_with_its_progress_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("STEER_HOME")
    place = tmp_path / "merged"
    job, seen = get_default(place), []
    while job.running:
        seen.append(job.progress or 0.0)
        job.wait(0.2)
    assert job.error is None
    assert ready(place)
    assert [*seen, job.progress] == sorted([*seen, 1.0])
    assert {0.0, 1 / 3, 2 / 3} == set(seen)
    assert job.lines[-1].startswith("3 of 3: ")


@pytest.mark.slow
def test_what_can_be_baked_is_said_before_and_done_after(chat, tmp_path):
    chat.panel.set("moral", -0.25)
    bake = plan(chat.model, chat.profile("baked"))
    assert (bake.possible, bake.why) == (True, None)
    assert [(v.slider, v.operation, v.ok) for v in bake.verdicts] == [("moral", "add", True)]
    job = bake.start(tmp_path / "out")
    assert job.wait(120)
    assert job.error is None
    assert job.certificate["edit"]["add"][0]["amount"] == -0.25
    with pytest.raises(OutputExistsError):
        bake.start(tmp_path / "out")


def test_what_cannot_be_baked_is_named_and_can_be_left_out(chat, tmp_path):
    assert "move one first" in plan(chat.model, chat.profile("baked")).why
    target = chat.sliders.slider("moral").target
    chat.sliders.put(Slider(target, "clamp", label="moral:clamp"), 0.5)
    chat.panel.set("moral", -0.25)
    bake = plan(chat.model, chat.profile("baked"))
    assert not bake.possible
    assert "moral:clamp" in bake.why
    with pytest.raises(SteerError, match="moral:clamp"):
        bake.start(tmp_path / "out")
    rest = bake.without_refused()
    assert rest.possible
    assert [s.amount for s in rest.profile.sliders] == [-0.25]


@pytest.mark.slow
def test_an_adapter_is_baked_as_well(chat, tmp_path):
    chat.panel.reshape("moral", "ablate")
    chat.panel.set("moral", 1.0)
    job = plan(chat.model, chat.profile("baked"), "adapter").start(tmp_path / "out")
    assert job.wait(120)
    assert job.error is None
    assert (tmp_path / "out" / "adapter_config.json").is_file()
