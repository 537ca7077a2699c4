"""`steer evolve` from the command line: start, next, add, show, best, export, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command, Outcome, command_here
from safetensors.torch import load_file
from tiny_chat import keep_direction
from tiny_family import recipe, written

from steer.checkpoint.merge import merge
from steer.core.direction import Direction
from steer.lineage import building
from steer.lineage.lineage import Lineage

STOCK: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": n, "parameters": {"weight": 0.5}} for n in ("calm", "dry")],
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PROBES", ())


@pytest.fixture
def steer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return command_here(monkeypatch, capfd)


@pytest.fixture
def models(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the family with a recipe of relative paths beside it, and the working directory above."""
    copy = shutil.copytree(family, tmp_path / "models")
    written(copy / "start.yml", STOCK)
    monkeypatch.chdir(tmp_path)
    return copy


def choose(place: str, winner: str, *others: str, times: int = 4) -> None:
    for other in others * times:
        Lineage(place).vote(
            winner, other, "a", chat=[("user", "Hello?")], replies=["Hi.", "No."], left="a", voter="kim"
        )


def begin(steer: Command, *options: str) -> Outcome:
    pool = ("--pool", "models/loud", "models/warm")
    done = steer("evolve", "models/start.yml", "lineage", *pool, "--children", 2, *options)
    assert done.code == 0, done.err
    return done


def test_a_lineage_grows_by_votes_and_its_export_merges_to_the_same_bytes(models: Path, steer: Command) -> None:
    begun = begin(steer, "--json").result
    assert [n["id"] for n in begun["nodes"]] == ["0", "1a", "1b"]
    assert all("is new beside" in n["why"] for n in begun["nodes"][1:])
    choose("lineage", "1a", "0", "1b")
    grown = steer("evolve", "next", "lineage", "--json").result
    assert {n["parent"] for n in grown["nodes"][3:]} == {"1a"}
    on_disk = {p.name for p in (models.parent / "lineage" / "models").iterdir() if p.is_dir()}
    assert on_disk == set(grown["race"]) == {"1a", "2a", "2b"}

    shown = steer("evolve", "show", "lineage", "--html", "tree.html")
    assert shown.code == 0
    assert "└── 1b" in shown.out
    page = Path("tree.html").read_text()
    assert "base_model: base" in page
    assert str(models) not in page  # nobody else has this machine's folders
    assert "1a is the best" in shown.out or "1a leads" in shown.out
    best = steer("evolve", "best", "lineage")
    assert yaml.safe_load(best.out)["base_model"] == "base"

    exported = steer("evolve", "export", "lineage", "out", "--json").result
    assert (exported["node"], exported["checkpoint"]) == ("1a", None)
    plain = yaml.safe_load(Path("out/recipe.yml").read_text())
    assert plain == yaml.safe_load(best.out)
    assert {m["model"] for m in plain["models"]} <= {"calm", "dry", "loud", "warm", "base"}
    assert str(models) not in Path("out/README.md").read_text()
    shutil.copy("out/recipe.yml", models / "best.yml")
    made = merge(models / "best.yml", Path("again")) / "model.safetensors"
    assert made.read_bytes() == (Path("lineage/models/1a") / "model.safetensors").read_bytes()


