"""What a bake writes computes what the edit says, and its certificate proves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import Certificate, Form
from steer.baking.verify import verify
from steer.checkpoint.reader import INDEX, SINGLE, CheckpointFiles
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import CheckpointError, UsageError

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]
TOKENS = torch.tensor([[1, 5, 17, 60, 3, 96, 44], [1, 2, 8, 8, 71, 30, 0]])
BLOCKS = 3


def _load(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@contextmanager
def _hooked(model: torch.nn.Module, edit: Edit) -> Iterator[None]:
    """The edit by hooks, written down independently of the code under test."""
    handles = []
    if edit.ablate:
        q, _ = torch.linalg.qr(torch.stack([d.vector.double() for d in edit.ablate], dim=1))

        def ablated(module: object, args: object, y: Tensor) -> Tensor:
            return (y.double() - edit.strength * (y.double() @ q) @ q.T).to(y.dtype)

        first, last = edit.blocks or (0, BLOCKS - 1)
        names = [f"model.layers.{i}.{m}" for i in range(first, last + 1) for m in ("self_attn.o_proj", "mlp.down_proj")]
        for name in names if edit.blocks else ["model.embed_tokens", *names]:
            handles.append(model.get_submodule(name).register_forward_hook(ablated))
    for direction, amount in edit.add:
        shift = amount * direction.gap * direction.vector.double()

        def shifted(module: object, args: object, y: Tensor, shift: Tensor = shift) -> Tensor:
            return (y.double() + shift).to(y.dtype)

        handles.append(model.get_submodule(f"model.layers.{direction.site}").register_forward_hook(shifted))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


EDITS: dict[str, Callable[[MakeDirection], Edit]] = {
    "ablate": lambda d: Edit(ablate=(d(),)),
    "partial": lambda d: Edit(ablate=(d(),), strength=0.37),
    "blocks": lambda d: Edit(ablate=(d(),), blocks=(1, 2)),
    "several": lambda d: Edit(ablate=(d(), d("b", site=0, seed=8), d("c", site=2, seed=9)), strength=0.9),
    "add": lambda d: Edit(add=((d(), -1.25),)),
    "adds": lambda d: Edit(add=((d(), -1.25), (d("b", seed=8), 0.5), (d("c", site=2, seed=9), 2.0))),
    "both": lambda d: Edit(ablate=(d(),), strength=0.8, add=((d("b", site=2, seed=8), 1.5),)),
    "both, same direction": lambda d: Edit(ablate=(d(),), blocks=(0, 1), add=((d(), 1.5),)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize(
    "form",
    [
        {"tie": True},
        {"tie": False, "shards": True},
        {"tie": True, "shards": True, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["tied", "untied shards", "biases"],
)
def test_baked_logits_are_those_of_the_source_with_hooks_at_every_writer(
    tmp_path: Path,
    tiny_llama: TinyLlama,
    make_direction: MakeDirection,
    form: dict[str, object],
    edit: Callable[[MakeDirection], Edit],
) -> None:
    source = tiny_llama(tmp_path / "source", dtype=torch.float64, **form)
    wanted = edit(make_direction)
    bake(source, tmp_path / "out", wanted)
    model = _load(source, torch.float64)
    plain = _logits(model)
    with _hooked(model, wanted):
        expected = _logits(model)
    got = _logits(_load(tmp_path / "out", torch.float64))
    assert (expected - plain).abs().max() > 0.05
    assert (got - expected).abs().max() < 1e-9
    assert [c.name for c in verify(tmp_path / "out")][:4] == ["certificate", "contents", "sha256", "config"]


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2", "Qwen3"])
def test_the_same_layout_by_other_names_bakes_exactly(
    tmp_path: Path, tiny_llama: TinyLlama, ablation: Edit, architecture: str
) -> None:
    source = tiny_llama(tmp_path / "source", dtype=torch.float64, architecture=architecture)
    bake(source, tmp_path / "out", ablation)
    model = _load(source, torch.float64)
    with _hooked(model, ablation):
        expected = _logits(model)
    assert (_logits(_load(tmp_path / "out", torch.float64)) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_weights_are_the_exact_ones_rounded_once(
    tmp_path: Path, tiny_llama: TinyLlama, make_direction: MakeDirection, dtype: torch.dtype
) -> None:
    source = tiny_llama(tmp_path / "source", dtype=dtype, tie=False)
    edit = Edit(ablate=(make_direction(), make_direction("b", seed=8)), strength=0.7)
    bake(source, tmp_path / "out", edit)
    before, after = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    q = edit.basis()
    for name, w in before.items():
        if name == "model.embed_tokens.weight":
            exact = w.double() - 0.7 * (w.double() @ q) @ q.T
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            exact = w.double() - 0.7 * q @ (q.T @ w.double())
        else:
            assert torch.equal(after[name], w)
            continue
        # Half a unit in the last place, and the fp32 arithmetic's own error.
        slack = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-7
        assert ((after[name].double() - exact).abs() <= slack).all()
        assert not torch.equal(after[name], w)


def test_bf16_logits_agree_to_rounding(source: Path, baked: Path, ablation: Edit) -> None:
    model = _load(source, torch.float32)
    plain = _logits(model)
    with _hooked(model, ablation):
        expected = _logits(model)
    error = (_logits(_load(baked, torch.float32)) - expected).norm()
    assert error < 0.05 * (expected - plain).norm()


def test_what_the_edit_does_not_concern_passes_byte_for_byte(source: Path, baked: Path) -> None:
    files, out = CheckpointFiles.open(source), CheckpointFiles.open(baked)
    edited = {w.tensor for w in Certificate.load(baked).writers}
    assert len(edited) == 1 + 2 * BLOCKS
    for name, t in files.tensors.items():
        assert (files.read(t) == out.read(out.tensors[name])) == (name not in edited)
    # Tied before: the head goes on with the embedding as it was.
    assert set(out.tensors) - set(files.tensors) == {"lm_head.weight"}
    embedding = files.read(files.tensors["model.embed_tokens.weight"])
    assert out.read(out.tensors["lm_head.weight"]) == embedding
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "extra/unknown.dat"):
        assert (source / name).read_bytes() == (baked / name).read_bytes()
    assert json.loads((baked / "config.json").read_text()) == files.config | {"tie_word_embeddings": False}
    assert Certificate.load(baked).left_out == ("README.md", "pytorch_model.bin")


def test_a_tied_checkpoint_stays_tied_when_the_embedding_is_not_edited(
    source: Path, tmp_path: Path, make_direction: MakeDirection
) -> None:
    bake(source, tmp_path / "out", Edit(ablate=(make_direction(),), blocks=(0, 1)))
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert set(CheckpointFiles.open(tmp_path / "out").tensors) == set(CheckpointFiles.open(source).tensors)
    sizes = [(p / SINGLE).stat().st_size for p in (source, tmp_path / "out")]
    assert sizes[0] == sizes[1]


def test_shards_keep_their_names_and_the_index_counts_what_was_added(
    tmp_path: Path, tiny_llama: TinyLlama, make_direction: MakeDirection
) -> None:
    source = tiny_llama(tmp_path / "source", shards=True)
    bake(source, tmp_path / "out", Edit(ablate=(make_direction(),), add=((make_direction(), 1.0),)))
    before, after = (json.loads((p / INDEX).read_text()) for p in (source, tmp_path / "out"))
    files = CheckpointFiles.open(tmp_path / "out")
    assert [s.name for s in files.shards] == [s.name for s in CheckpointFiles.open(source).shards]
    assert after["weight_map"] == {t.name: t.file for t in files.tensors.values()}
    assert after["metadata"]["total_size"] == sum(t.nbytes for t in files.tensors.values())
    added = set(after["weight_map"]) - set(before["weight_map"])
    assert len(added) == 1 + 3 * BLOCKS
    assert files.config["mlp_bias"] is True
    for name in added - {"lm_head.weight", "model.layers.1.mlp.down_proj.bias"}:
        assert not any(files.read(files.tensors[name]))


def test_ablate_is_idempotent(baked: Path, ablation: Edit, tmp_path: Path) -> None:
    bake(baked, tmp_path / "again", ablation)
    once, twice = load_file(baked / SINGLE), load_file(tmp_path / "again" / SINGLE)
    assert once.keys() == twice.keys()
    q = ablation.basis()
    for name, w in once.items():
        difference = (twice[name].double() - w.double()).norm()
        assert difference <= torch.finfo(torch.bfloat16).eps * w.double().norm() * 0.2, name
    # What rounding left does not grow.
    o = "model.layers.0.self_attn.o_proj.weight"
    assert (q.T @ twice[o].double()).norm() < 2e-3 * twice[o].double().norm()


def test_a_rerun_writes_the_same_bytes(source: Path, baked: Path, ablation: Edit, tmp_path: Path) -> None:
    bake(source, tmp_path / "out", ablation, command="steer bake source out --ablate moral")
    for path in (p for p in baked.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(baked)).read_bytes()


def test_a_symlinked_read_only_hub_cache_is_copied_by_content(
    source: Path, baked: Path, ablation: Edit, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        if path.is_file():
            path.chmod(0o400)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    cert = bake(snapshot, tmp_path / "out", ablation)
    assert cert.source == "org/name"
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / SINGLE).read_bytes() == (baked / SINGLE).read_bytes()
    verify(tmp_path / "out")


def test_progress_ends_at_the_total(source: Path, tmp_path: Path, ablation: Edit) -> None:
    counts: list[tuple[int, int]] = []
    bake(source, tmp_path / "out", ablation, progress=lambda done, total: counts.append((done, total)))
    assert counts == sorted(counts)
    assert (
        counts[-1][0] == counts[-1][1] == sum(t.nbytes for t in CheckpointFiles.open(tmp_path / "out").tensors.values())
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_edited_on_a_gpu_are_those_edited_here_to_rounding(
    source: Path, baked: Path, ablation: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bake(source, tmp_path / "here", ablation)
    here, there = load_file(tmp_path / "here" / SINGLE), load_file(baked / SINGLE)
    for name, w in here.items():
        assert torch.allclose(there[name].double(), w.double(), rtol=2 * torch.finfo(w.dtype).eps, atol=1e-7)
    verify(baked)


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_chosen_chat_template_stays_with_the_bake_and_is_certified(
    source: Path, baked: Path, ablation: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    out, name = tmp_path / "out", "chat_template.jinja"
    if by == "variable":
        monkeypatch.setenv("STEER_CHAT_TEMPLATE", "alpaca")
    cert = bake(source, out, ablation, chat_template="alpaca" if by == "argument" else None)
    assert "### Instruction:" in (out / name).read_text()
    assert (source / name).read_bytes() == b"{{ messages }}"
    assert cert.files[name] != Certificate.load(baked).files[name]
    verify(out, source=source)
    (out / name).write_text("{{ other }}")
    with pytest.raises(CheckpointError, match=name):
        verify(out)


@pytest.mark.parametrize("form", ["adapter", "gguf"])
def test_adapters_and_control_vectors_keep_a_chosen_template_too(
    source: Path, make_direction: Callable[..., Direction], tmp_path: Path, form: Form
) -> None:
    out, lines = tmp_path / "out", list[str]()
    edit = Edit(add=((make_direction(), 1.0),)) if form == "gguf" else Edit(ablate=(make_direction(),))
    cert = bake(source, out, edit, form, chat_template="chatml", say=lines.append)
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()
    assert ("tokenizer.json" in cert.files) == (form == "adapter")
    assert any("--chat-template-file" in line for line in lines) == (form == "gguf")
    assert ("--chat-template-file chat_template.jinja" in (out / "README.md").read_text()) == (form == "gguf")
    verify(out)
    plain = bake(source, tmp_path / "plain", edit, form)
    assert not {"tokenizer.json", "chat_template.jinja"} & plain.files.keys()


def test_a_template_that_is_not_there_is_reported_before_anything_is_written(
    source: Path, ablation: Edit, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--chat-template chatlm: expected a file, or one of alpaca, chatml"):
        bake(source, tmp_path / "out", ablation, chat_template="chatlm")
    assert not list(tmp_path.iterdir())
