"""Shards pass through byte for byte but for what is changed, within their memory, and notice a source that moves."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer.baking import rewrite
from steer.baking.rewrite import Rewrite, rewrite_shards
from steer.checkpoint.reader import Buffer, CheckpointFiles, DecodedTensor, NewTensor, Shard, TensorInfo
from steer.checkpoint.staging import hash_file
from steer.errors import CheckpointError


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors take many pieces, and the room is soon used up."""
    monkeypatch.setattr(rewrite, "CHUNK", 512)
    monkeypatch.setattr(rewrite, "ROOM", 2048)


@pytest.fixture
def sharded(tmp_path: Path, tiny_llama: Callable[..., Path]) -> CheckpointFiles:
    return CheckpointFiles.open(tiny_llama(tmp_path / "sharded", tie=False, shards=True))


def _save(path: Path, **tensors: torch.Tensor) -> Shard:
    save_file(tensors, path, metadata={"format": "pt"})
    return Shard.open(path)


def _one(job: Rewrite, counts: Sequence[Callable[[int], None]] = ()) -> Rewrite:
    (done,) = rewrite_shards([job], *counts)
    return done


def _negate(data: memoryview) -> None:
    torch.frombuffer(data, dtype=torch.bfloat16).neg_()


def test_nothing_changed_gives_the_same_files(sharded: CheckpointFiles, tmp_path: Path) -> None:
    jobs = [Rewrite(s, tmp_path / f"copy-{s.name}") for s in sharded.shards]
    done = list(rewrite_shards(jobs))
    assert [d.shard for d in done] == list(sharded.shards)
    for job, d in zip(jobs, done, strict=True):
        assert job.target.read_bytes() == job.shard.path.read_bytes()
        assert d.read == d.written == hash_file(job.shard.path)


