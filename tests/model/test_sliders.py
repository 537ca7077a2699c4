"""Sliders by name: what they accept, what they report, what they cost to move."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_chat import hooks_on, keep_direction

from steer.chat.session import Session
from steer.core.direction import Direction
from steer.core.sampler import Sampler
from steer.core.slider import Slider
from steer.errors import MismatchError, UsageError
from steer.model.sliders import BUDGET, Sliders

SHORT = Sampler(max_new_tokens=12, temperature=1.0)


def hook_ids(model) -> list[int]:
    return [key for m in model.hf.modules() for key in m._forward_hooks]


@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf, "much", None, [1], 10**400])
def test_an_amount_that_is_no_finite_number_is_a_usage_error_and_moves_nothing(model, moral, amount):
    model.sliders.put(moral, 0.5)
    with pytest.raises(UsageError, match="moral"):
        model.sliders["moral"] = amount
    with pytest.raises(UsageError, match="moral"), model.steered({moral: amount}):
        pass
    assert dict(model.sliders) == {"moral": 0.5}
    assert hooks_on(model) == 1


@pytest.mark.parametrize("amount", [-0.5, 1.5])
def test_ablate_takes_amounts_from_0_to_1(model, moral, amount):
    with pytest.raises(UsageError, match="0 to 1"):
        model.sliders.put(Slider(moral, "ablate"), amount)
    assert hooks_on(model) == 0


def test_a_direction_of_another_width_is_a_mismatch_that_names_both(model, make_direction):
    with pytest.raises(MismatchError, match=r"width 64.*width 32"):
        model.sliders.put(make_direction("wide", width=64), 1.0)
    assert len(model.sliders) == 0


def test_a_name_that_the_library_knows_can_be_moved(model, known_moral):
    assert list(model.sliders.known()) == ["moral"]
    assert model.sliders["moral"] == 0.0
    model.sliders["moral"] = -1.0
    assert dict(model.sliders) == {"moral": -1.0}
    assert torch.equal(model.sliders.slider("moral").target.vector, known_moral.vector)


def test_an_unknown_name_is_a_usage_error_that_says_how_to_find_it(model, known_moral):
    with pytest.raises(UsageError, match=r"found moral; make it with: steer find \S+ kindness"):
        model.sliders["kindness"] = 1.0


def test_a_direction_of_another_checkpoint_is_not_known(tiny_llama, model, moral, tmp_path, monkeypatch):
    from tiny_chat import save_tiny_chat

    monkeypatch.setenv("STEER_HOME", str(tmp_path))
    keep_direction(save_tiny_chat(tiny_llama, tmp_path / "other", seed=5), moral)
    assert model.sliders.known() == {}


def test_changing_an_amount_registers_no_hook(model, moral, make_direction):
    model.sliders.put(moral, 0.1)
    model.sliders.put(Slider(make_direction("gone", seed=3), "ablate"), 0.1)
    registered = hook_ids(model)
    for step in range(2, 9):
        model.sliders["moral"] = -step / 10
        model.sliders["gone"] = step / 10
    assert hook_ids(model) == registered
    assert hooks_on(model) == len(registered)


def test_deleting_a_slider_is_setting_it_to_0(model, moral):
    model.sliders.put(moral, 1.0)
    del model.sliders["moral"]
    assert (model.sliders["moral"], len(model.sliders), hooks_on(model)) == (0.0, 0, 0)


def test_sliders_are_a_mapping_whose_members_are_those_that_were_set(model, moral):
    sliders = model.sliders
    sliders.put(moral)
    sliders.reset()
    assert sliders.get("nonsense") is None
    assert sliders.get("moral", 9.0) == 9.0
    assert sliders["moral"] == 0.0
    assert "moral" not in sliders
    for absent in (lambda: sliders["nonsense"], lambda: sliders.__delitem__("moral"), lambda: sliders.pop("nonsense")):
        with pytest.raises(KeyError, match=r"slider '(nonsense|moral)': expected"):
            absent()
    assert sliders.pop("moral", None) is None
    assert sliders.setdefault("moral", 0.5) == 0.5
    assert sliders.setdefault("moral", 0.7) == 0.5
    assert dict(sliders) == {"moral": 0.5}
    assert sliders.pop("moral") == 0.5
    assert not sliders


def test_the_warning_comes_when_the_sum_at_a_site_reaches_the_budget(model, make_direction):
    def direction(name: str, site: int) -> Direction:
        made = make_direction(name, site=site, seed=site)
        return Direction(name, site, made.vector, with_mean=1.0, without_mean=0.0, residual_norm=2.0)

    for name, site in (("a", 1), ("b", 1), ("c", 2)):
        model.sliders.put(direction(name, site))
    model.sliders.update(a=1.0, c=1.5)
    assert (model.sliders.share(1), model.sliders.share(2)) == (pytest.approx(0.5), pytest.approx(0.75))
    assert model.sliders.warnings() == []
    # a and b point the same way: against each other they cancel.
    model.sliders["b"] = -0.75
    assert model.sliders.share(1) == pytest.approx(0.125)
    model.sliders["b"] = 2 * (BUDGET - 0.5) + 0.001
    assert model.sliders.share(1) == pytest.approx(BUDGET + 0.0005)
    model.sliders["b"] = 0.76
    assert len(model.sliders.warnings()) == 1
    assert "after block 1 by 0.88" in model.sliders.warnings()[0]


def test_sessions_on_one_model_never_feel_each_others_sliders(model, moral):
    def session(amount: float) -> Session:
        made = Session(model, sampler=SHORT)
        made.sliders.put(moral, amount)
        return made

    alone = ["".join(session(a).reply("hello friend")) for a in (-3.0, 0.0, 3.0)]
    assert len(set(alone)) == 3
    together = [session(a).reply("hello friend") for a in (-3.0, 0.0, 3.0)]
    said = [""] * 3
    for _ in range(SHORT.max_new_tokens):
        for i, pieces in enumerate(together):
            said[i] += next(pieces, "")
            assert hooks_on(model) == 0
    assert said == alone


def test_a_session_keeps_what_was_said_and_takes_back_a_message_that_got_no_reply(model):
    session = Session(model, system="be ba", sampler=SHORT)
    whole = "".join(session.reply("hello"))
    assert session.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": whole}]
    pieces = session.reply("well")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert session.messages[2:] == [
        {"role": "user", "content": "well"},
        {"role": "assistant", "content": begun},
    ]
    session.reply("never asked for").close()
    model.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UsageError, match="no such role"):
        list(session.reply("yes"))
    assert len(session.messages) == 4
    session.clear()
    assert session.messages == []


def test_sliders_that_are_not_live_leave_the_model_alone(model, moral):
    sliders = Sliders(model, live=False)
    sliders.put(moral, 1.0)
    assert hooks_on(model) == 0
    assert sliders.current is not None
    sliders.reset()
    assert sliders.current is None