def test_a_child_by_hand_joins_the_newest_generation(models: Path, steer: Command) -> None:
    begin(steer)
    added = steer("evolve", "add", "lineage", "models/wry", "--json").result
    assert (added["nodes"][-1]["id"], added["nodes"][-1]["parent"], added["nodes"][-1]["why"]) == ("2a", "0", "by hand")
    assert added["race"] == ["0", "1a", "1b", "2a"]
    assert "wry" in added["pool"]
    weighed = steer("evolve", "add", "lineage", "--weight", "calm=0.75", "--json").result
    assert weighed["nodes"][-1]["move"] == "weight of calm 0.75"
    method = ("--method", "ties", "--parameter", "density=0.5")
    assert (
        steer("evolve", "add", "lineage", *method, "--json").result["nodes"][-1]["move"]
        == "merge by ties (density 0.5)"
    )
    before = len(Lineage("lineage").nodes)
    for arguments, words in (
        (["models/wry"], "found that of node 2a"),
        (["--remove", "loud"], "expected one of calm, dry, found loud"),
        (["models/nowhere"], "add: "),
        ([], "expected one of a model, --remove"),
        (["models/loud", "--remove", "calm"], "found a model and --remove"),
        (["--weight", "calm"], "expected NAME=VALUE"),
        (["--weight", "calm=lots"], "expected a number as weight, found 'lots'"),
        (["--weight", "calm=[1]"], "expected a finite number, found [1]"),
        (["--method", "magic"], "expected one of"),
        (["--parameter", "x"], "expected NAME=VALUE"),
        (["--parameter", "x=1", "--remove", "calm"], "expected --method beside it"),
        (["models/loud", "--parent", "9z"], "expected a node, one of 0, 1a"),
        (["--profile", "none"], "expected a change"),
    ):
        refused = steer("evolve", "add", "lineage", *arguments)
        assert refused.code in (1, 2)
        assert words in refused.err
        assert refused.err.count("\n") == 1, refused.err
    assert len(Lineage("lineage").nodes) == before


def test_sliders_are_carried_exported_and_baked(
    models: Path, steer: Command, make_direction: Callable[..., Direction]
) -> None:
    begin(steer)
    keep_direction(Path("lineage/models/0"), make_direction("moral"))
    Path("calm.yaml").write_text("name: calm\nsliders: [{slider: moral, amount: 0.5}]\n")
    carried = steer("evolve", "add", "lineage", "--profile", "calm.yaml", "--json").result["nodes"][-1]
    assert (carried["move"], carried["profile"]) == ("carry the profile calm", "calm")
    done = steer("evolve", "export", "lineage", "out", "--node", carried["id"], "--bake")
    assert done.code == 0, done.err
    profile = yaml.safe_load(Path("out/profile.yaml").read_text())
    assert (Path("out") / profile["sliders"][0]["slider"]).is_file()
    assert "profile calm" in Path("out/README.md").read_text()
    weights = load_file("out/checkpoint/model.safetensors")
    assert weights.keys() > load_file(f"lineage/models/{carried['id']}/model.safetensors").keys()  # a bias


@pytest.mark.parametrize("with_sliders", [False, True])
def test_no_file_of_an_export_names_a_folder_of_this_machine(
    models: Path, steer: Command, make_direction: Callable[..., Direction], with_sliders: bool
) -> None:
    written(models / "start.yml", {**STOCK, "tokenizer": {"source": "calm"}})
    begin(steer)
    if with_sliders:
        keep_direction(Path("lineage/models/0"), make_direction("moral"))
        Path("calm.yaml").write_text("name: calm\nsliders: [{slider: moral, amount: 0.5}]\n")
        steer("evolve", "add", "lineage", "--profile", "calm.yaml")
    done = steer("evolve", "export", "lineage", "out", "--node", "2a" if with_sliders else "1a", "--bake")
    assert done.code == 0, done.err
    assert yaml.safe_load(Path("out/recipe.yml").read_text())["tokenizer"] == {"source": "calm"}
    files = [file for file in Path("out").rglob("*") if file.is_file()]
    assert "mergekit_config.yml" in {file.name for file in files}
    assert [file for file in files if str(models.parent).encode() in file.read_bytes()] == []


