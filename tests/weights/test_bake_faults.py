"""Killed, out of disk, or refused: a bake leaves its output whole or absent, and says why."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer.errors import (
    CheckpointError,
    MismatchError,
    OutputExistsError,
    SteerError,
    UnsupportedError,
    UsageError,
)
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.weights import staging
from steer.weights.bake import bake
from steer.weights.certify import verify
from steer.weights.stream import INDEX, SINGLE

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]


def _bake_and_die(source: Path, out: Path, edit: Edit, at: int, events: multiprocessing.Queue[int]) -> None:
    """Bake in a child that kills itself at its `at`-th step; report the number of steps if it lives."""
    torch.set_num_threads(1)
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

    os.fsync, os.rename = stepping(os.fsync), stepping(os.rename)  # type: ignore[assignment]
    staging.HashingFile.write = stepping(staging.HashingFile.write)  # type: ignore[method-assign]
    bake(source, out, edit, command="c")
    events.put(count)


def test_killed_at_any_moment_the_output_is_absent_or_whole_and_a_rerun_succeeds(
    source: Path, tmp_path: Path, ablation: Edit
) -> None:
    context = multiprocessing.get_context("forkserver")  # imports torch once, forks a child a kill
    context.set_forkserver_preload(["steer.weights.bake", "tests.weights.test_bake_faults", "test_bake_faults"])
    events = context.Queue()

    def run(out: Path, at: int) -> int | None:
        child = context.Process(target=_bake_and_die, args=(source, out, ablation, at, events))
        child.start()
        child.join(60)
        return child.exitcode

    assert run(tmp_path / "whole", -1) == 0
    steps = events.get(timeout=10)
    assert steps > 50
    rename = range(steps - 6, steps)  # the last syncs, the rename, the sync of the parent
    moments = {0, 1, *random.Random(1).sample(range(steps), 8), *rename}
    present = 0
    for at in sorted(moments):
        out = tmp_path / "killed" / "out"
        out.parent.mkdir()
        assert run(out, at) == -signal.SIGKILL
        if out.exists():
            present += 1
            verify(out)
        else:
            bake(source, out, ablation, command="c")
        for name in files_in(tmp_path / "whole"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)
    assert 0 < present < len(moments)


@pytest.mark.parametrize("after", [0, 3, 20, 35])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, ablation: Edit, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, written = staging.HashingFile.write, 0

    def write(self: staging.HashingFile, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(staging.HashingFile, "write", write)
    out = tmp_path / "out"
    with pytest.raises(SteerError, match="the disk is full") as caught:
        bake(source, out, ablation)
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(source: Path, tmp_path: Path, ablation: Edit) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(source, tmp_path / "out", ablation, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# Refusals: before anything is written


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Bakes, expects the error, and that nothing was written; returns the message."""

    def attempt(source: Path, edit: Edit, error: type[SteerError], out: Path | None = None) -> str:
        parent = tmp_path / "target"
        parent.mkdir()
        with pytest.raises(error) as caught:
            bake(source, out or parent / "out", edit)
        assert list(parent.iterdir()) == []
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return attempt


def test_an_output_with_something_in_it_is_not_touched(source: Path, tmp_path: Path, ablation: Edit) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match="remove it or name another output"):
        bake(source, tmp_path / "out", ablation)
    assert files_in(tmp_path) == ["out/mine"]
    with pytest.raises(OutputExistsError):
        bake(source, source, ablation)


def test_an_output_inside_the_source_is_refused(mine: Path, refused: Callable[..., str], ablation: Edit) -> None:
    assert "lies inside the source" in refused(mine, ablation, UsageError, mine / "out")


def test_another_width_is_refused(source: Path, refused: Callable[..., str], make_direction: MakeDirection) -> None:
    message = refused(source, Edit(ablate=(make_direction(width=48),)), MismatchError)
    assert "width 48" in message
    assert "width 32" in message


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda d: Edit(ablate=(d(),), blocks=(1, 3)), "within 0-2"),
        (lambda d: Edit(ablate=(d(site=3),)), "a site from 0 to 2"),
        (lambda d: Edit(add=((d(site=-1), 1.0),)), "a site from 0 to 2"),
    ],
)
def test_a_block_or_site_that_is_not_there_is_refused(
    source: Path,
    refused: Callable[..., str],
    make_direction: MakeDirection,
    edit: Callable[[MakeDirection], Edit],
    sentence: str,
) -> None:
    assert sentence in refused(source, edit(make_direction), UsageError)


