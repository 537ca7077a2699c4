"""Killed, out of disk, or refused: a bake leaves its output whole or absent, and says why."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import Form
from steer.baking.journal import Journal
from steer.baking.verify import verify
from steer.checkpoint.reader import INDEX, SINGLE
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import CheckpointError, MismatchError, OutputExistsError, SteerError, UnsupportedError, UsageError

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]


# Real disks, limits and rivals: each in separate processes


DISKS = """
import json, os, subprocess, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from steer.errors import SteerError
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.baking.bake import bake
from steer.baking.verify import verify
source, direction, disk = map(Path, sys.argv[1:4])
for options in sys.argv[4:]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "steer-test", str(disk)], check=True)
    try:
        bake(source, disk / "out", Edit((Direction.load(direction),)))
        print(json.dumps([options, "", "", os.listdir(disk)]))
    except SteerError as e:
        print(json.dumps([options, type(e).__name__, str(e), os.listdir(disk)]))
    subprocess.run(["umount", str(disk)], check=True)
"""


@pytest.fixture
def bake_on_disks(source: Path, ablation: Edit, tmp_path: Path) -> Callable[..., list[tuple[str, str, str, list[str]]]]:
    """Bakes on a new tmpfs a set of mount options; (options, kind of error, message, what it holds then) of each."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    ablation.ablate[0].save(tmp_path / "direction.safetensors")
    (tmp_path / "disk").mkdir()

    def run(*options: str) -> list[tuple[str, str, str, list[str]]]:
        code = [sys.executable, "-c", DISKS, str(source), str(tmp_path / "direction.safetensors")]
        done = subprocess.run([*namespace, *code, str(tmp_path / "disk"), *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere_is_one_line_and_leaves_nothing(
    bake_on_disks: Callable[..., list[tuple[str, str, str, list[str]]]], baked: Path
) -> None:
    size = sum(-(-(baked / f).stat().st_size // 4096) * 4096 for f in files_in(baked))
    assert size > 100_000
    *full, enough = bake_on_disks(*(f"size={kb}k" for kb in (4, 32, 64, 96, size // 1024 - 4, size // 1024 + 64)))
    for options, kind, message, left in full:
        assert (kind, left) == ("SteerError", []), options
        assert "/disk/out: could not be written, the disk is full; free some space" in message
        assert "\n" not in message
    assert enough[1:] == ("", "", ["out"])


@pytest.mark.slow
def test_a_read_only_disk_is_one_line(bake_on_disks: Callable[..., list[tuple[str, str, str, list[str]]]]) -> None:
    ((_, kind, message, left),) = bake_on_disks("ro")
    assert (kind, left) == ("SteerError", [])
    assert "/disk/out: could not be written, the file system is read-only" in message


def _bake_limited(source: Path, out: Path, edit: Edit, limit: int, answers: multiprocessing.Queue[str]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        bake(source, out, edit)
    except SteerError as e:
        answers.put(str(e))


@pytest.mark.slow
def test_a_file_larger_than_the_limit_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, ablation: Edit, forkserver: ForkServerContext
) -> None:
    answers = forkserver.Queue()
    child = forkserver.Process(target=_bake_limited, args=(source, tmp_path / "out", ablation, 30_000, answers))
    child.start()
    message = answers.get(timeout=120)
    child.join(60)
    assert "allows no file this large" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def _bake_at_once(source: Path, out: Path, edit: Edit, gate: Barrier, answers: multiprocessing.Queue[str]) -> None:
    torch.set_num_threads(1)
    gate.wait(120)
    try:
        bake(source, out, edit)
        answers.put("")
    except OutputExistsError as e:
        answers.put(str(e))


@pytest.mark.slow
def test_of_several_bakes_into_one_output_at_once_one_wins_and_the_others_are_refused(
    source: Path, baked: Path, tmp_path: Path, ablation: Edit, forkserver: ForkServerContext
) -> None:
    gate, answers = forkserver.Barrier(3), forkserver.Queue()
    arguments = (source, tmp_path / "out", ablation, gate, answers)
    children = [forkserver.Process(target=_bake_at_once, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    won, *lost = sorted(answers.get(timeout=120) for _ in children)
    for child in children:
        child.join(60)
    assert won == ""
    assert all("is being written; wait" in line or "expected a new or empty directory" in line for line in lost)
    assert (tmp_path / "out" / SINGLE).read_bytes() == (baked / SINGLE).read_bytes()
    verify(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_ctrl_c_throws_no_finished_shard_away(
    tmp_path: Path, tiny_llama: Callable[..., Path], ablation: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_llama(tmp_path / "source", shards=True)
    record = Journal.record

    def record_and_interrupt(*args: Any, **kwargs: Any) -> None:
        record(*args, **kwargs)
        raise KeyboardInterrupt  # by then a shard is finished, however busy the disk is

    monkeypatch.setattr(Journal, "record", record_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        bake(source, tmp_path / "out", ablation)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    first = min(tmp_path.glob(".out.*/model-*.safetensors"))
    inode = first.stat().st_ino
    bake(source, tmp_path / "out", ablation)
    assert (tmp_path / "out" / first.name).stat().st_ino == inode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    verify(tmp_path / "out")


SLOW = """
import sys, time
from steer.baking.journal import Journal
from steer.cli.main import main
record = Journal.record
def record_and_wait(*args, **kwargs):
    record(*args, **kwargs)
    print("one is finished", flush=True)
    time.sleep(60)
Journal.record = record_and_wait
sys.argv = ["steer", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_sigterm_in_the_middle_is_one_line_and_the_next_bake_goes_on(
    tmp_path: Path, tiny_llama: Callable[..., Path], make_direction: MakeDirection, form: Form
) -> None:
    source, out = tiny_llama(tmp_path / "source", shards=True), tmp_path / "out"
    make_direction().save(tmp_path / "d.safetensors")
    command = ["bake", str(source), str(out), "--ablate", str(tmp_path / "d.safetensors"), "--force", "--as", form]
    environment = os.environ | {"STEER_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while "one is finished" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "steer: stopped by SIGTERM; what is finished is kept, run the same command to go on\n"
    assert not out.exists()
    (journal,) = tmp_path.glob(".out.*/.steer-journal")
    finished = json.loads(journal.read_text().splitlines()[1])["file"]
    inode = (journal.parent / finished).stat().st_ino
    edit = Edit(ablate=(Direction.load(tmp_path / "d.safetensors"),))
    bake(source, out, edit, form)
    if form == "checkpoint":
        assert (out / finished).stat().st_ino == inode
    assert not list(tmp_path.glob(".out.*"))
    verify(out)


CARDS = {
    "a date that is none": b"---\nlicense: mit\ndate: 2024-13-45\n---\n",
    "a tag without a value": b"---\nlicense: !!timestamp x\n---\n",
    "a number that is none": b"---\nlicense: !!int ''\n---\n",
    "deep brackets": b"---\nlicense: " + b"[" * 100_000 + b"\n---\n",
    "an alias to itself": b"---\nlicense: &a [*a]\n---\n",
    "aliases that grow": b"---\na: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (n, n, *(n - 1,) * 8) for n in range(98, 123)
    ) + b"license: *z\n---\n",
    "half a surrogate": b'---\nlicense: "\\ud800"\n---\n',
    "bytes that are no text": b"---\nlicense: \xff\xfe\n---\n",
    "a list": b"---\n- license\n---\n",
    "a python object": b"---\nlicense: !!python/object/apply:os.system [true]\n---\n",
    "bytes, a set, a date": b"---\nlicense: !!binary aGk=\nlanguage: !!set {a, b}\npipeline_tag: 2024-01-01\n---\n",
    "keys of every kind": b"---\n? [a, b]\n: c\n1: 2\nnull: x\n---\n",
}  # fmt: skip


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
@pytest.mark.parametrize("card", [*CARDS.values(), None], ids=[*CARDS, "a directory"])
def test_a_model_card_of_any_kind_ends_no_bake(
    mine: Path, tmp_path: Path, ablation: Edit, card: bytes | None, form: Form
) -> None:
    (mine / "README.md").unlink()
    if card is None:
        (mine / "README.md").mkdir()
    else:
        (mine / "README.md").write_bytes(card)
    bake(mine, tmp_path / "out", ablation, form)
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "mine"
    verify(tmp_path / "out")


def test_a_card_with_other_line_ends_and_more_than_a_megabyte_keeps_its_licence(
    mine: Path, tmp_path: Path, ablation: Edit
) -> None:
    (mine / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n" + b"x" * (2 << 20))
    bake(mine, tmp_path / "out", ablation)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_a_side_file_that_cannot_be_read_is_reported_before_any_weight_is_written(
    mine: Path, tmp_path: Path, ablation: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(source: Path, target: Path) -> str:
        raise PermissionError(13, "Permission denied", str(source))

    written: list[int] = []
    monkeypatch.setattr("steer.baking.checkpoint.copy_file", denied)
    with pytest.raises(SteerError, match=r"chat_template\.jinja: could not be used, Permission denied") as e:
        bake(mine, tmp_path / "out", ablation, progress=lambda done, total: written.append(done))
    assert "\n" not in str(e.value)
    assert not written
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_names_that_are_no_utf_8_are_baked(mine: Path, tmp_path: Path, ablation: Edit, form: Form) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    mine.rename(odd)
    (odd / os.fsdecode(b"note\xff")).write_text("x")
    cert = bake(odd, tmp_path / "out", ablation, form, command=f"steer bake {odd} out")
    assert cert.source == "odd?"
    assert ("note?" in cert.left_out) == (form == "checkpoint")
    verify(tmp_path / "out", source=odd)


def test_a_link_among_the_side_files_that_leaves_the_checkpoint_is_left_out(
    mine: Path, tmp_path: Path, ablation: Edit
) -> None:
    (tmp_path / "secret").write_text("key")
    (mine / "notes.txt").symlink_to(tmp_path / "secret")
    (mine / "same.jinja").symlink_to("chat_template.jinja")
    cert = bake(mine, tmp_path / "out", ablation)
    assert "notes.txt" in cert.left_out
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert (tmp_path / "out" / "same.jinja").read_bytes() == (mine / "chat_template.jinja").read_bytes()


def test_side_files_of_a_hub_cache_are_links_into_its_blobs_and_are_kept(
    mine: Path, tmp_path: Path, ablation: Edit
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c"
    shutil.copytree(mine, snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "chat_template.jinja").rename(tmp_path / "models--a--b" / "blobs" / "f00")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/f00")
    bake(snapshot, tmp_path / "out", ablation)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (mine / "chat_template.jinja").read_bytes()


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
        (
            _tensors(model__layers__1__mlp__down_proj__weight=torch.zeros(32, 0)),
            CheckpointError,
            "axis 0 to be the residual width 32, found shape [32, 0]",
        ),
        (_tensors(model__embed_tokens__weight=torch.zeros(0, 32)), CheckpointError, "found shape [0, 32]"),
        (
            _tensors(lm_head__weight=torch.zeros(98, 32)),
            CheckpointError,
            "expected the shape [97, 32] of the embedding",
        ),
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
        (
            lambda root: (root / "config.json").unlink(),
            "config.json: expected a JSON object in a model directory, found none",
        ),
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
