"""Checkpoints are read by their headers, and refused when they lie."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from steer.checkpoint.reader import INDEX, SINGLE, CheckpointFiles, Shard
from steer.errors import CheckpointError

TinyLlama = Callable[..., Path]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_llama: TinyLlama) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sharded"), tie=False, shards=True)


@pytest.fixture
def broken(tmp_path: Path, sharded: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_headers_say_what_safetensors_says(sharded: Path) -> None:
    files = CheckpointFiles.open(sharded)
    assert len(files.shards) > 2
    seen = 0
    for shard in files.shards:
        with safe_open(str(shard.path), framework="pt") as f:
            assert f.metadata() == shard.metadata
            for t in shard.tensors:
                tensor = f.get_tensor(t.name)
                assert tuple(tensor.shape) == t.shape
                assert files.read(t) == tensor.contiguous().view(torch.uint8).numpy().tobytes()
                seen += 1
    assert seen == len(files.tensors) == len(json.loads((sharded / INDEX).read_text())["weight_map"])


def _remove_shard(root: Path) -> None:
    next(root.glob("model-00002*")).unlink()


def _truncate(root: Path) -> None:
    shard = next(root.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-10])


def _truncate_to_nothing(root: Path) -> None:
    next(root.glob("model-00002*")).write_bytes(b"\x01")


def _append(root: Path) -> None:
    shard = next(root.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes() + b"x")


def _point(file: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = file
        (root / INDEX).write_text(json.dumps(index))

    return change


def _index(text: str) -> Callable[[Path], object]:
    return lambda root: (root / INDEX).write_text(text)


def _twice(root: Path) -> None:
    first, second = sorted(root.glob("model-0000*"))[:2]
    index = json.loads((root / INDEX).read_text())
    moved = {k: second.name if v == first.name else v for k, v in index["weight_map"].items()}
    (root / INDEX).write_text(json.dumps(index | {"weight_map": moved | {"x": first.name}}))
    shutil.copy(first, second)


def _pickled(root: Path) -> None:
    for path in (*root.glob("*.safetensors"), root / INDEX):
        path.unlink()
    (root / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def _no_weights(root: Path) -> None:
    _pickled(root)
    (root / "pytorch_model.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda root: (root / "config.json").unlink(),
            r"config\.json: expected a JSON object in a model directory, found none",
        ),
        (
            lambda root: (root / "config.json").write_text("{"),
            r"config\.json: expected a JSON object in a model directory, found no JSON",
        ),
        (lambda root: (root / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
        (_remove_shard, r"model-.*: expected a weights file, found none"),
        (_truncate, "expected a whole safetensors file, found .*file not fully covered"),
        (_truncate_to_nothing, "expected a whole safetensors file, found .*header too small"),
        (_append, "expected a whole safetensors file, found .*file not fully covered"),
        (_point("../elsewhere/model.safetensors"), "in the same directory, found '../elsewhere"),
        (_point("/etc/model.safetensors"), "in the same directory, found '/etc"),
        (_point("model.bin"), r"names of safetensors files .* found 'model\.bin'"),
        (_point("model-00001-of-00009.safetensors"), r"model-.*: expected a weights file, found none"),
        (_index("{}"), "expected a non-empty weight_map"),
        (_index('{"metadata": [1]}'), "expected numbers under metadata"),
        (_index('{"metadata": {"total_size": "14 GB"}}'), "expected numbers under total_size, found '14 GB'"),
        (_index("\x00"), "found no JSON"),
        (_twice, "is also in|expected x in"),
        (_pickled, r"found pytorch_model\.bin; only safetensors is loaded"),
        (_no_weights, "found no weights"),
    ],
)
def test_a_broken_checkpoint_is_one_line(broken: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(broken)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        CheckpointFiles.open(broken).tensors  # noqa: B018
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model directory, found none"):
        CheckpointFiles.open(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a model directory, found a file"):
        CheckpointFiles.open(tmp_path / "file")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{", b""),
        (b"[]", b""),
        (b"\xff\xfe", b""),
        ({"a": 3}, b""),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": _entry(0, 4, [1], "F31")}, b"0000"),
        ({"a": _entry(0, 8, [1])}, b"00000000"),
        ({"a": _entry(4, 8, [1])}, b"00000000"),
        ({"a": _entry(0, 4, [1]), "b": _entry(0, 4, [1])}, b"0000"),
        ({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, b"0" * 12),
        ({"a": _entry(0, 4, [-1])}, b"0000"),
        ({"a": _entry(-4, 0, [1])}, b""),
        ({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}, b"0000"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        ({"a": _entry(0, 4, [1])}, b"00"),
        ({"__metadata__": {"format": 1}, "a": _entry(0, 4, [1])}, b"0000"),
        ({"__metadata__": [1], "a": _entry(0, 4, [1])}, b"0000"),
        ({"a\ud800": _entry(0, 4, [1])}, b"0000"),
        (b'{"a":' + b"[" * 100_000, b""),
    ],
)
def test_a_lying_header_is_one_line(tmp_path: Path, header: object, data: bytes) -> None:
    path = _write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match="expected a whole safetensors file") as caught:
        Shard.open(path)
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header too large"):
        Shard.open(path)


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    root = tiny_llama(tmp_path / "single")
    (root / INDEX).write_text("stale")
    assert [s.name for s in CheckpointFiles.open(root).shards] == [SINGLE]


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys, steer.checkpoint.anatomy, steer.baking.rewrite, steer.checkpoint.quantised, steer.baking.verify;"
        "sys.exit(', '.join(m for m in ('torch', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