def test_an_unknown_architecture_is_named(
    mine: Path, refused: Callable[..., str], change_config: Callable[..., None], ablation: Edit
) -> None:
    change_config(mine, architectures=["StrangeForCausalLM"])
    assert "architecture StrangeForCausalLM is unknown" in refused(mine, ablation, UnsupportedError)


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2", "Qwen3"])
def test_an_add_is_refused_where_no_bias_can_carry_it(
    tmp_path: Path,
    tiny_llama: TinyLlama,
    refused: Callable[..., str],
    make_direction: MakeDirection,
    architecture: str,
) -> None:
    source = tiny_llama(tmp_path / "source", architecture=architecture)
    message = refused(source, Edit(add=((make_direction(), 1.0),)), UnsupportedError)
    assert f"{architecture}ForCausalLM has no biases in its MLPs" in message


def _tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    """Replace, add or (None) drop tensors; dots are written as double underscores."""

    def change(root: Path) -> None:
        tensors = load_file(root / SINGLE) | {k.replace("__", "."): v for k, v in changes.items()}
        kept = {k: v for k, v in tensors.items() if v is not None}
        save_file(kept, root / SINGLE, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (
            _tensors(model__layers__1__mlp__expert__weight=torch.zeros(32, 8)),
            UnsupportedError,
            "model.layers.1.mlp.expert.weight [32, 8] is unknown",
        ),
        (
            _tensors(model__layers__1__post_feedforward_layernorm__weight=torch.ones(32)),
            UnsupportedError,
            "post_feedforward_layernorm.weight [32] is unknown",
        ),
        (_tensors(model__embed_positions__weight=torch.zeros(9, 32)), UnsupportedError, "embed_positions"),
        (
            _tensors(model__layers__1__mlp__down_proj__weight=torch.zeros(32, 48, dtype=torch.int8)),
            UnsupportedError,
            "quantised ones (model.layers.1.mlp.down_proj.weight is stored as I8)",
        ),
        (
            _tensors(model__layers__0__mlp__up_proj__weight_scale_inv=torch.ones(1)),
            UnsupportedError,
            "found quantised ones",
        ),
        (
            _tensors(model__layers__1__mlp__down_proj__weight=None),
            CheckpointError,
            "expected tensor model.layers.1.mlp.down_proj.weight",
        ),
        (
            _tensors(model__layers__1__mlp__down_proj__weight=torch.zeros(48, 32)),
            CheckpointError,
            "axis 0 to be the residual width 32, found shape [48, 32]",
        ),
        (_tensors(lm_head__weight=torch.zeros(97, 32)), CheckpointError, "but they differ"),
        (
            _tensors(model__layers__1__mlp__down_proj__weight=torch.full((32, 48), math.nan)),
            CheckpointError,
            "expected finite weights",
        ),
    ],
)
def test_a_checkpoint_that_cannot_hold_the_edit_is_refused_by_name(
    mine: Path,
    refused: Callable[..., str],
    ablation: Edit,
    damage: Callable[[Path], None],
    error: type[SteerError],
    sentence: str,
) -> None:
    damage(mine)
    assert sentence in refused(mine, ablation, error)


def test_a_quantised_config_is_refused(
    mine: Path, refused: Callable[..., str], change_config: Callable[..., None], ablation: Edit
) -> None:
    change_config(mine, quantization_config={"quant_method": "gptq"})
    assert "bake the original weights" in refused(mine, ablation, UnsupportedError)


def test_a_head_stored_beside_its_tie_stays_and_is_untied(mine: Path, tmp_path: Path, ablation: Edit) -> None:
    embedding = load_file(mine / SINGLE)["model.embed_tokens.weight"]
    _tensors(lm_head__weight=embedding.clone())(mine)
    bake(mine, tmp_path / "out", ablation)
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)["lm_head.weight"], embedding)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda root: (root / "config.json").unlink(), "config.json: expected one"),
        (lambda root: os.truncate(root / SINGLE, 5000), "expected a whole safetensors file"),
        (shutil.rmtree, "expected a model directory, found none"),
    ],
)
def test_a_broken_source_is_refused(
    mine: Path,
    refused: Callable[..., str],
    ablation: Edit,
    damage: Callable[[Path], object],
    sentence: str,
) -> None:
    damage(mine)
    assert sentence in refused(mine, ablation, CheckpointError)


def test_an_index_that_leaves_the_directory_is_refused(
    tmp_path: Path, tiny_llama: TinyLlama, refused: Callable[..., str], ablation: Edit
) -> None:
    source = tiny_llama(tmp_path / "source", shards=True)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../source/model-00001-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    assert "in the same directory" in refused(source, ablation, CheckpointError)


def files_in(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