def test_it_refuses_in_one_line(models: Path, steer: Command) -> None:
    written(
        models / "slices.yml",
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "calm", "layer_range": [0, 2]}]}]},
    )
    (models / "adapter").mkdir()
    (models / "adapter" / "adapter_config.json").write_text("{}")
    for arguments, words in (
        (["models/none.yml", "lineage"], "expected a mergekit recipe, found none"),
        (["models/slices.yml", "lineage"], "expected a recipe with models, found slices"),
        (["models/start.yml", "models"], "expected a new or empty directory"),
        (["models/start.yml", "lineage", "--pool", "models/none"], "--pool: "),
        (["models/start.yml", "lineage", "--pool", "models/adapter"], "found an adapter; write BASE+models/adapter"),
        (["next", "lineage"], "expected the settings of a lineage, found none"),
        (["best", "models"], "expected the settings of a lineage, found none"),
    ):
        refused = steer("evolve", *arguments)
        assert refused.code in (1, 2)
        assert words in refused.err
        assert refused.err.count("\n") == 1, refused.err
    assert not Path("lineage").exists()


def test_the_next_generation_needs_votes_on_this_one_or_a_parent(models: Path, steer: Command) -> None:
    begin(steer)
    refused = steer("evolve", "next", "lineage")
    assert (refused.code, "expected votes on 1a, 1b, found none" in refused.err) == (2, True)
    grown = steer("evolve", "next", "lineage", "--parent", "1b", "--json").result
    assert {n["parent"] for n in grown["nodes"][3:]} == {"1b"}
    choose("lineage", "0", "1a", "1b")  # nothing on the second generation
    assert "expected votes on 2a, 2b" in steer("evolve", "next", "lineage").err


def test_the_start_again_goes_on_and_another_one_is_refused(models: Path, steer: Command) -> None:
    begin(steer)
    generations = Lineage("lineage").generations
    begin(steer)
    assert Lineage("lineage").generations == generations
    other = written(models / "other.yml", {**STOCK, "models": STOCK["models"][:1]})
    assert "expected the lineage of this recipe" in steer("evolve", other, "lineage").err
    assert "found dry besides" in steer("evolve", "models/start.yml", "lineage", "--pool", "models/dry").err
    file = models.parent / "lineage" / "generations" / "0001.json"
    file.write_text(json.dumps({"number": 1, "nodes": [{"id": "1a"}]}))
    broken = steer("evolve", "show", "lineage")
    assert broken.code == 1
    assert "0001.json: nodes[0]: move: expected a value" in broken.err


def test_a_lineage_whose_children_all_failed_goes_on_from_their_parent(models: Path, steer: Command) -> None:
    begin(steer)
    file = models.parent / "lineage" / "generations" / "0001.json"
    raw = json.loads(file.read_text())
    for node in raw["nodes"]:
        node["gate"] = {"passed": False, "figures": {}, "reasons": ["capability: perplexity 13 -> 900"]}
    file.write_text(json.dumps(raw))
    assert "1a did not pass: capability: perplexity 13 -> 900" in steer("evolve", "show", "lineage").out
    assert {n["parent"] for n in steer("evolve", "next", "lineage", "--json").result["nodes"][1:]} == {"0"}
    assert "found one that did not" in steer("evolve", "next", "lineage", "--parent", "1a").err


@pytest.mark.slow
def test_a_real_process_that_is_killed_goes_on(models: Path, steer: Command) -> None:
    command = [str(Path(sys.executable).with_name("steer")), "evolve", "models/start.yml", "lineage",
               "--pool", "models/loud", "--pool", "models/warm", "--children", "2"]  # fmt: skip
    for seconds_after in (0, 2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (Path("lineage") / "building.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(seconds_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    begin(steer)
    assert [n.id for n in Lineage("lineage").nodes.values()] == ["0", "1a", "1b"]
    assert not (Path("lineage") / "building.json").exists()


def test_linear_recipes_without_a_base_are_evolved_too(family: Path, tmp_path: Path, steer: Command) -> None:
    start = written(tmp_path / "start.yml", recipe(family, "calm", "dry"))
    grown = steer("evolve", start, tmp_path / "lineage", "--pool", family / "loud", "--children", 2, "--json").result
    assert [n["why"] for n in grown["nodes"][1:]] == ["not tried yet"] * 2
