"""Generations of tiny checkpoints: merged, measured, whole or absent, and the same bytes when they are built again."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import keep_direction
from tiny_family import recipe

from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.core.profile import Profile, ProfileSlider
from steer.errors import CheckpointError, MismatchError, OutputExistsError, SteerError, UsageError
from steer.lineage import building as module
from steer.lineage.building import PLAN, adopted, build, building, checkpoint, discard, finish, profile_of, start
from steer.lineage.lineage import Lineage, Move, Settings
from steer.lineage.proposing import Proposal

BOTH = (("dry", "adds much"), ("loud", "adds less"))


@pytest.fixture(autouse=True)
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests need no figures, which take longer than a merge."""
    monkeypatch.setattr(module, "PROBES", ())


def adds(family: Path, parent: str, *names: str) -> list[Proposal]:
    return [Proposal(parent, Move("add", str(family / name)), "a test") for name in names]


def begin(place: Path, family: Path, **keys: Any) -> Lineage:
    lineage = Lineage.create(place, Settings([]))
    with building(lineage):
        start(lineage, recipe(family, "base", "calm", **keys), "given")
    return lineage


@pytest.fixture(scope="module")
def begun(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage of a start and two children, one of them broken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROBES", ("capability",))
        lineage = begin(tmp_path_factory.mktemp("begun") / "lineage", family)
        with building(lineage):
            build(lineage, adds(family, "0", "dry", "broken"))
    return lineage.place


@pytest.fixture
def lineage(begun: Path, tmp_path: Path) -> Lineage:
    """A copy of it, which may be changed."""
    return Lineage(shutil.copytree(begun, tmp_path / "lineage"))


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_generation_holds_what_was_merged_from_what_and_measured(lineage: Lineage, family: Path) -> None:
    root, calm, broken = lineage.nodes.values()
    assert (root.gate and root.gate.figures.keys(), root.passed) == ({"capability"}, True)
    assert [m["model"] for m in calm.recipe["models"]] == [str(family / n) for n in ("base", "calm", "dry")]
    assert calm.inputs[str(family / "dry")]["0/model.safetensors"] == hash_file(family / "dry" / "model.safetensors")
    assert calm.weights == {"0/model.safetensors": hash_file(lineage.model("1a") / "model.safetensors")}
    assert not (lineage.place / PLAN).exists()
    assert broken.gate
    assert broken.weights


def test_a_child_that_lost_its_mind_does_not_pass(lineage: Lineage) -> None:
    _, calm, broken = lineage.nodes.values()
    assert calm.passed
    assert broken.gate is not None
    assert not broken.passed
    assert broken.gate.reasons[0].startswith("capability: perplexity 1")
    assert broken.gate.figures["capability"] > 1000


def test_a_merge_that_mergekit_fails_on_does_not_pass_and_its_siblings_do(
    lineage: Lineage, family: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    deep = tiny_llama(tmp_path / "deep", num_hidden_layers=2)
    proposals = [Proposal("1a", Move("add", str(deep)), "a test"), *adds(family, "1a", "loud")]
    with building(lineage):
        first, second = build(lineage, proposals).nodes
    assert first.gate
    assert "same number of layers" in first.gate.reasons[0]
    assert second.passed
    with pytest.raises(UsageError, match="expected one that could be merged"):
        checkpoint(lineage, first.id)


def test_a_discarded_checkpoint_is_made_again_with_the_same_bytes(family: Path, tmp_path: Path) -> None:
    dare = {"merge_method": "dare_linear", "base_model": str(family / "wry"), "parameters": {"density": 0.5}}
    lineage = begin(tmp_path / "lineage", family, **dare)  # a method that drops weights at random
    torch.manual_seed(5)
    before = (lineage.model("0") / "model.safetensors").read_bytes()
    discard(lineage, [])
    assert names_in(lineage.place / "models") == []
    assert (checkpoint(lineage, "0") / "model.safetensors").read_bytes() == before
    stamp = lineage.model("0").stat().st_mtime_ns
    checkpoint(lineage, "0")
    assert lineage.model("0").stat().st_mtime_ns == stamp
    assert torch.initial_seed() == 5  # a merge draws random numbers from a separate generator


def test_a_model_that_changed_since_is_named_and_no_checkpoint_is_left(family: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(family, tmp_path / "models")
    lineage = begin(tmp_path / "lineage", copy)
    discard(lineage, [])
    file = copy / "calm" / "model.safetensors"
    save_file({n: t * 1.5 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(MismatchError, match=r"node 0: .*models/calm: 0/model.safetensors has changed since"):
            checkpoint(lineage, "0")
        assert not lineage.model("0").exists()


def test_a_checkpoint_of_other_weights_is_not_taken_for_the_node_s(lineage: Lineage) -> None:
    shutil.rmtree(lineage.model("1a"))
    shutil.copytree(lineage.model("1b"), lineage.model("1a"))
    expected = lineage.node("1a").weights["0/model.safetensors"]
    assert hash_file(checkpoint(lineage, "1a") / "model.safetensors") == expected


def test_discarding_leaves_what_is_kept_and_removes_what_a_kill_left(lineage: Lineage) -> None:
    models = lineage.place / "models"
    lineage.model("1b").rename(models / ".1b")  # a kill while it was removed
    discard(lineage, ["0", "1a"])
    assert names_in(models) == ["0", "0.yml", "1a", "1a.yml"]


def test_two_processes_do_not_build_at_once(lineage: Lineage) -> None:
    taken = pytest.raises(OutputExistsError, match="being built by another process")
    with building(lineage), taken, building(Lineage(lineage.place)):
        pass
    with building(lineage):  # and it is free again
        pass


def test_a_disk_without_room_is_reported_before_the_merge_and_nothing_is_lost(
    lineage: Lineage, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(lineage.place)
    with monkeypatch.context() as patch, building(lineage):
        patch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
        with pytest.raises(SteerError, match=r"expected 0\.0 GB free for the merge of 2a, found 0\.0"):
            build(lineage, adds(family, "1a", "loud"))
    assert not lineage.model("2a").exists()
    with building(lineage):
        done = finish(lineage)
    assert done is not None
    assert [n.id for n in done.nodes] == ["2a"]


def test_a_model_that_is_gone_stops_the_generation_which_goes_on_when_it_is_back(family: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(family, tmp_path / "models")
    lineage = begin(tmp_path / "lineage", copy)
    (copy / "dry").rename(copy / "away")
    with building(lineage), pytest.raises(CheckpointError, match=r"1a\.yml: names a model that is not there"):
        build(lineage, adds(copy, "0", "dry"))
    assert len(lineage.generations) == 1
    (copy / "away").rename(copy / "dry")
    with building(lineage):
        assert finish(lineage) is not None
        assert finish(lineage) is None
    assert len(lineage.generations) == 2


def test_a_plan_whose_generation_was_written_is_dropped(lineage: Lineage) -> None:
    written = (lineage.place / "generations" / "0001.json").read_text()
    (lineage.place / PLAN).write_text(written)
    with building(lineage):
        assert finish(lineage) is None
    assert not (lineage.place / PLAN).exists()


def test_moves_that_the_parent_does_not_allow_are_refused_before_a_merge(lineage: Lineage, family: Path) -> None:
    with building(lineage), pytest.raises(UsageError, match="found one of its models"):
        build(lineage, adds(family, "1a", "loud", "calm"))
    with building(lineage), pytest.raises(UsageError, match="expected 1 to 26 children, found 0"):
        build(lineage, [])
    assert not (lineage.place / PLAN).exists()


def test_sliders_are_inherited_and_measured(
    lineage: Lineage, family: Path, make_direction: Callable[..., Direction], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "PROBES", ("capability",))
    keep_direction(lineage.model("1a"), make_direction("moral"))
    profile = Profile("far", sliders=(ProfileSlider("moral", 200.0), ProfileSlider("moral", 1.0, enabled=False)))
    carried = adopted(lineage, profile, "1a")
    (slider,) = carried["sliders"]
    assert (lineage.place / slider["slider"]).is_file()
    with building(lineage):
        (far,) = build(lineage, [Proposal("1a", Move("profile", profile=carried), "by hand")]).nodes
    # The slider is far too far, so the gate sees it, although the weights are those of the parent.
    assert far.weights == lineage.node("1a").weights
    assert far.gate is not None
    assert not far.passed
    with building(lineage):
        (heir,) = build(lineage, adds(family, far.id, "loud")).nodes
    moved = Lineage(shutil.move(lineage.place, tmp_path / "elsewhere"))
    inherited = profile_of(moved, moved.node(heir.id))
    assert inherited is not None
    assert inherited.sliders[0].amount == 200.0
    assert (tmp_path / "elsewhere" / inherited.sliders[0].slider).is_file()


@pytest.mark.slow
def test_the_gate_asks_all_its_probes(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", ("capability", "prose", "positions"))
    lineage = begin(tmp_path / "lineage", family)
    with building(lineage):
        (calm,) = build(lineage, adds(family, "0", "dry")).nodes
    assert calm.gate is not None
    assert calm.passed
    assert calm.gate.figures.keys() == {"capability", "prose", "positions"}


# Killed at any moment


def _build_and_die(place: Path, raw: dict[str, Any], proposals: list[Proposal], at: int, steps: Any) -> None:
    """Build in a child that kills itself at its `at`-th touch of a file of the lineage; report the touches."""
    torch.set_num_threads(1)
    module.PROBES = ("capability",)
    count = 0

    def touched(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if writes and str(arguments[0]).startswith(str(place)):
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(touched)
    lineage = Lineage(place)
    with building(lineage):
        if finish(lineage) is None and not lineage.generations:
            start(lineage, raw, "given")
        if len(lineage.generations) == 1:
            build(lineage, proposals)
        discard(lineage, ["0", "1a"])
    steps.put(count)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_with_what_is_done(
    family: Path, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    steps, raw, proposals = forkserver.Queue(), recipe(family, "base", "calm"), adds(family, "0", "dry", "loud")

    def run(place: Path, at: int) -> int | None:
        if not place.exists():
            Lineage.create(place, Settings([]))
        child = forkserver.Process(target=_build_and_die, args=(place, raw, proposals, at, steps))
        child.start()
        child.join(120)
        return child.exitcode

    assert run(tmp_path / "whole", -1) == 0
    total, expected = steps.get(timeout=10), Lineage(tmp_path / "whole").generations
    place = tmp_path / "killed"
    # One lineage, killed again and again, each time later; then others, each killed once.
    for at in (total // 9, total // 5):
        assert run(place, at) == -signal.SIGKILL
        assert len(Lineage(place).generations) <= 2
    assert run(place, -1) == 0
    assert Lineage(place).generations == expected
    assert names_in(place / "models") == ["0", "0.yml", "1a", "1a.yml"]
    for at in (total // 2, total - 2):
        place = tmp_path / f"killed-{at}"
        assert run(place, at) == -signal.SIGKILL
        kept = {
            f: f.stat().st_mtime_ns for f in (place / "models").glob("*/model.safetensors") if ".steer-" not in str(f)
        }
        assert run(place, -1) == 0
        assert Lineage(place).generations == expected
        # What was merged before is not merged again.
        assert {f: f.stat().st_mtime_ns for f in kept if f.exists()}.items() <= kept.items()
        assert names_in(place) == names_in(tmp_path / "whole")
