"""On the default merge, with the directions and the dictionary that ship: what people see."""

from __future__ import annotations

import pytest

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend
from steer.core.sampler import Sampler
from steer.core.slider import Slider
from steer.model.steered import SteeredModel, load

pytestmark = [
    pytest.mark.model,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning"),
]
QUESTION = "My friend lied to me about why he missed my party. What now?"


@pytest.fixture(scope="module")
def merged() -> SteeredModel:
    """The default merge, as `make demo` leaves it."""
    from steer.checkpoint.merge import is_merge_of
    from steer.checkpoint.shipped import RECIPE

    place = RECIPE.parents[2] / "demo" / "merged"
    if not is_merge_of(place, RECIPE):
        pytest.skip("no default merge in demo/; run make demo")
    return load(place)


@pytest.fixture
def chat(merged):
    chat = Chat(LocalBackend(merged))
    chat.sampler = Sampler(max_new_tokens=40, temperature=0, repetition_penalty=1.05)
    yield chat
    chat.close()


def test_traits_that_ship_are_at_hand_in_words(chat):
    rows = {r.name: r for r in chat.panel.rows()}
    assert {"moralizing", "compliance"} <= set(rows)
    assert rows["moralizing"].description.startswith("Lectures about right and wrong")
    assert rows["moralizing"].safe == (-2.0, 2.0)
    assert {"moralizing-latent", "moralizing-set"} <= chat.sliders.known().keys()


def test_side_by_side_and_inside_show_the_sliders_effect(chat):
    chat.panel.set("moralizing", -1.0)
    comparison = chat.compare(QUESTION, chat.side("plain"), chat.side("now"))
    assert comparison.wait(300)
    plain, steered = (chat.take(comparison, side) for side in ("left", "right"))
    assert plain.text != steered.text
    look = chat.inside(steered.id, ["moralizing", "compliance"])
    assert "".join(look.pieces) == steered.text
    off = sum(b - a for a, b in zip(look.steered["moralizing"], look.plain["moralizing"], strict=True)) / len(look.kl)
    assert off == pytest.approx(1.0, abs=0.05)  # amount -1 moves the projection by one gap
    assert 0.01 < sum(look.kl) / len(look.kl) < 1.0
    assert max(chat.inside(plain.id, ["moralizing"]).kl) == 0.0


def test_features_that_fire_on_a_message_are_pinned_by_a_click(chat):
    features = chat.features
    assert features.traits() == ["compliance", "moralizing"]
    found = features.fires_on("You should never lie. Honesty is a moral duty.")
    assert len(found) == 12
    assert "".join(p for p, _ in found[0].marks) == "You should never lie. Honesty is a moral duty."
    row = chat.panel.pin(found[0].card.name)
    chat.panel.set(row.name, 0.5)
    assert chat.panel.budgets()[0].site == 14
    best = features.search(trait="moralizing", limit=5)
    assert abs(best[0].record.traits["moralizing"].auroc - 0.5) > 0.4
    scores = {c.record.index: c.output_score for c in features.search(trait="moralizing", limit=1000)}
    assert scores[3494]["moralizing"] == pytest.approx(0.642, abs=0.01)


def test_a_feature_held_where_it_is_reads_there(chat):
    target = chat.sliders.slider("L14/3494").target
    chat.sliders.put(Slider(target, "clamp"), 0.5)
    reply = chat.say(QUESTION)
    assert chat.writer.wait(300)
    look = chat.inside(reply.id, ["L14/3494"])
    assert sum(look.steered["L14/3494"]) > sum(look.plain["L14/3494"])