def test_changes_and_additions_leave_the_rest_and_stay_aligned(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(30, 50, dtype=torch.float64),
        "b": torch.randn(7, 99).bfloat16(),
        "c": torch.tensor([True, False, True]),
        "d": torch.randn(900).bfloat16(),
        "none": torch.zeros(0),
    }
    shard = _save(tmp_path / "in.safetensors", **tensors)
    b = next(t for t in shard.tensors if t.name == "b")
    new = (
        NewTensor("n", "F32", (2,), torch.tensor([1.0, 2.0]).numpy().tobytes()),
        NewTensor("twin", b.dtype, b.shape, b),
    )
    counts: list[int] = []
    done = _one(Rewrite(shard, tmp_path / "out.safetensors", {"b": _negate}, new), [counts.append])
    got = load_file(tmp_path / "out.safetensors")
    want = tensors | {"b": -tensors["b"], "n": torch.tensor([1.0, 2.0]), "twin": tensors["b"]}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    rewritten = Shard.open(tmp_path / "out.safetensors")
    assert rewritten.metadata == {"format": "pt"}
    assert all(t.start % (t.nbytes // max(1, len(got[t.name].flatten())) or 1) == 0 for t in rewritten.tensors)
    assert (done.read, done.written) == (hash_file(shard.path), hash_file(rewritten.path))
    assert sum(counts) == sum(t.nbytes for t in rewritten.tensors)


def test_decoded_tensors_grow_and_what_is_left_out_still_counts_as_read(tmp_path: Path) -> None:
    small = torch.arange(-100, 100, dtype=torch.int8)
    shard = _save(tmp_path / "in.safetensors", a=torch.randn(400), b=small, c=torch.ones(300), d=torch.ones(3))

    def decoded(t: TensorInfo) -> TensorInfo:
        def wide(data: Buffer, out: Buffer) -> None:
            torch.frombuffer(out, dtype=torch.bfloat16).copy_(torch.frombuffer(data, dtype=torch.int8))

        return DecodedTensor(t.name, "BF16", t.shape, t.file, t.start, t, wide) if t.name == "b" else t

    kept = tuple(decoded(t) for t in shard.tensors if t.name not in ("c", "d"))
    view = Shard(shard.path, shard.header, shard.metadata, kept, shard.size, shard.mtime_ns)
    b = next(t for t in kept if t.name == "b")
    new = (NewTensor("twin", "BF16", b.shape, b),)
    for change, sign in (({}, 1), ({"b": _negate}, -1)):
        target = tmp_path / f"out{sign}.safetensors"
        done = _one(Rewrite(view, target, change, new))
        got = load_file(target)
        assert got.keys() == {"a", "b", "twin"}
        assert torch.equal(got["a"], load_file(shard.path)["a"])
        assert torch.equal(got["b"], sign * small.bfloat16())
        assert torch.equal(got["twin"], small.bfloat16())
        assert (done.read, done.written) == (hash_file(shard.path), hash_file(target))


def test_many_shards_of_many_sizes_with_random_changes(tmp_path: Path) -> None:
    rng, jobs, wanted = random.Random(0), [], []
    for n in range(12):
        tensors = {f"t{n}.{i}": torch.randn(rng.randrange(1, 3000)).bfloat16() for i in range(rng.randrange(1, 9))}
        changed = {name for name in tensors if rng.random() < 0.4}
        shard = _save(tmp_path / f"in{n}.safetensors", **tensors)
        jobs.append(Rewrite(shard, tmp_path / f"out{n}.safetensors", dict.fromkeys(changed, _negate)))
        wanted.append({k: -v if k in changed else v for k, v in tensors.items()})
    for job, done, want in zip(jobs, rewrite_shards(jobs), wanted, strict=True):
        got = load_file(job.target)
        assert all(torch.equal(got[k], want[k]) for k in want)
        assert (done.read, done.written) == (hash_file(job.shard.path), hash_file(job.target))


def test_memory_on_its_way_never_overlaps_and_is_all_used() -> None:
    rng, ring, taken = random.Random(0), rewrite._Ring(1000), deque[memoryview]()
    fullest = 0
    for n in range(5000):
        if (memory := ring.take(rng.choice((1, 64, 300, 999)) if n % 100 else 1000)) is not None:
            memory[:] = bytes([n % 251]) * len(memory)
            taken.append(memory)
        else:
            oldest = taken.popleft()
            assert len(set(oldest)) == 1  # as it was written, by one
            ring.give()
        fullest = max(fullest, sum(map(len, taken)))
    assert fullest == 1000


MEMORY = """
import sys
from pathlib import Path
import torch
from steer.baking import rewrite
from steer.checkpoint.reader import Shard

def kilobytes(key):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))

def run(names):
    shard = Shard.open(Path(sys.argv[1]))
    def negate(data):
        torch.frombuffer(data, dtype=torch.bfloat16).neg_()

    change = dict.fromkeys(names, negate)
    list(rewrite.rewrite_shards([rewrite.Rewrite(shard, Path(sys.argv[2]), change)]))
    Path(sys.argv[2]).unlink()

torch.set_num_threads(1)
rewrite.ROOM = 8 << 20
run(["tiny"])
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
before = kilobytes("VmRSS")
run([f"t{n}" for n in range(12)] + ["big"])
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_memory_stays_near_the_largest_edited_tensor(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.zeros(5 << 20, dtype=torch.bfloat16) for n in range(12)}
    tensors |= {"big": torch.zeros(16 << 20, dtype=torch.bfloat16), "tiny": torch.zeros(9, dtype=torch.bfloat16)}
    _save(tmp_path / "in.safetensors", **tensors)
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    megabytes = int(done.stdout) / 1024
    assert 24 < megabytes < 32 + 8 + 6  # of 152 in all; what an earlier run left in the heap serves again


def test_a_source_that_changes_while_read_is_noticed(sharded: CheckpointFiles, tmp_path: Path) -> None:
    shard = sharded.shards[0]
    shard.path.touch()
    with pytest.raises(CheckpointError, match="changed while it was read"):
        _one(Rewrite(shard, tmp_path / "copy"))


def test_a_source_that_changes_in_the_midst_is_noticed(sharded: CheckpointFiles, tmp_path: Path) -> None:
    shard = max(sharded.shards, key=lambda s: s.size)
    counts: list[int] = []

    def change(n: int) -> None:
        if not counts:
            with open(shard.path, "r+b") as f:
                f.seek(-1, 2)
                f.write(b"\x55")
        counts.append(n)

    with pytest.raises(CheckpointError, match="changed while it was read"):
        _one(Rewrite(shard, tmp_path / "copy"), [change])


def test_a_shard_that_shrinks_after_its_header_was_read_is_noticed(sharded: CheckpointFiles, tmp_path: Path) -> None:
    shard = sharded.shards[0]
    shard.path.write_bytes(shard.path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="though its header describes more") as caught:
        _one(Rewrite(shard, tmp_path / "copy"))
    assert str(shard.path) in str(caught.value)


@pytest.mark.parametrize("where", ["change", "advance", "consumer"])
def test_an_error_anywhere_ends_the_threads_and_closes_the_files(
    sharded: CheckpointFiles, tmp_path: Path, where: str
) -> None:
    def fail(of: object) -> None:
        raise ValueError("on purpose")

    before = threading.active_count()
    jobs = [
        Rewrite(s, tmp_path / s.name, dict.fromkeys([t.name for t in s.tensors] if where == "change" else [], fail))
        for s in sharded.shards
    ]
    rewritten = rewrite_shards(jobs, fail) if where == "advance" else rewrite_shards(jobs)
    if where == "consumer":
        next(rewritten)
        rewritten.close()
    else:
        with pytest.raises(ValueError, match="on purpose"):
            next(rewritten)
    assert threading.active_count() == before
    assert not [p for p in _open_files() if str(tmp_path) in p]


def _open_files() -> list[str]:
    return [str(p.resolve()) for p in Path("/proc/self/fd").iterdir()]
