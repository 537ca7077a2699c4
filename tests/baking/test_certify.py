"""The certificate says what was measured, and `verify` finds whatever is no longer so."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forging import certify_again
from safetensors.torch import load_file, save_file
from tiny_anatomies import BLOCKS, TINY, config_of

from steer.baking.bake import bake
from steer.baking.certificate import CERTIFICATE, Certificate
from steer.baking.checks import certified_edit
from steer.baking.verify import verify
from steer.checkpoint import staging
from steer.checkpoint.reader import SINGLE, CheckpointFiles
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Method, Strengths
from steer.errors import CheckpointError

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]


def test_the_certificate_holds_what_was_measured(source: Path, baked: Path, ablation: Edit) -> None:
    cert = Certificate.load(baked)
    assert (cert.writers_edited, cert.writers_found) == (7, 7)
    before, after = load_file(source / SINGLE), load_file(baked / SINGLE)
    q = ablation.basis()
    for proof in cert.writers:
        facing = [t[proof.tensor].double() for t in (before, after)]
        was, now = (float(((w @ q) if proof.axis else (q.T @ w)).norm()) for w in facing)
        assert proof.before == pytest.approx(was, rel=1e-4)
        assert proof.after == pytest.approx(now, rel=1e-2, abs=1e-6)
    assert 0 < cert.worst_remaining < 0.02
    assert cert.source_files[SINGLE] == staging.hash_file(source / SINGLE)
    assert set(cert.files) == set(files_in(baked)) - {CERTIFICATE}
    kept = Direction.load(baked / cert.directions[0].file)
    assert kept.provenance == {"seed": 7} == cert.directions[0].provenance
    assert torch.allclose(kept.vector, ablation.ablate[0].vector)
    card = (baked / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "license: apache-2.0" in card
    assert "7 of 7" in card
    assert "steer bake source out --ablate moral" in card


def test_partial_strength_is_the_share_that_remains(
    source: Path, tmp_path: Path, make_direction: MakeDirection
) -> None:
    cert = bake(source, tmp_path / "out", Edit(ablate=(make_direction(),), strength=0.6, blocks=(1, 1)))
    assert (cert.writers_edited, cert.writers_found) == (2, 7)
    assert all(w.remaining == pytest.approx(0.4, abs=0.01) for w in cert.writers)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def test_one_flipped_bit_in_any_file_is_found(baked: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(baked, tmp_path / "out"))
    verify(out)
    rng = random.Random(0)
    for name in files_in(out):
        intact = (out / name).read_bytes()
        for at in {0, len(intact) - 1, rng.randrange(len(intact)), rng.randrange(len(intact))}:
            _flip(out / name, at)
            with pytest.raises(CheckpointError) as caught:
                verify(out)
            assert "\n" not in str(caught.value), name
            (out / name).write_bytes(intact)
    verify(out)


def _add_tensor(out: Path) -> None:
    tensors = load_file(out / SINGLE)
    save_file(tensors | {"model.extra": torch.zeros(1)}, out / SINGLE, metadata={"format": "pt"})


def _drop_tensor(out: Path) -> None:
    tensors = load_file(out / SINGLE)
    del tensors["model.norm.weight"]
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda out: (out / "tokenizer.json").unlink(), "file tokenizer.json is missing"),
        (lambda out: (out / SINGLE).unlink(), f"file {SINGLE} is missing"),
        (lambda out: (out / "more.txt").write_text(""), "file more.txt was not expected"),
        (lambda out: (out / "more.safetensors").write_text(""), "file more.safetensors was not expected"),
        (_add_tensor, "tensor model.extra was not expected"),
        (_drop_tensor, r"tensor model\.norm\.weight is missing"),
        (lambda out: (out / CERTIFICATE).unlink(), "expected a certificate, found none"),
        (shutil.rmtree, "expected a baked checkpoint, found no directory"),
    ],
)
def test_what_is_missing_or_unexpected_is_named(
    baked: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    out = Path(shutil.copytree(baked, tmp_path / "out"))
    damage(out)
    with pytest.raises(CheckpointError, match=sentence):
        verify(out)


def test_weights_that_still_hold_the_direction_fail_even_when_their_hashes_are_forged(
    source: Path, baked: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(baked, tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj.weight"
    _forge(out, {name: load_file(source / SINGLE)[name]})
    with pytest.raises(CheckpointError, match=rf"{name} puts .* into the ablated directions"):
        verify(out)


def test_a_bias_of_another_size_fails_even_when_its_hash_is_forged(
    source: Path, tmp_path: Path, make_direction: MakeDirection
) -> None:
    out = tmp_path / "out"
    bake(source, out, Edit(add=((make_direction(), 1.0),)))
    name = "model.layers.1.mlp.down_proj.bias"
    _forge(out, {name: -load_file(out / SINGLE)[name]})
    with pytest.raises(CheckpointError, match=rf"{name} is not the bias certified"):
        verify(out)


@pytest.mark.parametrize("name", TINY)
def test_every_layout_keeps_its_names_and_its_config_and_a_writer_put_back_is_found(
    tmp_path: Path, make_direction: MakeDirection, name: str
) -> None:
    source, out = TINY[name].save(tmp_path / "source", torch.bfloat16), tmp_path / "out"
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    cert = bake(source, out, Edit(ablate=(make_direction(),)))
    verify(out)
    before, after = (CheckpointFiles.open(p) for p in (source, out))
    heads = set(after.tensors) - set(before.tensors)
    assert set(before.tensors) <= set(after.tensors)
    assert heads == set() or (len(heads) == 1 and cert.config == {"tie_word_embeddings": False})
    assert config_of(out) == config_of(source) | cert.config
    assert (out / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()
    edited = {w.tensor for w in cert.writers}
    for t in before.tensors.values():
        assert (before.read(t) == after.read(after.tensors[t.name])) == (t.name not in edited), t.name

    last = max(cert.writers, key=lambda w: (w.block or 0, not w.bias))
    _forge(out, {last.tensor: load_file(source / SINGLE)[last.tensor]})
    with pytest.raises(CheckpointError, match=r"puts .* into the ablated directions"):
        verify(out)


def _forge(out: Path, change: dict[str, torch.Tensor]) -> None:
    """Change tensors and make the certificate say that the file is as it was written."""
    save_file(load_file(out / SINGLE) | change, out / SINGLE, metadata={"format": "pt"})
    certify_again(out)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: Edit(ablate=(d,), strength=0.25, blocks=(1, 2), add=((d, 0.1),)),
        lambda d: Edit(ablate=(d,), strengths=Strengths(Kernel(1, 2, 0.1, 0.7), 0.5, 0.3)),
        lambda d: Edit(ablate=(d,), method=Method("biprojected", True, torch.randn(BLOCKS, 32))),
        lambda d: Edit(add=((d, -1.0),)),
    ],
)
def test_the_edit_can_be_read_from_the_output_again(
    source: Path, tmp_path: Path, make_direction: MakeDirection, edit: Callable[[Direction], Edit]
) -> None:
    wanted = edit(make_direction())
    found = certified_edit(tmp_path / "out", bake(source, tmp_path / "out", wanted))
    assert found.describe() == wanted.describe()
    for block in (None, *range(BLOCKS)):
        for kind in ("embedding", "attention", "mlp"):
            if (block is None) == (kind == "embedding"):
                assert found.strength_at(block, kind) == wanted.strength_at(block, kind)
        if wanted.ablate:
            assert torch.allclose(found.basis(block).abs(), wanted.basis(block).abs(), atol=1e-6)


def test_a_shard_that_is_missing_and_one_that_was_not_there_are_named(
    tmp_path: Path, tiny_llama: TinyLlama, ablation: Edit
) -> None:
    source = tiny_llama(tmp_path / "source", shards=True)
    bake(source, tmp_path / "out", ablation)
    shard = CheckpointFiles.open(source).shards[1].name
    data = (tmp_path / "out" / shard).read_bytes()
    (tmp_path / "out" / shard).unlink()
    with pytest.raises(CheckpointError, match=f"file {shard} is missing"):
        verify(tmp_path / "out")
    (tmp_path / "out" / shard).write_bytes(data)
    (tmp_path / "out" / "model-00009-of-00009.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"file model-00009-of-00009\.safetensors was not expected"):
        verify(tmp_path / "out")


def files_in(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
