"""`steer kin` as people type it: the table, JSON, the page, and what a mistake says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command, command_here
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat

from steer.checkpoint.kin import kin


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a base and three tunes of it, one with a name that is no name in HTML or TeX, and a
    recipe."""
    base = load_file(save_tiny_chat(tiny_llama, tmp_path / "base") / "model.safetensors")
    models = ("calm", "<b>$\\frac{x$", "brisk")
    for seed, name in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        shutil.copytree(tmp_path / "base", tmp_path / name)
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    lines = "".join(f"  - model: '{name}'\n" for name in models)
    (tmp_path / "stock.yml").write_text(f"merge_method: model_stock\nbase_model: base\nmodels:\n{lines}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def steer(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return command_here(monkeypatch, capfd)


def test_the_command_prints_the_figures_of_a_recipe_and_writes_a_page(steer: Command, folder: Path) -> None:
    done = steer("kin", "stock.yml", "--out", "kin.html")
    assert done.code == 0, done.err
    assert done.out.startswith("model ")
    assert "Left of each difference in the merge (model_stock): calm " in done.out
    assert done.out.endswith("kin.html\n")
    page = (folder / "kin.html").read_text()
    assert page.count("<svg") == 6  # heat map, tree, three models, t
    assert not re.search(r"(?:src|href)=\"?http", page)
    assert "<b>$" not in page
    assert "&lt;b&gt;$\\frac{x$" in page
    for sentence in kin("stock.yml").sentences():
        assert sentence.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in page


def test_json_holds_every_figure(steer: Command, folder: Path) -> None:
    done = steer("kin", "calm", "brisk", "--base", "base", "--json")
    found = kin("calm", "brisk", base="base")
    assert done.result == {"mismatches": [], **found.as_json()}
    assert done.result["cosines"][0][1] == found.cosine("calm", "brisk")
    assert [m["norm"] for m in done.result["models"]] == list(found.norms)


def test_one_model_has_a_page_too(steer: Command, folder: Path) -> None:
    assert steer("kin", "calm", "--base", "base", "--out", "one.html").code == 0
    assert (folder / "one.html").read_text().count("<svg") == 1


def test_what_does_not_fit_is_printed_first_and_is_in_the_page(steer: Command, folder: Path) -> None:
    file = folder / "brisk" / "model.safetensors"
    tensors = load_file(file)
    rows = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"model.embed_tokens.weight": torch.cat([rows, rows[:2]])}, file, metadata={"format": "pt"})
    done = steer("kin", "calm", "brisk", "--base", "base", "--out", "kin.html")
    assert done.code == 0
    assert f"brisk: has a vocabulary of {len(rows) + 2} rows, the base {len(rows)}; mergekit stops" in done.err
    assert "What does not fit" in (folder / "kin.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calm", "brisk"], "--base: expected the model that these are tunes of, found none"),
        (["base", "--base", "base"], "expected a model beside the base"),
        (["gone", "--base", "base"], "gone: expected a checkpoint directory"),
        (["gone.yml"], "gone.yml"),
    ],
)
def test_a_mistake_is_one_line(steer: Command, folder: Path, arguments: list[str], said: str) -> None:
    done = steer("kin", *arguments)
    assert done.code in (1, 2)
    assert done.err.startswith("steer: ")
    assert said in done.err
    assert done.err.count("\n") == 1
