"""What an edit does to the residual stream of a running model, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tiny_chat import hooks_on, logits, residuals
from torch import Tensor

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.slider import Slider
from steer.errors import MismatchError, UsageError
from steer.model.steered import SteeredModel

SITES = range(3)
ROUNDING = 3e-6  # transformers computes norms and softmax in fp32, whatever the weights are


def test_a_neutral_profile_is_bit_identical_to_none_and_has_no_hook(model, moral, ids):
    plain = logits(model, ids)
    model.sliders.put(moral, 0.0)
    with model.steered({moral: 0.0, Slider(moral, "ablate"): 0.0}):
        assert hooks_on(model) == 0
        assert torch.equal(logits(model, ids), plain)
    model.sliders["moral"] = 1.0
    assert not torch.equal(logits(model, ids), plain)
    model.sliders["moral"] = 0.0
    assert hooks_on(model) == 0
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("amount", [-1.5, 0.25, 1.0])
def test_add_moves_the_residual_by_amount_times_gap_and_earlier_sites_not_at_all(model64, moral, ids, amount):
    before = residuals(model64, ids)
    with model64.steered({moral: amount}):
        after = residuals(model64, ids)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1] + amount * moral.gap * moral.vector.double())
    assert not torch.equal(after[2], before[2])
    torch.testing.assert_close(
        (after[1] - before[1]) @ moral.vector.double(), torch.full((2, 7), amount * 2.0, dtype=torch.float64)
    )


def test_adds_compose_by_sum(model64, moral, make_direction, ids):
    other, elsewhere = make_direction("other", seed=8), make_direction("elsewhere", site=0, seed=9)
    before = residuals(model64, ids)
    with model64.steered({moral: 0.5, other: -2.0}):
        both = residuals(model64, ids)
    shift = 0.5 * moral.gap * moral.vector.double() - 2.0 * other.gap * other.vector.double()
    torch.testing.assert_close(both[1], before[1] + shift, rtol=0, atol=1e-14)
    with model64.steered({elsewhere: 1.0}):
        first = residuals(model64, ids)
    with model64.steered({elsewhere: 1.0, moral: 1.0}):
        second = residuals(model64, ids)
    assert torch.equal(second[0], first[0])
    assert torch.equal(second[1], first[1] + moral.gap * moral.vector.double())


def test_ablate_leaves_every_site_orthogonal_to_the_directions(model64, moral, make_direction, ids):
    other = make_direction("other", seed=8)
    with model64.steered({Slider(moral, "ablate"): 1.0, Slider(other, "ablate"): 1.0}):
        for h in residuals(model64, ids):
            assert float((h @ moral.vector.double()).abs().max()) < 1e-12
            assert float((h @ other.vector.double()).abs().max()) < 1e-12
            assert float(h.norm(dim=-1).min()) > 0.1


def test_ablate_is_idempotent(model64, moral, ids):
    with model64.steered({Slider(moral, "ablate"): 1.0}):
        once = residuals(model64, ids)
    twin = Direction("twin", 2, -moral.vector)
    with model64.steered({Slider(moral, "ablate"): 1.0, Slider(twin, "ablate"): 1.0}):
        twice = residuals(model64, ids)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


def test_rows_may_have_edits_of_their_own(model64, moral, make_direction, ids):
    ids = ids[:1].repeat(4, 1)
    other = make_direction("other", site=0, seed=8)
    edits = [
        None,
        Edit(add=((moral, 1.0),)),
        Edit((moral,), 0.5, (1, 2)),
        Edit((moral, other), add=((other, -1.0),)),
    ]
    with model64.steering.applied(edits):
        together = residuals(model64, ids)
    for row, edit in enumerate(edits):
        with model64.steering.applied([edit]):
            alone = residuals(model64, ids[row : row + 1])
        for site in SITES:
            torch.testing.assert_close(together[site][row], alone[site][0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("way", ["steered", "edited", "record", "nested"])
def test_after_an_exception_no_hook_is_left_and_the_sliders_are_as_before(model, moral, ids, way):
    plain = logits(model, ids)
    model.sliders.put(moral, 0.75)
    steered, hooks, at = logits(model, ids), hooks_on(model), dict(model.sliders)

    def fail() -> None:
        with ExitStack() as inside:
            if way in ("steered", "nested"):
                inside.enter_context(model.steered({moral: -1.0}))
            if way in ("edited", "nested"):
                inside.enter_context(model.edited(Edit((moral,))))
            if way in ("record", "nested"):
                inside.enter_context(model.record())
            model.hf(input_ids=ids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (hooks_on(model), dict(model.sliders)) == (hooks, at)
    assert torch.equal(logits(model, ids), steered)
    model.sliders.reset()
    assert hooks_on(model) == 0
    assert torch.equal(logits(model, ids), plain)


def test_a_bad_edit_changes_nothing(model, moral, make_direction, ids):
    model.sliders.put(moral, 0.5)
    before = logits(model, ids)
    wide, late = make_direction("wide", width=64), make_direction("late", site=3)
    for bad, error in ((wide, MismatchError), (late, UsageError)):
        with pytest.raises(error), model.steered({moral: 1.0, bad: 1.0}):
            pass
        with pytest.raises(error):
            model.sliders.put(bad, 1.0)
        assert dict(model.sliders) == {"moral": 0.5}
        assert torch.equal(logits(model, ids), before)


def test_a_site_that_the_recording_lacks_leaves_no_hook(model):
    with pytest.raises(AttributeError), model.record([0, 7]):
        pass
    assert hooks_on(model) == 0


def test_a_recording_sees_the_steered_residual_whichever_came_first(model64, moral, ids):
    before = residuals(model64, ids)
    with torch.inference_mode(), model64.record([1]) as recording, model64.steered({moral: 1.0}):
        model64.hf(input_ids=ids)
    assert torch.equal(recording[1], before[1] + moral.gap * moral.vector.double())


def test_a_slider_moved_inside_steered_holds_once_the_block_ends(model, moral, ids):
    model.sliders.put(moral, 1.0)
    wanted = logits(model, ids)
    model.sliders.reset()
    with model.steered({moral: -1.0}):
        inside = logits(model, ids)
        model.sliders["moral"] = 1.0
        assert torch.equal(logits(model, ids), inside)
    assert torch.equal(logits(model, ids), wanted)


def test_residuals_are_those_of_transformer_lens(
    chat_checkpoint: Path, model: SteeredModel, ids: Tensor, make_direction: Callable[..., Direction]
):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(chat_checkpoint), device="cpu", dtype=torch.float32)
    moral = make_direction("moral")
    shift = -1.5 * moral.gap * moral.vector
    for amount, hooks in ((0.0, []), (-1.5, [("blocks.1.hook_out", lambda h, hook: h + shift)])):
        with model.steered({moral: amount}):
            ours = residuals(model, ids)
        with torch.inference_mode(), bridge.hooks(fwd_hooks=hooks):
            _, theirs = bridge.run_with_cache(ids)
        for site in SITES:
            torch.testing.assert_close(ours[site], theirs[f"blocks.{site}.hook_resid_post"], rtol=1e-5, atol=1e-5)
