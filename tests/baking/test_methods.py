"""What each method spares and keeps, and how strengths are given block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_anatomies import BLOCKS, FILE, TINY, WIDTH, Tiny
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import CERTIFICATE, Certificate
from steer.baking.verify import verify
from steer.checkpoint import staging
from steer.checkpoint.projection import ablate, through_norm
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Method, Strengths
from steer.errors import CheckpointError, MismatchError, UsageError

MakeDirection = Callable[..., Direction]
KEEP = Method(norm_preserving=True)
NEUTRAL = torch.randn(BLOCKS, WIDTH, generator=torch.Generator().manual_seed(3))


def _rows(kind: Tiny, tensors: dict[str, Tensor], cert: Certificate) -> dict[str, tuple[Tensor, Tensor]]:
    """Edited tensor -> (the vectors it writes as rows, fp64; the gain of the norm after it, or ones)."""
    out = {}
    for proof in cert.writers:
        gain = torch.ones(WIDTH, dtype=torch.float64)
        if kind.norms is not None and proof.block is not None:
            norm = kind.norms[proof.kind == "mlp"]
            gain = tensors[f"{kind.block.format(proof.block)}.{norm}.weight"].double() + kind.unit
        out[proof.tensor] = tensors[proof.tensor].double().movedim(proof.axis, -1).reshape(-1, WIDTH), gain
    return out


NAMES = ["llama biases", "gpt2", "gemma3", "olmo2", "mixtral", "qwen3-moe stacked", "gpt-oss"]


@pytest.mark.parametrize("strength", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_norm_preserving_keeps_every_column_and_leaves_what_the_strength_leaves(
    tmp_path: Path, make_direction: MakeDirection, name: str, strength: float
) -> None:
    kind = TINY[name]
    source = kind.save(tmp_path / "source", torch.float64)
    edit = Edit(ablate=(make_direction(), make_direction("b", seed=8)), strength=strength, method=KEEP)
    cert = bake(source, tmp_path / "out", edit)
    before = _rows(kind, load_file(source / FILE), cert)
    after = _rows(kind, load_file(tmp_path / "out" / FILE), cert)
    assert len(before) > 2 * BLOCKS
    for tensor, (was, gain) in before.items():
        now = after[tensor][0]
        u = through_norm(edit.basis(), gain)
        torch.testing.assert_close(now.norm(dim=1), was.norm(dim=1), rtol=1e-12, atol=0)
        torch.testing.assert_close(now @ u, (1 - strength) * (was @ u), rtol=1e-9, atol=1e-12)
        if strength == 1.0:  # through the norm as well nothing arrives in the stream
            assert float((gain * now @ edit.basis()).abs().max()) < 1e-12
        # What is outside the directions keeps its course.
        aside = [x - (x @ u) @ u.T for x in (was, now)]
        assert torch.cosine_similarity(*aside, dim=1).min() > 1 - 1e-12
    verify(tmp_path / "out")


def test_norm_preserving_in_bf16_holds_to_rounding(tmp_path: Path, make_direction: MakeDirection) -> None:
    source = TINY["llama"].save(tmp_path / "source", torch.bfloat16)
    edit = Edit(ablate=(make_direction(),), strength=0.8, method=KEEP)
    cert = bake(source, tmp_path / "out", edit)
    before = _rows(TINY["llama"], load_file(source / FILE), cert)
    after = _rows(TINY["llama"], load_file(tmp_path / "out" / FILE), cert)
    for tensor, (was, _) in before.items():
        torch.testing.assert_close(after[tensor][0].norm(dim=1), was.norm(dim=1), rtol=4e-3, atol=0)
    assert all(w.remaining == pytest.approx(0.2, abs=0.01) for w in cert.writers)
    assert cert.edit["method"] == {"projection": "plain", "norm_preserving": True}


def test_a_column_that_is_nothing_but_the_direction_vanishes_and_makes_no_noise(make_direction: MakeDirection) -> None:
    r = make_direction().vector
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight = torch.stack([r, 3 * r, torch.zeros(WIDTH), torch.ones(WIDTH)], dim=1).to(dtype)
        was = weight.double().norm(dim=0)
        # A unit vector in fp32 is not quite one in fp64; a basis is.
        ablate(weight, r.double()[:, None] / r.double().norm(), 0, 1.0, norm_preserving=True)
        now = weight.double().norm(dim=0)
        assert torch.isfinite(weight).all()
        assert now[2] == 0
        assert now[3] == pytest.approx(float(was[3]), rel=4e-3)
        if dtype != torch.bfloat16:  # rounded to bf16 the columns are no longer along r
            assert (now[:2] < 1e-5 * was[:2]).all()


@pytest.mark.parametrize("projection", ["projected", "biprojected"])
def test_what_is_removed_is_orthogonal_to_the_neutral_mean(
    tmp_path: Path, make_direction: MakeDirection, projection: Any
) -> None:
    source = TINY["llama"].save(tmp_path / "source", torch.float64)
    directions = (make_direction(site=1), make_direction("b", site=2, seed=8))
    edit = Edit(ablate=directions, method=Method(projection, neutral=NEUTRAL))
    cert = bake(source, tmp_path / "out", edit)
    before, after = load_file(source / FILE), load_file(tmp_path / "out" / FILE)
    for proof in cert.writers:
        was, now = (t[proof.tensor].double().movedim(proof.axis, -1).reshape(-1, WIDTH) for t in (before, after))
        removed, vectors = was - now, []
        for d in directions:
            site = d.site if projection == "projected" or proof.block is None else proof.block
            mean = NEUTRAL[site].double() / NEUTRAL[site].double().norm()
            vectors.append(d.vector.double() - (d.vector.double() @ mean) * mean)
            if projection == "biprojected" and proof.block is not None:
                assert float((removed @ mean).abs().max()) < 1e-12
        q, _ = torch.linalg.qr(torch.stack(vectors, dim=1))
        torch.testing.assert_close(removed, was @ q @ q.T, rtol=1e-9, atol=1e-9)
        assert float(removed.norm() / was.norm()) > 0.1
    verify(tmp_path / "out")


def test_biprojected_goes_through_norms_as_well(tmp_path: Path, make_direction: MakeDirection) -> None:
    kind = TINY["gemma2"]
    source = kind.save(tmp_path / "source", torch.float64)
    edit = Edit(ablate=(make_direction(),), method=Method("biprojected", neutral=NEUTRAL))
    cert = bake(source, tmp_path / "out", edit)
    after = _rows(kind, load_file(tmp_path / "out" / FILE), cert)
    for proof in cert.writers:
        now, gain = after[proof.tensor]
        assert float((gain * now @ edit.basis(proof.block)).abs().max()) < 1e-12
    verify(tmp_path / "out")


def test_gram_schmidt_twice_leaves_nothing_of_a_mean_that_nearly_is_the_direction() -> None:
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).double()
    nearly = mean + 1e-3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).double()
    method = Method("projected", neutral=mean.float()[None])
    stored = mean.float().double()
    left = method.project(nearly, 0, None)
    assert float(left.norm()) == pytest.approx(1.0, abs=1e-12)
    assert abs(float(left @ stored / stored.norm())) < 1e-15
    with pytest.raises(UsageError, match="the direction is the neutral mean itself"):
        method.project(mean, 0, None)


def test_a_direction_of_which_nothing_is_left_is_refused_before_anything_is_written(
    tmp_path: Path, make_direction: MakeDirection
) -> None:
    source = TINY["llama"].save(tmp_path / "source", torch.bfloat16)
    neutral = NEUTRAL.clone()
    neutral[2] = make_direction().vector * 7  # at another site than its own: only biprojected meets it
    bake(source, tmp_path / "out", Edit(ablate=(make_direction(),), method=Method("projected", neutral=neutral)))
    with pytest.raises(UsageError, match="the direction is the neutral mean itself"):
        bake(source, tmp_path / "no", Edit(ablate=(make_direction(),), method=Method("biprojected", neutral=neutral)))
    assert [p.name for p in tmp_path.iterdir() if "no" in p.name] == []


def test_the_neutral_means_are_kept_so_that_the_proof_can_be_repeated(
    tmp_path: Path, make_direction: MakeDirection
) -> None:
    source, out = TINY["llama"].save(tmp_path / "source", torch.float32), tmp_path / "out"
    bake(source, out, Edit(ablate=(make_direction(),), method=Method("biprojected", neutral=NEUTRAL)))
    cert = Certificate.load(out)
    assert cert.neutral is not None
    (out / CERTIFICATE).unlink()
    save_file({"neutral": NEUTRAL.flip(0).contiguous()}, out / cert.neutral)
    forged = replace(cert, files=cert.files | {cert.neutral: staging.hash_file(out / cert.neutral)})
    forged.save(out)
    with pytest.raises(CheckpointError, match="into the ablated directions"):
        verify(out)


STRENGTHS = Strengths(attention=Kernel(peak=1.0, width=2.0, floor=0.2), mlp=Kernel(peak=0.0, width=2.0, height=0.9))


def test_kernels_are_straight_lines_from_the_peak_to_the_floor() -> None:
    kernel = Kernel(peak=10.5, width=4, floor=0.25, height=0.75)
    assert [kernel.at(b) for b in (0, 6, 10, 11, 15, 99)] == [0.25, 0.25, 0.6875, 0.6875, 0.25, 0.25]
    assert Kernel(peak=3, width=2).at(3) == 1.0
    assert Kernel(peak=3, width=2).at(4) == 0.5
    assert Kernel(peak=3, width=2).at(5) == 0.0


@pytest.mark.parametrize("keep", [False, True])
def test_each_writer_loses_what_its_kernel_says(tmp_path: Path, make_direction: MakeDirection, keep: bool) -> None:
    source = TINY["llama"].save(tmp_path / "source", torch.float64)
    method = Method(norm_preserving=keep)
    edit = Edit(ablate=(make_direction(),), strengths=STRENGTHS, method=method)
    cert = bake(source, tmp_path / "out", edit)
    got = {(w.block, w.kind): round(1 - w.remaining, 9) for w in cert.writers}
    assert got == {
        (0, "attention"): 0.6,
        (1, "attention"): 1.0,
        (2, "attention"): 0.6,
        (0, "mlp"): 0.9,
        (1, "mlp"): 0.45,  # and none in block 2, nor in the embedding
    }
    assert cert.strength == 0.45
    assert cert.worst_remaining == pytest.approx(0.55)
    assert (cert.writers_edited, cert.writers_found) == (5, 7)
    before, after = load_file(source / FILE), load_file(tmp_path / "out" / FILE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {w.tensor for w in cert.writers}
    assert "strength 0.45 to 1" in (tmp_path / "out" / "README.md").read_text()
    verify(tmp_path / "out")


def test_strengths_and_blocks_go_together(make_direction: MakeDirection) -> None:
    edit = Edit(ablate=(make_direction(),), strengths=STRENGTHS, blocks=(0, 1))
    assert edit.strength_at(1, "attention") == 1.0
    assert edit.strength_at(2, "attention") == 0.0
    assert not edit.embedding
    assert [edit.edits_block(b) for b in range(3)] == [True, True, False]
    plain = Edit(ablate=(make_direction(),), strength=0.4)
    assert {plain.strength_at(b, k) for b, k in ((None, "embedding"), (0, "attention"), (9, "mlp"))} == {0.4}
    whole = Edit(plain.ablate, strengths=Strengths(0.5, 0.25, embedding=0.75))
    assert whole.embedding
    assert whole.strength_at(None, "embedding") == 0.75
    assert whole.describe()["strengths"] == {"attention": 0.5, "mlp": 0.25, "embedding": 0.75}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: Kernel(peak=3, width=0), "a width above 0"),
        (lambda d: Kernel(peak=3, width=2, floor=0.8, height=0.5), "0 <= floor <= height <= 1"),
        (lambda d: Strengths(attention=1.5), "strength of attention: expected a number from 0 to 1, found 1.5"),
        (lambda d: Strengths(embedding=Kernel(1, 2)), "strength of embedding"),  # type: ignore[arg-type]
        (lambda d: Method("sideways"), "expected one of plain, projected, biprojected"),  # type: ignore[arg-type]
        (lambda d: Method("projected"), "expected neutral means, found none"),
        (lambda d: Method(neutral=NEUTRAL), "expected no neutral means, found some"),
        (lambda d: Method("projected", neutral=NEUTRAL * 0), "not zero"),
        (lambda d: Edit(ablate=(d,), strength=0.5, strengths=Strengths()), "found 0.5 and both"),
    ],
)
def test_values_that_cannot_be_are_refused(
    make_direction: MakeDirection, make: Callable[[Direction], object], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make(make_direction())
    assert sentence in str(caught.value)


def test_an_edit_that_does_not_fit_the_checkpoint_is_refused(tmp_path: Path, make_direction: MakeDirection) -> None:
    source = TINY["llama"].save(tmp_path / "source", torch.bfloat16)
    far = Edit(ablate=(make_direction(),), strengths=Strengths(Kernel(30, 2), Kernel(30, 2)))
    with pytest.raises(UsageError, match="move the peak of the kernel"):
        bake(source, tmp_path / "out", far)
    short = Edit(ablate=(make_direction(),), method=Method("biprojected", neutral=NEUTRAL[:2]))
    with pytest.raises(MismatchError, match="measure them on this checkpoint"):
        bake(source, tmp_path / "out", short)
