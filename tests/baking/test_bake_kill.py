"""Killed at any moment, a bake leaves its output absent or whole, and the next one goes on to the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.baking import adapter
from steer.baking.bake import bake
from steer.baking.certificate import Form
from steer.baking.journal import JOURNAL, Journal, fingerprint
from steer.baking.verify import verify
from steer.checkpoint import staging
from steer.core.edit import Edit

COMMAND = "steer bake source out --ablate moral"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    """A checkpoint of many shards, with a side file. Not to be changed."""
    root = tiny_llama(tmp_path_factory.mktemp("source"), shards=True, num_hidden_layers=12)
    (root / "tokenizer.json").write_text("{}")
    assert len(list(root.glob("*.safetensors"))) >= 15
    return root


@pytest.fixture(scope="module")
def whole(sharded: Path, ablation: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed bake makes of it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    bake(sharded, out, ablation, command=COMMAND)
    return out


def _write(form: Form, source: Path, out: Path, edit: Edit) -> None:
    # A file for every part of an adapter, where one would hold all of so small a model.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "GROUP", 1)
        bake(source, out, edit, form, command=COMMAND)


def _bake(source: Path, out: Path, edit: Edit, started: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(1)
    started.put(time.monotonic())
    bake(source, out, edit, command=COMMAND)


def _bake_and_die(
    source: Path, out: Path, edit: Edit, at: int, steps: multiprocessing.Queue[int], form: Form = "checkpoint"
) -> None:
    """Kills itself at its `at`-th step, on whichever thread that is; reports the number of steps if it lives."""
    count = 0

    def step() -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def stepping(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            step()
            result = real(*args, **kwargs)
            step()
            return result

        return call

    torch.set_num_threads(1)
    os.fsync, os.rename = stepping(os.fsync), stepping(os.rename)  # type: ignore[assignment]
    staging.DirectFile.write = stepping(staging.DirectFile.write)  # type: ignore[method-assign]
    _write(form, source, out, edit)
    steps.put(count)


def _bake_and_die_after(source: Path, out: Path, edit: Edit, shards: int) -> None:
    """Kills itself once this many shards are on record."""
    torch.set_num_threads(1)
    real, left = Journal.record, iter(range(shards - 1, -1, -1))

    def record(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = record  # type: ignore[method-assign]
    bake(source, out, edit, command=COMMAND)


def _same(out: Path, whole: Path) -> None:
    """Byte for byte, no file more or less, and nothing beside it."""
    assert _contents(out) == _contents(whole)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def _contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _finished(out: Path) -> int:
    """Shards that a killed bake left for the next one."""
    journals = list(out.parent.glob(f".out.*/{JOURNAL}"))
    return len(journals[0].read_bytes().splitlines()) - 1 if journals else 0


@pytest.mark.slow
def test_killed_at_random_times_and_killed_again_the_output_is_absent_or_whole(
    sharded: Path, whole: Path, ablation: Edit, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    started = forkserver.Queue()

    def run(out: Path, seconds: float | None) -> float:
        child = forkserver.Process(target=_bake, args=(sharded, out, ablation, started))
        child.start()
        start = started.get(timeout=60)
        if seconds is not None:
            time.sleep(max(0.0, start + seconds - time.monotonic()))
            child.kill()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        return time.monotonic() - start

    duration = min(run(tmp_path / f"undisturbed{n}", None) for n in range(3))
    rng = random.Random(0)
    resumed = killed = n = 0
    # Until enough kills fell between the first shard and the last, wherever a busy machine puts those in time.
    while n < 60 and (n < 12 or killed < 10 or not resumed):
        out = tmp_path / str(n) / "out"
        out.parent.mkdir()
        n += 1
        # Again and again, each time somewhere else: what is finished only grows.
        before = 0
        for _ in range(rng.randrange(1, 4)):
            if out.exists():
                break
            run(out, rng.uniform(0, 1.1 * duration))
            killed += not out.exists()
            if not out.exists():
                assert _finished(out) >= before or not list(out.parent.glob(f".out.*/{JOURNAL}"))
                before = _finished(out)
        if not out.exists():
            resumed += before > 0
            bake(sharded, out, ablation, command=COMMAND)
        verify(out)
        _same(out, whole)
    assert killed >= 10
    assert resumed


@pytest.mark.slow
@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_killed_between_any_two_steps_the_output_is_absent_or_whole(
    sharded: Path, ablation: Edit, tmp_path: Path, forkserver: ForkServerContext, form: Form
) -> None:
    steps = forkserver.Queue()
    whole = tmp_path / "whole" / "out"
    _write(form, sharded, whole, ablation)

    def run(out: Path, at: int) -> int | None:
        child = forkserver.Process(target=_bake_and_die, args=(sharded, out, ablation, at, steps, form))
        child.start()
        child.join(60)
        return child.exitcode

    assert run(tmp_path / "undisturbed", -1) == 0
    count = steps.get(timeout=10)
    assert count > 50
    rename = range(count - 6, count)  # the last syncs, the rename, the sync of the parent
    present = resumed = 0
    for at in sorted({0, 1, *random.Random(1).sample(range(count), 12), *rename}):
        out = tmp_path / "killed" / "out"
        out.parent.mkdir()
        assert run(out, at) == -signal.SIGKILL
        if out.exists():
            present += 1
        else:
            resumed += _finished(out) > 0
            _write(form, sharded, out, ablation)
        verify(out)
        _same(out, whole)
        shutil.rmtree(out.parent)
    assert present > 0
    assert resumed > 0


def test_what_a_killed_adapter_had_read_is_not_read_again(
    sharded: Path, ablation: Edit, tmp_path: Path, forkserver: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = forkserver.Queue()
    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    out.parent.mkdir()
    _write("adapter", sharded, whole, ablation)
    child = forkserver.Process(
        target=_bake_and_die, args=(sharded, tmp_path / "steps" / "out", ablation, -1, steps, "adapter")
    )
    child.start()
    count = steps.get(timeout=60)
    # The last steps are the hashes' notes, the sync of what is written, and the rename.
    child = forkserver.Process(target=_bake_and_die, args=(sharded, out, ablation, count - 30, steps, "adapter"))
    child.start()
    child.join(60)
    (work,) = out.parent.iterdir()
    lines = [json.loads(line) for line in (work / JOURNAL).read_text().splitlines()[1:]]
    hashes = {line["file"] for line in lines if "written" not in line}
    assert len(lines) - len(hashes) == 25
    assert hashes
    made, read = [], []
    real_make, real_hash = adapter.AdapterPlan.tensors, adapter.hash_file
    monkeypatch.setattr(adapter.AdapterPlan, "tensors", lambda *a: made.append(a) or real_make(*a))
    monkeypatch.setattr(adapter, "hash_file", lambda path: read.append(path.name) or real_hash(path))
    _write("adapter", sharded, out, ablation)
    assert not made
    assert not hashes & set(read)
    _same(out, whole)


def test_what_a_killed_checkpoint_left_is_not_in_an_adapter(left: Left, sharded: Path, ablation: Edit) -> None:
    _write("adapter", sharded, left[0], ablation)
    verify(left[0])
    assert not set(left[2]) & set(_contents(left[0]))


@pytest.fixture
def left(
    sharded: Path, ablation: Edit, tmp_path: Path, forkserver: ForkServerContext
) -> tuple[Path, Path, dict[str, int]]:
    """(output, staging directory, finished shard -> when it was written) of a bake that was killed half way."""
    out = tmp_path / "left" / "out"
    out.parent.mkdir()
    child = forkserver.Process(target=_bake_and_die_after, args=(sharded, out, ablation, 6))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (work,) = out.parent.iterdir()
    lines = (work / JOURNAL).read_text().splitlines()[1:]
    assert len(lines) == 6
    return out, work, {name: (work / name).stat().st_mtime_ns for name in (json.loads(line)["file"] for line in lines)}


Left = tuple[Path, Path, dict[str, int]]


def _kept(left: Left) -> set[str]:
    """The shards of the output that the killed run had written."""
    out, _, times = left
    return {name for name, time in times.items() if (out / name).stat().st_mtime_ns == time}


def test_finished_shards_are_not_written_again(left: Left, sharded: Path, whole: Path, ablation: Edit) -> None:
    counts: list[tuple[int, int]] = []
    bake(sharded, left[0], ablation, command=COMMAND, progress=lambda done, total: counts.append((done, total)))
    assert _kept(left) == set(left[2])
    assert counts[-1][0] == counts[-1][1]
    _same(left[0], whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_finished_shard_that_is_no_longer_as_it_was_is_written_again(
    left: Left, sharded: Path, whole: Path, ablation: Edit, damage: str
) -> None:
    out, work, times = left
    victim = work / min(times)
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        os.truncate(victim, 100)
    else:
        victim.unlink()
    bake(sharded, out, ablation, command=COMMAND)
    assert _kept(left) == set(times) - {victim.name}
    _same(out, whole)


@pytest.mark.parametrize("torn", [b'{"file": "mod', b"\x00\x00\n", b"[]\n", b'{"file": "x"}\n'])
def test_a_journal_that_is_torn_costs_no_more_than_what_it_lost(
    left: Left, sharded: Path, whole: Path, ablation: Edit, torn: bytes
) -> None:
    out, work, times = left
    with open(work / JOURNAL, "ab") as f:
        f.write(torn)
    bake(sharded, out, ablation, command=COMMAND)
    assert _kept(left) == set(times)
    _same(out, whole)


def test_another_edit_or_a_source_that_changed_starts_anew(
    left: Left, sharded: Path, ablation: Edit, tmp_path: Path
) -> None:
    other = Edit(ablation.ablate, strength=0.5)
    bake(sharded, left[0], other, command=COMMAND)
    assert _kept(left) == set()
    bake(sharded, tmp_path / "again" / "out", other, command=COMMAND)
    _same(left[0], tmp_path / "again" / "out")


def test_a_source_that_was_touched_starts_anew(left: Left, sharded: Path, ablation: Edit, whole: Path) -> None:
    for shard in sharded.glob("*.safetensors"):
        shard.touch()
    bake(sharded, left[0], ablation, command=COMMAND)
    assert _kept(left) == set()
    _same(left[0], whole)


def test_fingerprints_differ_in_the_last_bit(ablation: Edit) -> None:
    (d,) = ablation.ablate
    vector = d.vector.clone()
    vector[3] += torch.finfo(torch.float32).eps * vector[3].abs()
    other = Edit((replace(d, vector=vector),))
    assert not torch.equal(other.ablate[0].vector, d.vector)
    same = Edit((replace(d, vector=d.vector.clone()),))
    assert fingerprint(ablation) != fingerprint(other)
    assert fingerprint(ablation) == fingerprint(same)
    distinct = [1, 1.0, True, "1", b"1", None, (), ((),), (1, (2, 3)), ((1, 2), 3), {"a": 1}, torch.ones(1)]
    assert len({fingerprint(value) for value in distinct}) == len(distinct)
