"""Every anatomy: what a bake writes computes what exact ablation of each residual write would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_anatomies import BLOCKS, TINY, WIDTH, Tiny, ablated, load, logits, span
from tiny_chat import hooks_on
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.verify import verify
from steer.checkpoint.ablation import Ablation
from steer.checkpoint.anatomy import Anatomy
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Strengths
from steer.errors import UnsupportedError
from steer.model.steering.steering import Steering

MakeDirection = Callable[..., Direction]
KINDS = pytest.mark.parametrize("kind", TINY.values(), ids=TINY.keys())


EDITS: dict[str, Callable[[MakeDirection], Edit]] = {
    "ablate": lambda d: Edit(ablate=(d(),)),
    "several, partly, in blocks": lambda d: Edit(ablate=(d(), d("b", seed=8)), strength=0.6, blocks=(1, 2)),
}


@KINDS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_baked_logits_are_those_of_the_source_with_every_residual_writeablated(
    tmp_path: Path, make_direction: MakeDirection, kind: Tiny, edit: Callable[[MakeDirection], Edit]
) -> None:
    source = kind.save(tmp_path / "source", torch.float64)
    wanted = edit(make_direction)
    bake(source, tmp_path / "out", wanted)
    model = load(source)
    plain = logits(model)
    with ablated(kind, model, wanted):
        expected = logits(model)
    assert (expected - plain).abs().max() > 0.05
    assert (logits(load(tmp_path / "out")) - expected).abs().max() < 1e-9
    verify(tmp_path / "out")


@KINDS
def test_bf16_logits_agree_to_rounding(tmp_path: Path, make_direction: MakeDirection, kind: Tiny) -> None:
    source = kind.save(tmp_path / "source", torch.bfloat16)
    wanted = Edit(ablate=(make_direction(),))
    bake(source, tmp_path / "out", wanted)
    model = load(source)
    plain = logits(model)
    with ablated(kind, model, wanted):
        expected = logits(model)
    # Every weight that was edited lost up to half a unit in its last place, 2^-9 of it.
    assert (logits(load(tmp_path / "out")) - expected).norm() < 0.04 * (expected - plain).norm()
    verify(tmp_path / "out")


def _streams(model: Any) -> list[Tensor]:
    """The residual stream after each block."""
    base = next(m for m in model.children() if len(list(m.children())) > 1)
    blocks = next(m for m in base.children() if isinstance(m, torch.nn.ModuleList))
    seen: list[Tensor] = []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == BLOCKS
    return seen


@KINDS
def test_the_residual_stream_of_the_baked_model_has_nothing_along_the_directions(
    tmp_path: Path, make_direction: MakeDirection, kind: Tiny
) -> None:
    source = kind.save(tmp_path / "source", torch.float64)
    directions = (make_direction(), make_direction("b", site=2, seed=8))
    bake(source, tmp_path / "out", Edit(ablate=directions))
    q = span([d.vector for d in directions], None)
    # The norms after Gemma's and OLMo's writers compute in fp32, whatever the dtype.
    slack = 1e-9 if kind.norms is None else 1e-6
    for before, after in zip(_streams(load(source)), _streams(load(tmp_path / "out")), strict=True):
        assert float((before @ q).norm() / before.norm()) > 0.05
        assert float((after @ q).norm() / after.norm()) < slack


@KINDS
def test_live_hooks_ablate_where_the_bake_does(tmp_path: Path, make_direction: MakeDirection, kind: Tiny) -> None:
    source = kind.save(tmp_path / "source", torch.float64)
    wanted = Edit(ablate=(make_direction(),))
    model = load(source)
    anatomy = Anatomy.of(model.config.to_dict(), "tiny")
    assert (anatomy.blocks, anatomy.width) == (BLOCKS, WIDTH)
    steering = Steering(model, anatomy)
    slack = 1e-9 if kind.norms is None else 1e-6  # these norms compute in fp32, whatever the dtype
    with steering.applied([wanted]):
        assert hooks_on(model) == 1 + 2 * BLOCKS
        live, streams = logits(model), _streams(model)
    for h in streams:
        assert float((h @ wanted.ablate[0].vector.double()).norm() / h.norm()) < slack
    bake(source, tmp_path / "out", wanted)
    baked = logits(load(tmp_path / "out"))
    assert (live - baked).abs().max() < 1e-9


@KINDS
def test_hooks_at_the_live_writers_compute_what_the_bake_does(
    tmp_path: Path, make_direction: MakeDirection, kind: Tiny
) -> None:
    source = kind.save(tmp_path / "source", torch.float64)
    strengths = Strengths(Kernel(peak=1, width=2), Kernel(peak=0, width=3, floor=0.1, height=0.8), embedding=0.5)
    wanted = Edit(ablate=(make_direction(), make_direction("b", seed=8)), strengths=strengths)
    bake(source, tmp_path / "out", wanted)
    model = load(source)
    anatomy = Anatomy.of(model.config.to_dict(), "tiny")
    offset = anatomy.layout.gain_offset
    ablation = Ablation(wanted, lambda name: model.get_parameter(name).detach().double() + offset)
    for writer in anatomy.live_writers:
        q, s = ablation.subspace(writer), ablation.strength(writer)

        def hook(module: object, args: object, output: Any, q: Tensor = q, s: float = s) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            return (y - s * (y @ q) @ q.T, *output[1:]) if isinstance(output, tuple) else y - s * (y @ q) @ q.T

        model.get_submodule(writer.module).register_forward_hook(hook)
    assert (logits(model) - logits(load(tmp_path / "out"))).abs().max() < 1e-9
    verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gpt-neox sequential", "gpt-oss", "llama", "llama biases"])
def test_adds_go_into_the_biases_that_the_architecture_has(
    tmp_path: Path, make_direction: MakeDirection, name: str
) -> None:
    kind = TINY[name]
    source = kind.save(tmp_path / "source", torch.float64)
    direction = make_direction(site=1)
    edit = Edit(ablate=(make_direction("b", site=2, seed=8),), blocks=(0, 1), add=((direction, -1.5),))
    bake(source, tmp_path / "out", edit)
    model = load(source)
    with ablated(kind, model, edit):
        expected = logits(model)
    assert (logits(load(tmp_path / "out")) - expected).abs().max() < 1e-9
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma2", "has a norm between its MLPs and the residual stream"),
        ("olmo2", "has a norm between its MLPs and the residual stream"),
        ("mistral", "has no biases in its MLPs"),
        ("mixtral", "has experts without biases in its MLPs"),
        ("qwen3-moe", "has experts without biases in its MLPs"),
    ],
)
def test_an_add_that_no_bias_can_carry_is_refused(
    tmp_path: Path, make_direction: MakeDirection, name: str, why: str
) -> None:
    source = TINY[name].save(tmp_path / "source", torch.bfloat16)
    with pytest.raises(UnsupportedError, match=why):
        bake(source, tmp_path / "out", Edit(add=((make_direction(), 1.0),)))
    assert not (tmp_path / "out").exists()
