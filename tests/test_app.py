"""The page's logic on a tiny checkpoint, without a browser: what is drawn, and what its widgets change."""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from synthetic_eval import synthetic_eval
from tiny_chat import keep_direction, save_tiny_chat
from tiny_family import tune

from steer.chat.chat import Chat
from steer.chat.costs import Cost, effects_report
from steer.chat.evolving import Evolution
from steer.chat.stored import saved_chats
from steer.chat.voting import keep_vote
from steer.checkpoint.merge import MANIFEST
from steer.checkpoint.shipped import EFFECTS
from steer.core.direction import Direction
from steer.lineage.lineage import Generation, Lineage, Move, Node, Settings
from steer.measure.eval_report import write_eval_report
from steer.page.parts.cost import sliders_cost

APP = Path(__file__).parents[1] / "app.py"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A separate STEER_HOME, and no model cached from the test before."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["app.py"])
    st.cache_resource.clear()
    yield tmp_path
    st.cache_resource.clear()


@pytest.fixture
def checkpoint(home: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that can chat, named to the page."""
    path = save_tiny_chat(tiny_llama, home / "chat", eos_token_id=None, max_position_embeddings=512)
    monkeypatch.setenv("STEER_MODEL", str(path))
    return path


@pytest.fixture
def moral(checkpoint: Path, make_direction: Callable[..., Direction]) -> Direction:
    """A direction known for the checkpoint."""
    direction = make_direction("moral")
    keep_direction(checkpoint, direction)
    return direction


def page() -> AppTest:
    at = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not at.exception
    if "chat" in at.session_state:
        chat = chat_of(at)
        chat.sampler = type(chat.sampler)(max_new_tokens=12)
    return at


def chat_of(at: AppTest) -> Chat:
    return at.session_state["chat"]


def written(at: AppTest) -> str:
    """Wait for the reply; its text on the page."""
    assert chat_of(at).writer.wait(60)
    at.run()
    assert not at.exception
    return at.chat_message[-1].markdown[0].value


def say(at: AppTest, text: str) -> str:
    at.chat_input[0].set_value(text).run()
    assert not at.exception
    return written(at)


def click(at: AppTest, label: str) -> None:
    next(b for b in at.button if b.label == label and not b.disabled).click().run()
    assert not at.exception


def moral_slider(at: AppTest):
    return next(s for s in at.sidebar.slider if s.label == "moral")


@pytest.mark.slow
def test_a_chat_stays_on_the_page_and_a_new_one_keeps_it_among_the_old(moral):
    at = page()
    first, second = say(at, "hello"), say(at, "well")
    shown = [(m.name, m.markdown[0].value) for m in at.chat_message]
    assert shown == [("user", "hello"), ("assistant", first), ("user", "well"), ("assistant", second)]
    click(at, "New chat")
    assert len(at.chat_message) == 0
    assert [c.title for c in saved_chats()[0]] == ["hello"]
    assert say(at, "hello") == first
    other = page()
    # The two are as old as each other: whichever is listed first, `hello` is what it began with.
    click(other, "Open")
    assert other.chat_message[0].markdown[0].value == "hello"


def test_a_slider_changes_the_reply_and_undo_reset_and_the_switch_put_it_back(moral):
    at = page()
    plain = say(at, "hello")
    slider = moral_slider(at)
    assert slider.min < 0 < slider.max
    slider.set_value(slider.max).run()
    assert chat_of(at).sliders["moral"] == slider.max
    assert any("too far" in m.value for m in at.sidebar.markdown)
    click(at, "New chat")
    assert say(at, "hello") != plain
    click(at, "Undo")
    assert moral_slider(at).value == 0.0
    click(at, "Redo")
    assert moral_slider(at).value == slider.max
    at.sidebar.toggle[0].set_value(False).run()
    click(at, "New chat")
    assert say(at, "hello") == plain
    at.sidebar.toggle[0].set_value(True).run()
    click(at, "Reset all")
    click(at, "New chat")
    assert say(at, "hello") == plain


def test_the_operation_and_the_tokens_a_slider_acts_on_are_set_in_its_popover(moral):
    at = page()
    next(s for s in at.selectbox if s.label == "Operation").set_value("cap")
    next(n for n in at.number_input if n.label.startswith("Only the first")).set_value(5)
    click(at, "Apply")
    row = chat_of(at).panel.row("moral")
    assert (row.operation, row.when.first) == ("cap", 5)
    assert any("moral (cap)" in m.value and "off" in m.value for m in at.sidebar.markdown)


def test_what_can_be_done_with_a_message(moral):
    at = page()
    first = say(at, "hello")
    click(at, "Regenerate")
    second = written(at)
    assert second != first
    click(at, "Previous")
    assert at.chat_message[-1].markdown[0].value == first
    click(at, "Continue")
    assert written(at).startswith(first)
    next(b for b in at.button if b.label == "Edit").click().run()
    next(t for t in at.text_area if t.label == "Message").set_value("truth")
    click(at, "Save")
    written(at)
    assert at.chat_message[0].markdown[0].value == "truth"
    next(b for b in at.button if b.label == "Delete").click().run()
    assert at.chat_message[0].markdown[0].value == "hello"


def test_thumbs_under_a_reply_count_as_votes_and_enough_of_them_offer_a_slider(moral):
    at = page()
    say(at, "hello")
    click(at, "To my taste")
    assert chat_of(at).path()[-1].thumb == "good"
    click(at, "Not to my taste")
    click(at, "Not to my taste: take it back")
    assert chat_of(at).path()[-1].thumb is None
    click(at, "Not to my taste")
    at.session_state["part"] = "Compare"
    at.run()
    assert not at.exception
    assert next(b for b in at.button if b.label == "Slider from my votes").disabled
    assert "1 votes, thumbs under replies among them; 19 more are needed" in [c.value for c in at.caption]
    for i in range(19):
        keep_vote("m", [{"role": "user", "content": str(i)}], [(f"well {i}", "", None)], "good")
    at.run()
    assert not next(b for b in at.button if b.label == "Slider from my votes").disabled
    click(at, "Compare")
    assert at.session_state["comparison"].wait(60)
    at.run()
    click(at, "Left")
    assert [s.value for s in at.success] == ["You chose: without sliders"]
    assert any("21 votes" in c.value or "20 votes" in c.value for c in at.caption)


def test_the_system_prompt_and_the_sampler_are_heard(moral):
    at = page()
    plain = say(at, "hello")
    other = page()
    next(t for t in other.sidebar.text_area if t.label == "System prompt").set_value("truth").run()
    assert say(other, "hello") != plain
    preset = next(s for s in other.sidebar.selectbox if s.label == "Preset")
    preset.set_value("near-greedy").run()
    assert chat_of(other).sampler.temperature == 3.0
    next(n for n in other.number_input if n.label == "Top-k (0: all)").set_value(7)
    next(b for b in other.button if b.key and "apply sampler" in b.key).click().run()
    assert (chat_of(other).sampler.top_k, chat_of(other).sampler.temperature) == (7, 3.0)


def test_a_dropped_card_is_played_and_a_broken_one_is_reported(moral, home):
    at = page()
    upload = next(f for f in at.get("file_uploader") if f.label.startswith("Character card"))
    card = {"spec": "chara_card_v2", "spec_version": "2.0", "data": {"name": "Duke", "first_mes": "well friend"}}
    upload.set_value(("duke.json", json.dumps(card).encode(), "application/json")).run()
    click(at, "Play Duke")
    assert [(m.name, m.markdown[0].value) for m in at.chat_message] == [("assistant", "well friend")]
    upload = next(f for f in at.get("file_uploader") if f.label.startswith("Character card"))
    upload.set_value(("duke.png", b"no picture", "image/png")).run()
    assert not at.exception
    assert len(at.sidebar.error) == 1


def test_a_profile_is_kept_and_loaded(moral):
    at = page()
    amount = moral_slider(at).min
    moral_slider(at).set_value(amount).run()
    click(at, "Save")
    assert [t.value for t in at.toast] == ["kept: my character"]
    click(at, "Reset all")
    assert moral_slider(at).value == 0.0
    click(at, "Load")
    assert moral_slider(at).value == amount


def test_two_tabs_share_the_model_and_not_the_sliders(moral):
    one, two = page(), page()
    assert chat_of(one).backend.model is chat_of(two).backend.model
    plain = say(one, "hello")
    moral_slider(two).set_value(moral_slider(two).max).run()
    click(one, "New chat")
    assert say(one, "hello") == plain
    assert say(two, "hello") != plain
    assert moral_slider(one.run()).value == 0.0


def test_inside_a_reply_there_is_a_heat_map_with_a_legend(moral):
    at = page()
    say(at, "hello")
    at.session_state["part"] = "Inside"
    at.run()
    assert not at.exception
    assert not at.error
    assert any("st-heat" in h.proto.body for h in at.get("html"))


def test_an_old_chat_that_is_broken_is_named_beside_the_others(moral, home):
    at = page()
    say(at, "hello")
    broken = home / "home" / "chats" / "torn.json"
    broken.write_text('{"steer_chat": 1, "mess')
    click(at, "New chat")
    (warning,) = [w.value for w in at.sidebar.warning if "torn" in w.value]
    assert "expected a chat that this program saved" in warning
    click(at, "Open")
    assert at.chat_message[0].markdown[0].value == "hello"


def test_a_model_without_a_direction_chats_and_names_the_command_that_finds_one(checkpoint):
    at = page()
    assert f"steer find {checkpoint} moralizing" in at.sidebar.info[0].value
    assert say(at, "hello")


def test_a_model_that_cannot_be_loaded_is_reported_without_a_traceback(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "expected a whole safetensors file" in page().error[0].value


def test_a_model_that_is_not_there_is_reported_without_a_traceback(home, monkeypatch):
    monkeypatch.setenv("STEER_MODEL", str(home / "nowhere"))
    at = page()
    assert "nowhere: expected a checkpoint directory" in at.error[0].value
    assert len(at.chat_input) == 0


def test_a_part_that_breaks_is_one_line_and_the_rest_of_the_page_stays(moral, monkeypatch):
    at = page()
    monkeypatch.setattr(Chat, "features", property(lambda self: 1 / 0))
    at.session_state["part"] = "Features"
    at.run()
    assert not at.exception
    assert [e.value for e in at.error] == ["that did not work: ZeroDivisionError: division by zero"]
    assert moral_slider(at)


def test_a_page_without_a_model_offers_the_default_merge(home, monkeypatch):
    monkeypatch.delenv("STEER_MODEL", raising=False)
    at = page()
    assert "steer ui MODEL" in at.markdown[0].value
    assert [b.label for b in at.button] == ["Get the default merge"]


def test_no_error_or_toast_fetches_a_picture():
    def script() -> None:
        from steer.errors import SteerError
        from steer.page.guard import guarded, toast

        def draw() -> None:
            raise SteerError("bad ![](http://x/b.png)")

        toast("![](http://x/a.png)")
        guarded(draw)()

    at = AppTest.from_function(script, default_timeout=60).run()
    assert [e.value for e in (*at.toast, *at.error)] == ["!\\[](http://x/a.png)", "bad !\\[](http://x/b.png)"]


def test_thoughts_are_folded_away(checkpoint):
    at = page()
    asked = chat_of(at).conversation.add("user", "hello", None)
    chat_of(at).conversation.add("assistant", "<think>\nlie lie\n</think>\n\nwell yes", asked.id)
    at.run()
    assert not at.exception
    (folded,) = at.chat_message[-1].expander
    assert (folded.label, folded.markdown[0].value) == ("Thoughts", "lie lie")
    assert [m.value for m in at.chat_message[-1].markdown][-1] == "well yes"


def test_a_cards_lorebook_is_scanned_and_what_is_active_is_shown(moral):
    at = page()
    name = next(t for t in at.sidebar.text_input if t.label == "Your name")
    name.set_value("Viola").run()
    entries = [{"keys": ["truth"], "content": "ba be $x$", "name": "The $sea$"}, {"keys": ["lie"], "content": "bi"}]
    card = {"data": {"first_mes": "hello {{user}}", "personality": 3, "character_book": {"entries": entries}}}
    upload = next(f for f in at.get("file_uploader") if f.label.startswith("Character card"))
    upload.set_value(("duke.json", json.dumps(card).encode(), "application/json")).run()
    assert [w.value for w in at.sidebar.warning] == [
        "card: personality: expected text, found 3; put it in quotes; it counts as empty"
    ]
    click(at, "Play duke")
    assert at.chat_message[0].markdown[0].value == "hello Viola"
    say(at, "the truth")
    labels = [e.label for e in at.main.expander]
    assert labels == ["Lorebook: 1 active, 3 of 512 tokens"]
    used = chat_of(at).used
    assert used is not None
    assert (used.lorebook, used.reply, used.context) == (3, 12, 512)
    assert at.main.caption[0].value == f"Context: {used.describe()}"
    assert "lorebook 3, history" in used.describe()
    assert f"free {512 - sum(used.parts.values())} of 512 tokens" in used.describe()
    assert [m.value for m in at.main.expander[0].markdown] == ["**The \\$sea\\$** (3 tokens)"]
    book = next(f for f in at.get("file_uploader") if f.label.startswith("Lorebook"))
    book.set_value(("sea.json", json.dumps({"entries": [entries[1]]}).encode(), "application/json")).run()
    next(b for b in at.button if b.label == "Add it").click().run()
    say(at, "a lie")
    assert [e.label for e in at.main.expander] == ["Lorebook: 3 active, 5 of 512 tokens"]
    next(b for b in at.button if b.label == "Remove").click().run()
    assert [b.name for b in chat_of(at).lore.all] == ["duke's lorebook"]
    book = next(f for f in at.get("file_uploader") if f.label.startswith("Lorebook"))
    book.set_value(("sea.json", b"{}", "application/json")).run()
    next(b for b in at.button if b.label == "Add it").click().run()
    assert [t.value.split(":")[0] for t in at.toast] == ["sea"]
    assert not at.exception


def test_what_was_measured_of_a_profile_is_on_the_page_with_its_report(moral):
    at = page()
    at.session_state["part"] = "Cost"
    at.run()
    click(at, "Measure the sliders")
    assert "cost: expected a slider that moves something" in at.toast[0].value
    chat = chat_of(at)
    chat.panel.set("moral", -0.25)
    result = synthetic_eval(("chat", "noir"), ("consequences",), shifts={("noir", "consequences"): -0.5})
    folder = keep_cost(sliders_cost(chat, "noir"), result)
    other = keep_cost(replace(sliders_cost(chat, "other"), model="another model"), result)
    torn = keep_cost(sliders_cost(chat, "torn"), result)
    (torn / "eval" / "eval.json").write_text("{")
    at.run()
    assert not at.exception
    shown = [m.value for m in at.main.markdown]
    assert any(line.startswith("- Worse: consequences 0.") for line in shown)
    assert "**noir**" in shown
    assert "**other**" not in shown
    (error,) = [e.value for e in at.error]
    assert "eval.json" in error
    keys = {b.key for b in at.button if b.key}
    assert {f"open {folder.name}", f"again {folder.name}"} <= keys
    assert not any(other.name in k for k in keys)


def test_what_the_sliders_do_to_each_other_is_on_the_page_where_it_was_measured(checkpoint, moral):
    at = page()
    at.session_state["part"] = "Cost"
    at.run()
    button = "What the sliders do to each other"
    assert button not in [b.label for b in at.button]
    assert effects_report(chat_of(at).model) is None
    effects = [{"slider": "moral", "scorer": "war<mth", "change": 1.25, "low": 1.0, "high": None}]
    missing = {"humour": "no <reply>"}
    about = {"topics": 8, "tokens": 48, "seed": 0, "sliders": {}, "missing": missing, "effects": effects}
    place = keep_direction(checkpoint, moral).parent / EFFECTS
    place.write_text(json.dumps(about))
    at.run()
    click(at, button)
    assert not at.exception
    report = effects_report(chat_of(at).model)
    assert report is not None
    for text in ("war&lt;mth", "+1.2", "8 held-out topics", "humour: no direction. no &lt;reply&gt;"):
        assert text in report
    place.write_text("{")
    at.run()
    assert EFFECTS in at.error[0].value


def keep_cost(cost: Cost, result: dict[str, Any]) -> Path:
    """Leave what a finished evaluation leaves, and return its folder."""
    about = {"model": cost.model, "name": cost.name, "arguments": cost.arguments}
    (cost.folder / "eval").mkdir(parents=True, exist_ok=True)
    (cost.folder / "cost.json").write_text(json.dumps(about))
    (cost.folder / "eval" / "eval.json").write_text(json.dumps(result))
    write_eval_report(result, cost.folder / "eval" / "eval.html")
    return cost.folder


@pytest.fixture
def lineage(checkpoint: Path) -> Iterator[Lineage]:
    """A start and its child, which write different replies."""
    made = Lineage.create(checkpoint.parent / "lineage", Settings([]))
    recipe = {"merge_method": "linear", "models": [{"model": str(checkpoint)}]}
    nodes = [
        Node("0", Move("start"), "given", recipe),
        Node("1a", Move("add", "$x$ ![](http://x)"), "new", recipe, "0"),
    ]
    made.model("0").parent.mkdir()
    for number, node in enumerate(nodes):
        place = tune(checkpoint, made.model(node.id), number, 0.5)
        (place / MANIFEST).write_text(json.dumps({"weights": node.weights}))
        made.write(Generation(number, [node]))
    yield made
    Evolution(made.place).close()


def evolving(lineage: Lineage) -> AppTest:
    at = page()
    at.session_state["part"] = "Evolve"
    at.run()
    next(t for t in at.text_input if t.label == "Folder of the lineage").set_value(str(lineage.place)).run()
    next(t for t in at.text_input if t.label == "Vote as").set_value("kim").run()
    return at


def pair(at: AppTest) -> tuple[str, str]:
    """Wait for two replies; what they say."""
    end = time.monotonic() + 60
    while not any(b.label == "Left is better" for b in at.button):
        assert time.monotonic() < end, [e.value for e in at.error]
        at.run()
    assert not at.exception
    assert not at.error
    left, right = (plain_html(c.get("html")[0].proto.body) for c in at.main.columns[:2])
    return left, right


def plain_html(body: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", body))


@pytest.mark.slow
def test_who_votes_sees_two_replies_blind_and_each_vote_is_kept(lineage):
    at = evolving(lineage)
    assert at.main.markdown[0].value == "**no votes on 2 merges yet**"
    shown = pair(at)
    assert not any("1a" in c.value for c in at.main.caption)
    click(at, "Right is better")
    (vote,) = lineage.votes
    assert (vote.voter, set(vote.replies)) == ("kim", set(shown))
    assert vote.replies["ab".index(vote.outcome)] == shown[1]
    assert vote.outcome != vote.left
    assert "after 1 vote" in at.main.markdown[0].value
    assert pair(at) != shown
    click(at, "Take the last vote back")
    assert lineage.votes == []
    assert pair(at) == shown
    again = page()
    again.session_state["part"] = "Evolve"
    assert next(t for t in again.run().text_input if t.label == "Folder of the lineage").value == str(lineage.place)


@pytest.mark.slow
def test_a_scene_goes_on_with_a_message_of_ones_own(lineage):
    at = evolving(lineage)
    at.segmented_control(key="evolve mode").set_value("A scene").run()
    chosen = pair(at)[0]
    click(at, "Left is better")
    pair(at)
    (scene,) = [e for e in at.main.expander if e.label.startswith("The scene so far")]
    assert plain_html(scene.get("html")[-1].proto.body) == chosen
    next(t for t in at.text_input if t.label.startswith("Your message")).set_value("hello friend")
    click(at, "Ask it")
    pair(at)
    click(at, "Both are bad")
    assert [v.chat[-1] for v in lineage.votes][-1] == ["user", "hello friend"]
    assert lineage.votes[-1].chat[1] == ["assistant", chosen]


def test_the_family_tree_is_in_the_page(lineage):
    at = evolving(lineage)
    at.segmented_control(key="evolve view").set_value("Family tree").run()
    assert not at.exception
    assert not at.error
    (frame,) = at.get("iframe")
    assert 'id="node-1a"' in frame.proto.srcdoc


def test_a_voter_without_a_name_is_asked_for_one(lineage):
    at = evolving(lineage)
    next(t for t in at.text_input if t.label == "Vote as").set_value("../kim").run()
    assert [e.value.split(":")[0] for e in at.error] == ["vote as"]
    assert any(b.label == "Next generation" for b in at.button)


def test_a_start_that_fails_is_reported_and_the_form_keeps_what_was_typed(checkpoint, tmp_path):
    at = page()
    at.session_state["part"] = "Evolve"
    at.run()
    next(t for t in at.text_input if t.label == "Folder of the lineage").set_value(str(tmp_path / "new")).run()
    next(t for t in at.text_input if t.label == "Recipe to start from").set_value("nowhere.yml").run()
    click(at, "Start")
    job = Evolution(tmp_path / "new").job
    assert job is not None
    assert job.arguments[1:3] == ("nowhere.yml", str(tmp_path / "new"))
    assert job.wait(120)
    at.run()
    assert not at.exception
    (error,) = [e.value for e in at.error]
    assert error.startswith("nowhere.yml: expected")
    assert next(t for t in at.text_input if t.label == "Recipe to start from").value == "nowhere.yml"
    assert not (tmp_path / "new").exists()
