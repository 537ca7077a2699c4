"""A control vector says what is added and where, to the gguf package, and to us again; to llama.cpp: test_llama_cpp."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from forging import certify_again
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import CONTROL_VECTOR as FILE
from steer.baking.control_vector import load_control_vector, write_control_vector
from steer.baking.verify import verify
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import CheckpointError, SteerError, UnsupportedError, UsageError

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]


@pytest.fixture(scope="module")
def edit(make_direction: MakeDirection) -> Edit:
    one, other = make_direction(), make_direction("b", site=2, seed=8)
    return Edit(add=((one, -1.5), (other, 2.0), (one.at(2), 0.5)))


@pytest.fixture(scope="module")
def written(source: Path, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`edit` as a control vector for `source`. Not to be changed."""
    out = tmp_path_factory.mktemp("vector") / "out"
    bake(source, out, edit, "gguf", command="steer bake source out --as gguf")
    return out


def test_the_gguf_package_reads_what_is_added_after_each_block(written: Path, edit: Edit) -> None:
    reader = gguf.GGUFReader(written / FILE)
    fields = {name: reader.get_field(name) for name in reader.fields}
    assert {k: f.contents() for k, f in fields.items() if f and not k.startswith("GGUF.")} == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.2"]
    for site, shift in edit.biases().items():
        tensor = tensors[f"direction.{site}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.from_numpy(np.array(tensor.data)), shift.float())


def test_it_comes_back_as_directions_that_add_the_same_at_amount_one(written: Path, edit: Edit) -> None:
    found = load_control_vector(written / FILE)
    assert list(found) == [1, 2]
    for site, shift in edit.biases().items():
        direction = found[site]
        assert (direction.site, direction.name) == (site, f"control_vector-{site}")
        assert (direction.gap * direction.vector.double() - shift).norm() < 1e-6 * shift.norm()
        assert math.isnan(direction.share(1))
        assert direction.provenance["model_hint"] == "llama"


def test_directions_that_were_imported_bake_like_any_other(written: Path, source: Path, tmp_path: Path) -> None:
    found = load_control_vector(written / FILE)
    edit = Edit(add=tuple((d, 1.0) for d in found.values()))
    bake(source, tmp_path / "again", edit, "gguf")
    first, again = (gguf.GGUFReader(p / FILE).tensors for p in (written, tmp_path / "again"))
    for one, other in zip(first, again, strict=True):
        assert one.name == other.name
        assert np.allclose(one.data, other.data, rtol=1e-6, atol=1e-6)


def test_only_adds_after_block_one_and_on_can_be_in_it(
    source: Path, tmp_path: Path, make_direction: MakeDirection
) -> None:
    first, other = make_direction("early", site=0), make_direction("gone")
    with pytest.raises(UnsupportedError) as caught:
        bake(source, tmp_path / "out", Edit(ablate=(other,), add=((first, 1.0), (other, 1.0))), "gguf")
    message = str(caught.value)
    assert "1 of 3 sliders cannot be baked" in message
    assert "'early' (add): llama.cpp adds control vectors after layers 1 and on" in message
    assert not (tmp_path / "out").exists()


def test_adds_that_cancel_are_no_control_vector(source: Path, tmp_path: Path, make_direction: MakeDirection) -> None:
    one = make_direction()
    with pytest.raises(UsageError, match="adds that cancel each other"):
        bake(source, tmp_path / "out", Edit(add=((one, 1.0), (one, -1.0))), "gguf")


def test_verify_repeats_the_sum_and_finds_one_flipped_bit(written: Path, tmp_path: Path) -> None:
    assert [c.name for c in verify(written)] == ["certificate", "sha256", "contents", "add"]
    out = Path(shutil.copytree(written, tmp_path / "out"))
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        intact = path.read_bytes()
        for at in (0, len(intact) // 2, len(intact) - 1):
            path.write_bytes(intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :])
            with pytest.raises(CheckpointError):
                verify(out)
        path.write_bytes(intact)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v | {3: v[1]}, r"tensor direction\.3 was not expected"),
        (lambda v: {2: v[2]}, r"tensor direction\.1 is missing"),
        (lambda v: v | {1: v[1] * 1.001}, r"direction\.1 is not what the directions beside it add up to"),
        (lambda v: {site: x[:-1] for site, x in v.items()}, r"tensor direction\.1 is F32 \[31\], expected"),
        (lambda v: v | {1: v[1] * torch.nan}, "where 1-d finite fp32"),
    ],
)
def test_what_is_no_longer_the_certified_vector_fails_even_when_its_hash_is_forged(
    written: Path,
    edit: Edit,
    tmp_path: Path,
    change: Callable[[dict[int, Tensor]], dict[int, Tensor]],
    sentence: str,
) -> None:
    out = Path(shutil.copytree(written, tmp_path / "out"))
    (out / FILE).unlink()
    write_control_vector(out / FILE, change({s: v.float() for s, v in sorted(edit.biases().items())}), "llama")
    certify_again(out)
    with pytest.raises(CheckpointError, match=sentence):
        verify(out)


def test_two_runs_write_the_same_bytes(source: Path, written: Path, edit: Edit, tmp_path: Path) -> None:
    bake(source, tmp_path / "out", edit, "gguf")
    assert (tmp_path / "out" / FILE).read_bytes() == (written / FILE).read_bytes()


def _other_architecture(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("direction.1", np.ones(4, np.float32))
    _close(writer)


def _layer_zero(path: Path) -> None:
    write_control_vector(path, {0: torch.ones(4)}, "llama")


def _half(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.1", np.ones(4, np.float16))
    _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "expected a control vector in a GGUF file, found none"),
        (lambda path: path.write_bytes(b"GGUF no more"), "something unreadable"),
        (_other_architecture, "one of architecture llama"),
        (_layer_zero, r"tensor direction\.0"),
        (_half, r"direction\.1, F16 \[4\]"),
        (lambda path: write_control_vector(path, {1: torch.zeros(4)}, "llama"), "no direction in it"),
        (lambda path: write_control_vector(path, {1: torch.ones(4), 2: torch.ones(3)}, "llama"), "several widths"),
    ],
)
def test_a_file_that_is_no_control_vector_is_one_line(
    tmp_path: Path, make: Callable[[Path], object], sentence: str
) -> None:
    make(tmp_path / "v.gguf")
    with pytest.raises(SteerError, match=sentence) as caught:
        load_control_vector(tmp_path / "v.gguf")
    assert "\n" not in str(caught.value)
