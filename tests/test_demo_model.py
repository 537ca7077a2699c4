"""`steer demo --model`: the whole line on tiny checkpoints of the user's own, with a merge by a recipe and without."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_chat import WORDS
from tiny_parrot import ARCHITECTURES, save_parrot

from steer.baking.certificate import Certificate
from steer.baking.verify import verify
from steer.checkpoint.library import direction_place
from steer.checkpoint.sketch import sketch_files
from steer.cli.main import main
from steer.core import trait
from steer.errors import CheckpointError, OutputExistsError, SteerError, UnsupportedError, UsageError
from steer.verbs import demo
from steer.verbs.demo import run
from steer.verbs.tables import demo_table

TOPICS = [" ".join(WORDS[(5 * i + j) % 40] for j in range(3)) + f" {i}" for i in range(24)]


def write_traits(folder: Path, **words: tuple[str, str]) -> None:
    """Write small files in place of the shipped ones: traits that are said by (words with it, words without)."""
    folder.mkdir()
    prompts = {"fit": TOPICS[:8], "held_out": TOPICS[8:18]}
    for name, (with_, without) in words.items():
        said = {"name": name, "summary": name, "with": with_, "without": without, "markers": with_.split()}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(said | prompts))
    (folder / "neutral.yaml").write_text(yaml.safe_dump({"fit": TOPICS[::3], "held_out": TOPICS[1::3]}))


MORAL, EAGER = (3 * "ta te ti to tu ", 3 * "va ve vi vo vu "), (3 * "sa se si so su ", 3 * "ra re ri ro ru ")
SAME = (3 * "ta te ti to tu ", 3 * "tu to ti te ta ")
"""Instructions that are one to a model that does not see the order of words."""


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home, traits of 18 topics, and an evaluation of one probe."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    write_traits(tmp_path / "traits", moralizing=MORAL, compliance=EAGER)
    monkeypatch.setattr(trait, "FOLDER", tmp_path / "traits")
    monkeypatch.setattr(demo, "PROBES", ("capability",))


def check(result: dict[str, Any], source: Path, name: str) -> None:
    """Check what every demo of a model of the user's own leaves behind."""
    assert result["source"] == str(source)
    assert result["model"] == name
    assert set(result["found"]) == {"moralizing", "compliance"}
    assert result["missing"] == {}
    assert result["bake"]["trait"] == "moralizing"
    rates = {p["amount"]: p["probability"] for p in result["dose"]["moralizing"] if p["amount"] is not None}
    assert rates[-2] < rates[0] < rates[2], rates
    assert result["bake"]["after"]["probability"] <= result["bake"]["before"]["probability"]
    assert result["bake"]["writers_edited"] > 0
    baked = Path(result["baked"])
    assert [c.name for c in verify(baked, source=source)][: len(result["bake"]["verified"])]
    assert Certificate.load(baked).source == source.name
    assert Certificate.load(baked).command == result["command"] == f"steer demo --model {name}"
    for found in result["found"]:
        assert direction_place(sketch_files(source), found).is_file()
    page = Path(result["report"]).read_text()
    assert page.count("<svg") == 7
    assert f"<code>steer demo --model {name}</code>" in page
    for foreign in ("smollm2", "Default merge", str(source.parent)):
        assert foreign not in page
        assert foreign not in (baked / "README.md").read_text()
    report = Path(result["eval"]["report"])
    evaluated = json.loads((report.parent / "eval.json").read_text())
    assert [a["name"] for a in evaluated["arms"]] == [source.name, "moralizing=-1", "baked"]
    assert all(part["skipped"] is None for probe in evaluated["probes"] for part in probe["arms"].values())
    assert page.count('<a href="eval/eval.html">') == 1
    assert report == Path(result["report"]).parent / "eval" / "eval.html"
    assert "capability" in page
    assert str(source.parent) not in report.read_text()
    table = demo_table(result)
    assert all(f"baked: {line}\n" in table for line in result["eval"]["verdicts"]["baked"])
    assert table.splitlines()[-3].split() == ["merged:" if "merged" in result else "model:", str(source)]


