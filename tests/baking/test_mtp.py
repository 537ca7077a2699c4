"""Layers for multi-token prediction: passed through by default, and with `edit_mtp` edited as the last block is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, command_here
from safetensors.torch import load_file, save_file
from test_forgeries import forge
from tiny_anatomies import TINY
from tiny_types import load_plain, save_tiny_type

import steer
from steer.baking.bake import PLANS, bake
from steer.baking.certificate import Certificate, Form
from steer.baking.journal import JOURNAL, Journal
from steer.baking.verify import verify
from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.reader import SINGLE, CheckpointFiles
from steer.checkpoint.sketch import sketch_files
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Method
from steer.core.trait import Trait
from steer.errors import CheckpointError, SteerError, UnsupportedError, UsageError
from steer.measure.search.trials import Scope
from steer.verbs.bake_search import _baked, _Search, search_bake

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))


def add_mtp(source: Path, layer: str, begins: str, embedding: str | None = None) -> Path:
    """Give a checkpoint a layer for multi-token prediction at the prefix `layer`: a block like its last one, and the
    projection `begins`; with `embedding`, also copies of embedding and LM head."""
    files = CheckpointFiles.open(source)
    anatomy, tensors = Anatomy.of(files.config, "it"), load_file(source / SINGLE)
    base = anatomy.find(files.config, files.tensors).base
    last = f"{base}{anatomy.layout.block.format(anatomy.blocks - 1)}."
    mtp = {layer + n.removeprefix(last): t.flip(-1).contiguous() for n, t in tensors.items() if n.startswith(last)}
    mtp[f"{begins}.weight"] = torch.randn(anatomy.width, 2 * anatomy.width, generator=torch.Generator().manual_seed(3))
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        mtp[f"{layer}{norm}.weight"] = torch.ones(anatomy.width)
    if embedding:
        copied = tensors[f"{base}{anatomy.layout.embeddings[0]}.weight"]
        mtp |= {embedding: copied.clone(), f"{layer}shared_head.head.weight": copied.clone()}
    save_file(tensors | mtp, source / SINGLE, metadata={"format": "pt"})
    return source


def glm(path: Path) -> Path:
    return add_mtp(save_tiny_type("glm4_moe", path), "model.layers.3.", "model.layers.3.eh_proj",
                   "model.layers.3.embed_tokens.weight")  # fmt: skip


def qwen(path: Path) -> Path:
    return add_mtp(TINY["qwen2-moe"].save(path, torch.float32), "mtp.layers.0.", "mtp.fc")


def olmo(path: Path) -> Path:
    return add_mtp(TINY["olmo2"].save(path, torch.float32), "model.mtp.layers.0.", "model.mtp.layers.0.input_proj")


def llama(path: Path) -> Path:
    return add_mtp(TINY["llama"].save(path, torch.float32), "model.layers.3.", "model.layers.3.eh_proj")


MAKERS: dict[str, tuple[Callable[[Path], Path], str, str, int]] = {
    "glm4_moe": (glm, "model.layers.3.", "model.layers.3.eh_proj.weight", 8),
    "qwen2_moe": (qwen, "mtp.layers.0.", "mtp.fc.weight", 7),
    "olmo2": (olmo, "model.mtp.layers.0.", "model.mtp.layers.0.input_proj.weight", 3),
}
"""Kind -> (maker, prefix of the layer, the projection that begins its stream, number of its writers)."""


def edit_for(source: Path, **how: Any) -> tuple[Edit, torch.Tensor]:
    files = CheckpointFiles.open(source)
    width = Anatomy.of(files.config, "it").width
    r = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)
    direction = Direction("a", 0, r, with_mean=1.0, without_mean=0.0, residual_norm=10.0, provenance={})
    return Edit((direction,), **how), r


def stream_of_mtp(checkpoint: Path, layer: str, begins: str, at: Path) -> torch.Tensor:
    """The residual stream after the layer, which stands as a model's last block and is given what `begins` puts out."""
    tensors, files = load_file(checkpoint / SINGLE), CheckpointFiles.open(checkpoint)
    anatomy = Anatomy.of(files.config, "it")
    last = f"{anatomy.find(files.config, files.tensors).base}{anatomy.layout.block.format(anatomy.blocks - 1)}."
    moved = {last + n.removeprefix(layer): t for n, t in tensors.items() if n.startswith(layer)}
    shutil.copytree(checkpoint, at)
    save_file({n: moved.get(n, t).clone() for n, t in tensors.items()}, at / SINGLE, metadata={"format": "pt"})
    model, streams = load_plain(at), []
    block = model.get_submodule(anatomy.block_module(anatomy.blocks - 1))
    given = torch.randn(1, 6, 2 * anatomy.width, generator=torch.Generator().manual_seed(2)) @ tensors[begins].T
    block.register_forward_pre_hook(lambda _, args, kwargs: ((given, *args[1:]), kwargs), with_kwargs=True)
    block.register_forward_hook(lambda _, args, out: streams.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    return streams[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_after_an_ablation_nothing_of_the_direction_is_left_in_the_stream_of_the_layer(kind: str, tmp_path: Path):
    make, layer, begins, count = MAKERS[kind]
    source, out = make(tmp_path / "source"), tmp_path / "out"
    edit, r = edit_for(source)
    plan: list[str] = []
    cert = bake(source, out, edit, edit_mtp=True, say=plan.append)
    plain = bake(source, tmp_path / "plain", edit)
    assert cert.writers_edited == cert.writers_found == plain.writers_edited + count
    assert f"multi-token prediction: {count} of {count} edited: " in plan[0]
    assert f"--edit-mtp would edit the {count} writers" in PLANS["checkpoint"](source, edit).summary()
    verify(out, source=source)
    before, passed, after = (
        stream_of_mtp(path, layer, begins, tmp_path / f"{path.name}-alone")
        for path in (source, tmp_path / "plain", out)
    )
    assert float((after @ r).abs().max()) < 1e-5 * float(after.abs().max())
    assert float((before @ r).abs().max()) > 1e-2 * float(before.abs().max())
    assert float((passed @ r).abs().max()) > 1e-2 * float(passed.abs().max())
    stored = [load_file(path / SINGLE) for path in (source, out)]
    proved = {proof.tensor for proof in cert.writers}
    assert set(cert.unloaded) == set(plain.unloaded) - proved
    assert all(torch.equal(*(tensors[name] for tensors in stored)) for name in cert.unloaded)
    assert not any(torch.equal(*(tensors[name] for tensors in stored)) for name in proved)
    assert "multi-token prediction are edited too" in (out / "README.md").read_text()


def test_a_layer_that_drafts_is_edited_as_the_last_block_and_by_no_add(tmp_path: Path):
    source = llama(tmp_path / "source")
    _, r = edit_for(source)
    add = Direction("b", 2, r.flip(0), with_mean=1.0, without_mean=0.0, residual_norm=10.0, provenance={})
    (a,) = edit_for(source)[0].ablate
    edit = Edit((a,), 0.5, (1, 2), add=((add, 1.0),), method=Method(norm_preserving=True))
    plan: list[str] = []
    cert = bake(source, tmp_path / "out", edit, edit_mtp=True, say=plan.append)
    layer = {p.tensor: p for p in cert.writers if p.tensor.startswith("model.layers.3.")}
    assert {p.strength for p in layer.values()} == {0.5}
    assert {p.block for p in layer.values()} == {2}
    assert "multi-token prediction: no add" in plan[0]
    verify(tmp_path / "out", source=source)
    before, after = (load_file(path / SINGLE) for path in (source, tmp_path / "out"))
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.allclose(before[name].norm(dim=0), after[name].norm(dim=0), rtol=1e-4)
    # Blocks leave the embedding out, and the projection that begins the layer's stream with it.
    assert torch.equal(before["model.layers.3.eh_proj.weight"], after["model.layers.3.eh_proj.weight"])
    assert "model.layers.3.mlp.down_proj.bias" not in {b.tensor for b in cert.biases}
    first = bake(source, tmp_path / "first", Edit((a,), blocks=(0, 1)), edit_mtp=True, say=plan.append)
    assert "multi-token prediction: 0 of 3 edited" in plan[1]
    assert not any(p.tensor.startswith("model.layers.3.") for p in first.writers)


def test_a_proof_of_such_a_layer_that_is_missing_or_made_up_is_found(tmp_path: Path):
    source = llama(tmp_path / "source")
    edit, _ = edit_for(source)
    bake(source, tmp_path / "with", edit, edit_mtp=True)
    bake(source, tmp_path / "without", edit)

    def of_mtp(body: dict[str, Any]) -> list[dict[str, Any]]:
        return [w for w in body["writers"] if w["tensor"].startswith("model.layers.3.")]

    def without_flag(body: dict[str, Any]) -> None:
        names = [w["tensor"] for w in of_mtp(body)]
        body["writers"] = [w for w in body["writers"] if w["tensor"] not in names]
        held = sorted([*body["unloaded"], *names], key=list(body["tensors"]).index)
        body.update(edit_mtp=False, unloaded=held, writers_found=body["writers_found"] - len(names))

    forged = shutil.copytree(tmp_path / "with", tmp_path / "popped")
    with pytest.raises(CheckpointError, match="writers of the certificate"):
        verify(forge(forged, lambda body: body["writers"].remove(of_mtp(body)[0])))
    forged = shutil.copytree(tmp_path / "with", tmp_path / "unflagged")
    verify(forge(forged, without_flag))  # says of these tensors only that they are not edited
    with pytest.raises(CheckpointError, match="is not what"):
        verify(forged, source=source)
    for claim in (True, 3):
        forged = shutil.copytree(tmp_path / "without", tmp_path / f"claimed{claim}")
        with pytest.raises(CheckpointError, match="of the certificate is not what"):
            verify(forge(forged, lambda body, claim=claim: body.update(edit_mtp=claim)))


def test_what_has_no_such_layer_is_refused(tmp_path: Path):
    source = llama(tmp_path / "source")
    edit, r = edit_for(source)
    add = Direction("b", 2, r, with_mean=1.0, without_mean=0.0, residual_norm=10.0, provenance={})
    forms: tuple[Form, ...] = ("adapter", "gguf")
    for form in forms:
        with pytest.raises(UsageError, match=f"--edit-mtp: expected the form checkpoint, found {form}"):
            steer.bake(source, tmp_path / "out", ablate=edit.ablate[0], form=form, edit_mtp=True, force=True)
    with pytest.raises(UsageError, match="--edit-mtp: expected a direction to ablate, found none"):
        bake(source, tmp_path / "out", Edit(add=((add, 1.0),)), edit_mtp=True)
    plain = TINY["llama"].save(tmp_path / "plain", torch.float32)
    with pytest.raises(UnsupportedError, match="block's writers, found no tensor of such layers; leave it out"):
        bake(plain, tmp_path / "out", edit, edit_mtp=True)
    with pytest.raises(UnsupportedError, match="found no tensor of such layers"):  # before the model is loaded
        search_bake(plain, tmp_path / "out", "moralizing", edit_mtp=True)
    assert not (tmp_path / "out").exists()


OTHERS: dict[str, Callable[[Tensors], Tensors]] = {
    "an unknown matrix": lambda t: t | {"model.layers.3.mixer.out.weight": torch.ones(32, 32)},
    "a writer missing": lambda t: {n: v for n, v in t.items() if n != "model.layers.3.self_attn.o_proj.weight"},
    "another width": lambda t: t | {"model.layers.3.self_attn.o_proj.weight": torch.ones(31, 32)},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_layer_of_another_shape_than_a_block_passes_through_whole(
    change: Callable[[Tensors], Tensors], tmp_path: Path
):
    source = llama(tmp_path / "source")
    save_file(change(load_file(source / SINGLE)), source / SINGLE, metadata={"format": "pt"})
    edit, _ = edit_for(source)
    with pytest.raises(
        SteerError, match=r"--edit-mtp: .*tensors that are not those of a block of Llama.*layers\.\*"
    ) as e:
        bake(source, tmp_path / "out", edit, edit_mtp=True)
    assert "\n" not in str(e.value)
    cert = bake(source, tmp_path / "out", edit)
    assert "model.layers.3.mlp.down_proj.weight" in cert.unloaded
    verify(tmp_path / "out", source=source)


def test_what_a_search_chooses_is_baked_into_the_layer_too_unless_it_is_an_add(tmp_path: Path):
    source = llama(tmp_path / "source")
    edit, r = edit_for(source)
    add = Edit(add=((Direction("b", 2, r, with_mean=1.0, without_mean=0.0, residual_norm=10.0, provenance={}), 1.0),))
    about = (sketch_files(source), "float32", Trait.load("moralizing"), (), "checkpoint", tmp_path, 0, Scope(), True)
    for n, (chosen, edited) in enumerate([(edit, True), (add, False)]):
        cert = _baked(_Search(source, *about), tmp_path / f"out{n}", chosen, None, print)
        assert cert.edit_mtp == any(p.tensor.startswith("model.layers.3.") for p in cert.writers) == edited
        assert _baked(_Search(source, *about), tmp_path / f"out{n}", chosen, None, print) == cert  # not written again


def test_a_killed_bake_does_not_go_on_with_the_other_choice(tmp_path: Path):
    source = llama(tmp_path / "source")
    edit, _ = edit_for(source)
    files, heads = CheckpointFiles.open(source), set()
    for edit_mtp in (False, True):
        work = tmp_path / str(edit_mtp)
        work.mkdir()
        Journal.of(work, files, edit, "checkpoint", edit_mtp=edit_mtp)
        heads.add((work / JOURNAL).read_text())
    assert len(heads) == 2


def test_the_command_edits_the_layer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    run: Command = command_here(monkeypatch, capfd)
    source = llama(tmp_path / "source")
    edit, _ = edit_for(source)
    edit.ablate[0].save(tmp_path / "a.safetensors")
    arguments = ("--ablate", tmp_path / "a.safetensors", "--force", "--edit-mtp")
    result = run("bake", source, tmp_path / "out", *arguments, "--json").result
    assert result["edit_mtp"]
    assert any("multi-token prediction: 3 of 3 edited" in line for line in result["plan"])
    assert Certificate.load(tmp_path / "out").edit_mtp
    said = run("bake", source, tmp_path / "adapter", *arguments, "--as", "adapter")
    assert said.code != 0
    assert said.err.count("\n") == 1
    assert "--edit-mtp: expected the form checkpoint" in said.err
