"""Outputs changed and certified anew: everybody can compute a hash, so `verify` computes what it can itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer.errors import CheckpointError, UsageError
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.weights.bake import bake
from steer.weights.certify import CERTIFICATE, _digest, verify
from steer.weights.control_vector import bake_control_vector
from steer.weights.staging import hash_file
from steer.weights.stream import SINGLE

Body = dict[str, Any]
O_PROJ, Q_PROJ = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def forge(out: Path, change: Callable[[Body], object], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Put tensors in, change the certificate, and make every hash right again."""
    if tensors:
        save_file(load_file(out / SINGLE) | tensors, out / SINGLE, metadata={"format": "pt"})
    body = json.loads((out / CERTIFICATE).read_text())
    body.pop("sha256")
    body["files"] = {name: hash_file(out / name) for name in body["files"]}
    change(body)
    (out / CERTIFICATE).write_text(json.dumps(body | {"sha256": _digest(body)}))
    return out


@pytest.fixture
def out(baked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(baked, tmp_path / "copy"))


def every(key: str, value: object) -> Callable[[Body], object]:
    return lambda body: [proof.update({key: value}) for proof in body["writers"]]


def test_what_is_forged_back_to_what_it_was_passes(out: Path, source: Path) -> None:
    checks = verify(forge(out, lambda body: None), source=source)
    assert checks[-1].name == "source"


FORGERIES: dict[str, tuple[Callable[[Body], object], str]] = {
    "no proofs": (lambda b: b.update(writers=[]), "writers"),
    "a proof taken out": (lambda b: b["writers"].pop(3), "writers"),
    "a proof twice": (lambda b: b["writers"].append(b["writers"][0]), "writers"),
    "another strength": (every("strength", 0.5), "writers"),
    "another axis": (every("axis", 1), "writers"),
    "another dtype": (every("dtype", "F16"), "writers"),
    "a norm made up": (every("norm", 1e12), "puts"),
    "a norm of nan": (every("norm", float("nan")), "puts"),
    "before is infinite": (every("before", float("inf")), "puts"),
    "writers found": (lambda b: b.update(writers_found=999), "writers_found"),
    "least strength": (lambda b: b.update(strength=0.3), "strength"),
    "an edit of nothing": (lambda b: b["edit"].update(ablate=[]), "edit"),
    "an architecture": (lambda b: b.update(architecture="MistralForCausalLM"), "architecture"),
    "a direction elsewhere": (lambda b: b["directions"][0].update(file="../x"), "direction file"),
    "no directions": (lambda b: b.update(directions=[], edit={}), ""),
}


@pytest.mark.parametrize(("change", "sentence"), FORGERIES.values(), ids=FORGERIES)
def test_a_certificate_that_claims_what_the_files_do_not_show_is_found(
    out: Path, change: Callable[[Body], object], sentence: str
) -> None:
    with pytest.raises((CheckpointError, UsageError), match=sentence) as e:
        verify(forge(out, change))
    assert "\n" not in str(e.value)


def test_writers_put_back_are_found_whatever_the_certificate_says_of_them(out: Path, source: Path) -> None:
    whole = load_file(source / SINGLE)
    writers = {
        k: v for k, v in whole.items() if k.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
    }
    for name in ("before", "norm"):
        with pytest.raises(CheckpointError):
            verify(forge(out, every(name, 1e12), writers))
    with pytest.raises(CheckpointError, match="writers"):
        verify(forge(out, lambda b: b.update(writers=[]), writers))


def test_a_writer_of_nan_is_found(out: Path) -> None:
    nan = torch.full((32, 32), torch.nan, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="o_proj"):
        verify(forge(out, lambda b: None, {O_PROJ: nan}))


def test_a_tensor_that_the_edit_has_no_business_with_is_compared_with_the_source(out: Path, source: Path) -> None:
    zero = torch.zeros(32, 32, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is not what .* gives"):
        verify(forge(out, lambda b: None, {Q_PROJ: zero}), source=source)


def test_a_writer_replaced_by_another_without_the_direction_is_found_with_the_source(out: Path, source: Path) -> None:
    zero = torch.zeros(32, 32, dtype=torch.bfloat16)
    change = lambda b: [p.update(after=0.0, norm=0.0) for p in b["writers"] if p["tensor"] == O_PROJ]  # noqa: E731
    with pytest.raises(CheckpointError, match=f"{O_PROJ} is not what .* gives"):
        verify(forge(out, change, {O_PROJ: zero}), source=source)


def test_a_change_of_the_config_that_is_kept_quiet_is_found_with_the_source(out: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is not what"):
        verify(forge(out, lambda b: b.update(config={})), source=source)


def test_another_source_and_one_that_is_not_there_are_named(
    out: Path, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match="is not the file that"):
        verify(out, source=tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=5))
    with pytest.raises(CheckpointError, match="expected a model directory, found none"):
        verify(out, source=tmp_path / "nowhere")


def test_an_add_that_is_not_there_any_more_is_found(
    source: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    out = tmp_path / "out"
    bake(source, out, Edit(add=((make_direction(), -1.0),)))
    assert verify(out, source=source)[-1].name == "source"
    with pytest.raises(CheckpointError, match="biases"):
        verify(forge(out, lambda b: b.update(biases=[])))


def test_a_source_beside_a_control_vector_is_refused(
    source: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    bake_control_vector(source, tmp_path / "cv", Edit(add=((make_direction(), 1.0),)))
    with pytest.raises(UsageError, match="--source: expected none"):
        verify(tmp_path / "cv", source=source)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1], {"a": 1}, [[]], [{"a": 1}]])
def test_contents_of_the_wrong_kind_are_one_line(out: Path, value: object) -> None:
    body = json.loads((out / CERTIFICATE).read_text())
    whole = (out / CERTIFICATE).read_text()
    for key in body.keys() - {"sha256", "versions", "command", "source", "left_out", "source_files"}:
        if value == body[key] or (not value and not body[key]) or (key, value) == ("config", {}):
            continue
        with pytest.raises((CheckpointError, UsageError)) as e:
            verify(forge(out, lambda b, key=key: b.update({key: value})))
        assert "\n" not in str(e.value), key
        (out / CERTIFICATE).write_text(whole)