@pytest.mark.parametrize(
    "architecture", [a if a == "Llama" else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_a_checkpoint_of_ones_own_goes_the_whole_way(architecture: str, tmp_path: Path) -> None:
    source, out, said = save_parrot(tmp_path / "mine", architecture), tmp_path / "out", []
    files = {p.name: p.read_bytes() for p in source.iterdir()}
    result = run(out, str(source), say=said.append)
    check(result, source, "mine")
    assert "Checkpoint mine." in Path(result["report"]).read_text()
    assert "merged" not in result
    assert not {"fetch", "merge"} & set(result["seconds"])
    assert {p.name: p.read_bytes() for p in source.iterdir()} == files
    # The same again measures nothing, and another model is refused with everything in its place.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(out, str(source)) == result
    other = save_parrot(tmp_path / "other", seed=1)
    for model, named in ((str(other), str(other)), (None, "the default model")):
        with pytest.raises(OutputExistsError, match=re.escape(f"{source}; name another --out")) as refused:
            run(out, model, fresh=True)
        assert f"the demo of {named}, found the demo of {source}" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.slow
def test_a_recipe_is_merged_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        save_parrot(tmp_path / name)
    recipe = tmp_path / "mix.yml"
    parts = [{"model": n, "parameters": {"weight": 0.5}} for n in ("a", "b")]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": parts, "dtype": "float32"}))
    result = run(tmp_path / "out", str(recipe))
    assert result["merged"] == result["source"]
    check(result, tmp_path / "out" / "merged", "mix.yml")
    assert "Merge by the recipe mix.yml." in Path(result["report"]).read_text()
    assert run(tmp_path / "out", str(recipe)) == result

    def merging(*_: object) -> None:
        raise SteerError("merges again")

    save_parrot(tmp_path / "b", seed=1)
    monkeypatch.setattr(demo, "merge", merging)
    with pytest.raises(SteerError, match="merges again"):  # as a source has changed
        run(tmp_path / "out", str(recipe))


@pytest.mark.slow
def test_an_evaluation_that_is_there_is_not_measured_again_but_one_of_another_seed_is(tmp_path: Path) -> None:
    source, out = save_parrot(tmp_path / "mine"), tmp_path / "out"
    first = run(out, str(source))
    parts = {p: p.stat().st_mtime_ns for p in (out / "eval" / "parts").iterdir()}
    (out / "results.json").unlink()  # as if it had been killed at the end
    again = run(out, str(source))
    assert {p: p.stat().st_mtime_ns for p in parts} == parts
    assert again["eval"] == first["eval"]
    run(out, str(source), seed=1)
    assert json.loads((out / "eval" / "eval.json").read_text())["seed"] == 1
    Path(again["eval"]["report"]).unlink()
    assert Path(run(out, str(source), seed=1)["eval"]["report"]).is_file()


def test_a_trait_that_the_model_does_not_show_is_one_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "traits")
    write_traits(tmp_path / "traits", moralizing=SAME, compliance=EAGER)
    said: list[str] = []
    result = run(tmp_path / "out", str(save_parrot(tmp_path / "mine")), say=said.append)
    assert set(result["found"]) == {"compliance"}
    assert result["bake"]["trait"] == "compliance"
    line = result["missing"]["moralizing"]
    assert re.fullmatch(r"trait 'moralizing': expected replies that differ .* AUROC of 0\.\d+ on 20 held-out .*", line)
    assert f"moralizing is left out: {line}" in said
    assert f"moralizing is left out: {line}\n" in demo_table(result)
    page = Path(result["report"]).read_text()
    assert "<p>moralizing is left out: trait &#39;moralizing&#39;: expected replies" in page
    assert "<h2>Baked without compliance</h2>" in page
    assert not (tmp_path / "out" / "directions" / "moralizing.safetensors").exists()


def test_a_model_that_shows_no_trait_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mute = save_parrot(tmp_path / "mute", eos_token_id=list(range(77)))
    monkeypatch.setattr(sys, "argv", ["steer", "demo", "--model", str(mute), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("steer: mute: found none of the traits; trait 'moralizing': expected replies to the topics")
    assert "trait 'compliance': " in last
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "results.json").exists()


def test_models_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, out = save_parrot(tmp_path / "mine"), tmp_path / "out"
    broken = tmp_path / "broken.yml"
    broken.write_text("merge_method: none\n")
    for model, error in (
        (tmp_path / "absent", CheckpointError), (tmp_path / "absent.yml", SteerError), (broken, SteerError),
        (tmp_path, CheckpointError),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(str(model))) as refused:
            run(out, str(model))
        assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="outside the model"):
        run(source / "out", str(source))
    assert not out.exists()
    assert not (source / "out").exists()


def test_a_directory_with_other_files_is_not_written_into(tmp_path: Path) -> None:
    """A demo of the default model has no mark: neither it nor anything else is taken for a demo of this model."""
    source, out = save_parrot(tmp_path / "mine"), tmp_path / "out"
    (out / "merged").mkdir(parents=True)
    (out / "results.json").write_text(json.dumps({"key": {}}))
    with pytest.raises(OutputExistsError, match="found other files; name another --out"):
        run(out, str(source), fresh=True)
    assert (out / "results.json").read_text() == '{"key": {}}'
    assert sorted(p.name for p in out.iterdir()) == ["merged", "results.json"]


def test_a_checkpoint_that_cannot_be_baked_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    source = save_parrot(tmp_path / "mine")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.another.weight"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=re.escape(str(source))):
        run(tmp_path / "out", str(source))
    assert not (tmp_path / "out" / "directions").exists()


def test_a_package_that_a_checkpoint_needs_is_named(tmp_path: Path, change_config: Callable[..., None]) -> None:
    source = save_parrot(tmp_path / "mine")
    change_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"transformers cannot load it: .*pip install optimum"):
        run(tmp_path / "out", str(source))
