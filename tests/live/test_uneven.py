"""What a bake can do beyond sliders, tried as hooks: kernels of strengths, directions that spare the neutral mean."""

from __future__ import annotations

import pytest
import torch

from steer.errors import UnsupportedError
from steer.live.model import load
from steer.values.edit import Edit
from steer.values.method import Kernel, Method, Strengths
from steer.weights.bake import bake

NEUTRAL = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
WAYS = {
    "a kernel for each kind of writer": {"strengths": Strengths(Kernel(1.0, 2.0, 0.1), Kernel(2, 1.5), 0.3)},
    "projected": {"method": Method("projected", neutral=NEUTRAL)},
    "biprojected, by a kernel": {
        "method": Method("biprojected", neutral=NEUTRAL),
        "strengths": Strengths(0.5, Kernel(1, 3)),
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
    assert source.steering.hook_count == 0


def test_a_norm_preserving_ablation_is_no_hook(model, make_direction):
    with (
        pytest.raises(UnsupportedError, match="norm-preserving"),
        model.edited(Edit((make_direction("one"),), method=Method(norm_preserving=True))),
    ):
        pass
