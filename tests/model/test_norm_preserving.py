"""Norm-preserving ablations as hooks, on every anatomy whose writers are matrices: the bake's logits, exactly."""

from __future__ import annotations

import pytest
import torch
from tiny_anatomies import TINY
from tiny_anatomies import load as load_tiny
from tiny_chat import hooks_on, save_tiny_chat

from steer.baking.bake import bake
from steer.checkpoint.anatomy import Anatomy
from steer.core.edit import Edit
from steer.core.method import Method, Strengths
from steer.core.sampler import Sampler
from steer.errors import UnsupportedError
from steer.model.steered import SteeredModel, load
from steer.model.steering.steering import Steering

KEEP = Method(norm_preserving=True)
DENSE = [name for name, tiny in TINY.items() if tiny.writes[1] != "mlp"]


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", DENSE)
def test_hooks_do_what_the_bake_writes(tmp_path, make_direction, ids, name, strength):
    source = TINY[name].save(tmp_path / "source", torch.float64)
    edit = Edit((make_direction("one"), make_direction("two", seed=4)), strength, method=KEEP)
    bake(source, tmp_path / "out", edit)
    plain, baked = load_tiny(source), load_tiny(tmp_path / "out")
    steering = Steering(plain, Anatomy.of(plain.config.to_dict(), name))
    with torch.inference_mode():
        before, wanted = plain(ids).logits, baked(ids).logits
        with steering.applied([edit]):
            hooked = plain(ids).logits
    assert float((hooked - before).abs().max()) > 1e-3
    torch.testing.assert_close(hooked, wanted, rtol=0, atol=1e-9)
    assert hooks_on(plain) == 0


def test_rows_of_a_batch_keep_to_their_own(model64, make_direction, ids):
    one, two = make_direction("one"), make_direction("two", seed=4)
    edits = [
        None,
        Edit((one,), method=KEEP),
        Edit((one, two), 0.3, method=KEEP, add=((two, 0.5),)),
        Edit((two,), strengths=Strengths(0.5, 1.0), method=KEEP),
        Edit((one,), 0.5),
        Edit((one,), strengths=Strengths(1.0, 0.25)),
        Edit((one,), blocks=(1, 2), method=KEEP),
    ]
    with torch.inference_mode():
        with model64.steering.applied(edits):
            together = model64.hf(ids[:1].expand(len(edits), -1)).logits
        alone = []
        for edit in edits:
            with model64.steering.applied([edit]):
                alone.append(model64.hf(ids[:1]).logits[0])
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-10)
    assert len({round(float(a.sum()), 6) for a in alone}) == len(edits)
    assert hooks_on(model64) == 0


def test_replies_of_a_batch_are_those_of_each_alone(model64: SteeredModel, make_direction):
    # Rows end one by one, and those that are left have to go by their own edits still.
    edits = [Edit((make_direction("one"),), s, method=KEEP) if s else None for s in (0.0, 1.0, 0.5, 0.9)]
    chats = [[{"role": "user", "content": text}] for text in ("abab", "bcbc acac", "dada", "abab abab")]
    sampler = Sampler(temperature=0.0, max_new_tokens=16)
    together = model64.replies(chats, sampler, edits)
    assert together == [
        model64.replies([c], sampler, [e], keys=[i])[0] for i, (c, e) in enumerate(zip(chats, edits, strict=True))
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_in_one_tensor_are_refused_by_name(tmp_path, make_direction, name):
    source = TINY[name].save(tmp_path / "source", torch.float32)
    plain = load_tiny(source)
    steering = Steering(plain, Anatomy.of(plain.config.to_dict(), "mine"))
    assert steering.cannot_keep_norms is not None
    with pytest.raises(UnsupportedError, match=r"mine: a norm-preserving .* of model\.layers\.0\.mlp, expected"):
        steering.set([Edit((make_direction(),), method=KEEP)])


def test_four_bits_are_refused(tiny_llama, tmp_path, make_direction):
    pytest.importorskip("bitsandbytes")
    model = load(save_tiny_chat(tiny_llama, tmp_path / "wide", hidden_size=128, head_dim=32), four_bit=True)
    with pytest.raises(UnsupportedError, match="that is not quantised, found Linear4bit"):
        model.steering.set([Edit((make_direction(width=128),), method=KEEP)])


def test_hooks_for_others_code_say_that_they_cannot(model64, make_direction):
    with pytest.raises(UnsupportedError, match="changes the inputs of writers"):
        model64.hooks(Edit((make_direction(),), method=KEEP))
