"""Code that comes with a checkpoint, a data set or an adapter never runs, and nothing asks whether it may."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from tiny_chat import save_tiny_chat

from steer.baking.bake import bake
from steer.checkpoint.merge import merge
from steer.checkpoint.sketch import sketch_files
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import SteerError
from steer.measure.endpoint import tokenizer_of
from steer.measure.search.held_out import load_exported
from steer.model.steered import load
from steer.sae.documents import documents

CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once code of a stranger has run, or something was asked on stdin."""
    mark = tmp_path / "ran"

    def asked(*args: object) -> str:
        mark.write_text("asked")
        return "y"

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return mark


def plant(folder: Path, mark: Path, model_type: str | None = None) -> Path:
    """Give a checkpoint remote code, for whatever transformers could take from it; by `model_type`, one that
    transformers does not know."""
    code = f"open({str(mark)!r}, 'w').write('ran')\nclass Evil: pass\ndef generate(*a, **k): pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(CLASSES, "evil.Evil")
    config |= {"model_type": model_type} if model_type else {}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def planted(tmp_path: Path, tiny_llama: Callable[..., Path], mark: Path) -> Path:
    """A checkpoint of a known kind with remote code."""
    return plant(save_tiny_chat(tiny_llama, tmp_path / "m", dtype=torch.float32), mark)


def _recipe(tmp_path: Path, *models: str) -> Path:
    text = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in models],
        "dtype": "float32",
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(text))
    return tmp_path / "merge.yml"


def _adapter(source: Path, out: Path, edit: Edit) -> Path:
    """An adapter for a checkpoint, with code that its config names as a checkpoint's would."""
    bake(source, out, edit, "adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    config["auto_map"] = dict.fromkeys(CLASSES, "evil.Evil")
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    (out / "evil.py").write_text((source / "evil.py").read_text())
    return out


def test_a_planted_mark_is_found_where_code_may_run(planted: Path, mark: Path) -> None:
    from transformers import AutoConfig

    config = json.loads((planted / "config.json").read_text())
    (planted / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(Exception, match=r"Evil|evil"):
        AutoConfig.from_pretrained(planted, trust_remote_code=True)
    assert mark.exists()


def test_loading_a_known_kind_runs_none_of_its_code(planted: Path, mark: Path) -> None:
    model = load(planted)
    model.hf.generate(torch.tensor([[1, 7]]), max_new_tokens=2)
    assert not mark.exists()


def test_loading_an_unknown_kind_is_one_line(planted: Path, mark: Path) -> None:
    config = json.loads((planted / "config.json").read_text())
    (planted / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(SteerError) as e:
        load(planted)
    assert "\n" not in str(e.value)
    assert not mark.exists()


def test_reading_a_tokenizer_for_a_server_runs_no_code(planted: Path, mark: Path) -> None:
    for file, entries in (
        ("config.json", {"model_type": "evil"}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}),
    ):
        (planted / file).write_text(json.dumps(json.loads((planted / file).read_text()) | entries))
    with suppress(SteerError):
        tokenizer_of(str(planted))
    assert not mark.exists()


def test_bakes_and_sketches_run_no_code(
    planted: Path, mark: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    edit = Edit(ablate=(make_direction(),))
    sketch_files(planted)
    bake(planted, tmp_path / "out", edit)
    load_exported(_adapter(planted, tmp_path / "adapter", edit), planted)
    load_exported(tmp_path / "out", planted)
    assert not mark.exists()


@pytest.mark.parametrize(("model_type", "adapter"), [(None, True), ("evil", False)])
def test_a_merge_runs_no_code(
    tmp_path: Path,
    tiny_llama: Callable[..., Path],
    mark: Path,
    make_direction: Callable[..., Direction],
    model_type: str | None,
    adapter: bool,
) -> None:
    for n, name in enumerate("ab"):
        folder = save_tiny_chat(tiny_llama, tmp_path / name, dtype=torch.float32, tie=False, seed=n)
        plant(folder, mark, None)
    _adapter(tmp_path / "a", tmp_path / "tune", Edit(ablate=(make_direction(),), blocks=(0, 2)))
    if model_type:
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    recipe = _recipe(tmp_path, "b", "a+tune" if adapter else "a")
    if model_type:
        with pytest.raises(SteerError) as e:
            merge(recipe, tmp_path / "out")
        assert "\n" not in str(e.value)
    else:
        merge(recipe, tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["texts.py", "texts/texts.py"])
def test_a_data_set_with_a_script_runs_no_code(
    planted: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"open({str(mark)!r}, 'w').write('ran')\n")
    with suppress(SteerError):  # a script that stands for itself is read as text
        list(documents(load(planted), str(file if name == "texts.py" else file.parent), context=16))
    assert not mark.exists()
