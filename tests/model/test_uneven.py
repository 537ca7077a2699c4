"""What a bake can do beyond sliders, tried as hooks: kernels of strengths, directions that spare the neutral mean."""

from __future__ import annotations

import pytest
import torch
from tiny_chat import hooks_on

from steer.baking.bake import bake
from steer.core.edit import Edit
from steer.core.method import Kernel, Method, Strengths
from steer.model.steered import load
from steer.model.steering.module_edits import module_edits

NEUTRAL = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
WAYS = {
    "a kernel for each kind of writer": {"strengths": Strengths(Kernel(1.0, 2.0, 0.1), Kernel(2, 1.5), 0.3)},
    "projected": {"method": Method("projected", neutral=NEUTRAL)},
    "biprojected, by a kernel": {
        "method": Method("biprojected", neutral=NEUTRAL),
        "strengths": Strengths(0.5, Kernel(1, 3)),
    },
    "norms kept": {"method": Method(norm_preserving=True)},
    "norms kept, a share left": {"method": Method(norm_preserving=True), "strength": 0.6},
    "norms kept, biprojected, by a kernel": {
        "method": Method("biprojected", True, NEUTRAL),
        "strengths": Strengths(0.5, Kernel(1, 3), 0.3),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_do_what_the_bake_writes(tiny_llama, chat_checkpoint, tmp_path, make_direction, ids, way):
    edit = Edit((make_direction("one"), make_direction("two", seed=4)), **WAYS[way])
    source = load(chat_checkpoint, dtype=torch.float64)
    source.hf.save_pretrained(tmp_path / "source")
    source.tokenizer.save_pretrained(tmp_path / "source")
    bake(tmp_path / "source", tmp_path / "out", edit)
    with torch.inference_mode():
        plain = source.hf(ids).logits
        with source.edited(edit):
            hooked = source.hf(ids).logits
        baked = load(tmp_path / "out", dtype=torch.float64).hf(ids).logits
        rows = ids[:1].expand(2, -1)
        with source.steering.applied([None, edit]):
            both = source.hf(rows).logits
    assert float((hooked - plain).abs().max()) > 1e-3
    torch.testing.assert_close(hooked, baked, rtol=0, atol=1e-9)
    torch.testing.assert_close(both[0], plain[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(both[1], hooked[0], rtol=0, atol=1e-12)
    assert hooks_on(source) == 0


def test_every_row_of_a_batch_has_its_own(chat_checkpoint, make_direction, ids):
    one, two = make_direction("one"), make_direction("two", seed=4)
    edits = [
        None,
        *(Edit((one, two), **way) for way in WAYS.values()),
        Edit((one,), strengths=Strengths(0.5, 0.0)),
        Edit((two,), strengths=Strengths(1.0, Kernel(0, 1)), add=((one, 0.5),)),
        Edit((one,), 0.5, (0, 1)),
    ]
    model = load(chat_checkpoint, dtype=torch.float64)
    with torch.inference_mode():
        with model.steering.applied(edits):
            together = model.hf(ids[:1].expand(len(edits), -1)).logits
        for edit, row in zip(edits, together, strict=True):
            with model.steering.applied([edit]):
                torch.testing.assert_close(model.hf(ids[:1]).logits[0], row, rtol=0, atol=1e-10)


def test_candidates_that_share_a_direction_share_a_product(model, make_direction):
    one = make_direction("one")
    edits = [Edit((one,), strengths=Strengths(s, 0.5)) for s in (0.25, 0.5, 0.75)] * 8
    sets = [module.set for module in module_edits(tuple(edits), model.anatomy, model.steering.gain).values()]
    assert all(len(columns) == 1 and columns[0].write.data.shape[1] == 1 for columns in sets)
