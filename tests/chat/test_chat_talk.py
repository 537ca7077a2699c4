"""What can be done with messages: other replies, edits, more of one, characters, and what is kept."""

from __future__ import annotations

import pytest

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend, fit
from steer.chat.stored import saved_chats
from steer.core.cards import load_card
from steer.core.profile import Profile, ProfileSlider
from steer.core.sampler import Sampler
from steer.errors import CheckpointError, SteerError, UsageError


def say(chat: Chat, text: str = "hello"):
    reply = chat.say(text)
    assert chat.writer.wait(20)
    return reply


def again(chat: Chat):
    reply = chat.regenerate()
    assert chat.writer.wait(20)
    return reply


def texts(chat: Chat) -> list[str]:
    return [m.text for m in chat.path()]


def test_regenerated_replies_stand_side_by_side_each_from_its_own_seed(chat):
    first = say(chat)
    second, third = again(chat), again(chat)
    assert len({r.written.seed for r in (first, second, third)}) == 3
    assert len({r.text for r in (first, second, third)}) == 3
    assert chat.place_of(third.id) == (2, 3)
    assert texts(chat) == ["hello", third.text]
    assert not chat.swipe(third.id, +1)
    assert chat.swipe(third.id, -1)
    assert texts(chat) == ["hello", second.text]
    assert chat.swipe(second.id, -1)
    assert not chat.swipe(first.id, -1)


def test_a_seed_gives_the_same_reply_again(chat, new_chat):
    seconds = []
    for c in (chat, new_chat()):
        say(c)
        seconds.append(again(c).text)
    assert seconds[0] == seconds[1]


def test_the_chat_goes_on_from_the_alternative_that_is_on_the_page(chat, model):
    first = say(chat)
    again(chat)
    chat.swipe(chat.path()[-1].id, -1)
    after = say(chat, "well")
    assert texts(chat) == ["hello", first.text, "well", after.text]
    sampler = chat.sampler.__dict__ | {"seed": after.written.seed}
    said = [{"role": m.role, "content": m.text} for m in chat.path()[:3]]
    assert after.text == model.chat(said, **sampler)


def test_an_edited_message_begins_a_branch_and_the_old_one_is_a_swipe_away(chat):
    say(chat)
    old = texts(chat)
    say(chat, "well")
    reply = chat.edit(chat.path()[0].id, " truth ")
    assert chat.writer.wait(20)
    assert texts(chat) == ["truth", reply.text]
    assert chat.swipe(chat.path()[0].id, -1)
    assert texts(chat)[:2] == old
    assert len(texts(chat)) == 4


def test_an_edited_reply_stays_as_it_was_edited_and_is_what_the_model_reads(chat, model):
    reply = say(chat)
    chat.edit(reply.id, "ba be bi")
    after = say(chat, "well")
    assert texts(chat) == ["hello", "ba be bi", "well", after.text]
    said = [{"role": m.role, "content": m.text} for m in chat.path()[:3]]
    assert after.text == model.chat(said, **(chat.sampler.__dict__ | {"seed": after.written.seed}))


def test_a_lengthened_reply_begins_as_it_was_and_goes_on_as_one_text(chat, model):
    reply = say(chat)
    begun, ids = reply.text, reply.written.ids
    assert chat.lengthen() is reply
    assert chat.writer.wait(20)
    assert reply.text.startswith(begun + " ")
    assert reply.written.ids[: len(ids)] == ids
    assert len(reply.written.ids) == 2 * len(ids)
    assert model.text(reply.written.ids) == reply.text
    assert [s.start for s in reply.written.stretches] == [0, 12]
    # Another stream of random numbers: the same draws on much the same text would say the same again.
    assert reply.written.ids[len(ids) :] != ids


def test_greedily_a_reply_in_two_parts_is_the_reply_in_one(new_chat):
    halves, whole = new_chat(), new_chat()
    for c, n in ((halves, 6), (whole, 12)):
        c.sampler = Sampler(max_new_tokens=n, temperature=0, repetition_penalty=1.2)
        say(c)
    halves.lengthen()
    assert halves.writer.wait(20)
    assert texts(halves) == texts(whole)


def test_an_ended_reply_that_is_lengthened_does_not_end_at_once(chat, model):
    reply = say(chat)
    ids = reply.written.ids
    at = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    ends = ids[at]
    chat.delete(chat.path()[0].id)
    model.end_token_ids = frozenset([ends])
    reply = say(chat)
    assert (reply.written.ending, len(reply.written.ids)) == ("ended", at)
    chat.lengthen()
    assert chat.writer.wait(20)
    assert len(reply.written.ids) > at
    assert ends not in reply.written.ids


def test_an_edited_reply_can_be_lengthened(chat):
    reply = say(chat)
    chat.edit(reply.id, "ba be")
    chat.lengthen()
    assert chat.writer.wait(20)
    assert reply.text.startswith("ba be ")
    assert len(reply.written.ids) == 14


def test_to_delete_a_message_takes_what_follows_and_the_chat_goes_on(chat):
    say(chat)
    kept = texts(chat)
    say(chat, "well")
    chat.delete(chat.path()[2].id)
    assert texts(chat) == kept
    again(chat)
    chat.delete(chat.path()[1].id)
    assert texts(chat) == kept
    assert len(texts(chat)) == 2


def test_a_message_without_a_reply_is_joined_by_the_next_one(chat, model):
    reply = say(chat)
    chat.delete(reply.id)
    assert texts(chat) == ["hello"]
    after = say(chat, "well")
    sampler = chat.sampler.__dict__ | {"seed": after.written.seed}
    assert after.text == model.chat("hello\n\nwell", **sampler)
    chat.delete(chat.path()[1].id)
    assert again(chat).text == reply.text


def test_a_character_speaks_first_and_its_other_greetings_are_swipes(chat, model):
    card = {
        "spec": "chara_card_v2", "spec_version": "2.0",
        "data": {
            "name": "Ann", "description": "truth", "first_mes": "hello friend", "alternate_greetings": ["well well"],
            "system_prompt": "{{original}}", "post_history_instructions": "yes",
            "extensions": {"steer": {"profile": {"name": "calm", "sliders": [{"slider": "moral", "amount": -0.1}]}}},
        },
    }  # fmt: skip
    import json

    say(chat)
    chat.play(load_card(json.dumps(card).encode()))
    assert texts(chat) == ["hello friend"]
    assert chat.system.endswith("\n\nyes")
    assert dict(chat.sliders) == {"moral": -0.1}
    assert chat.place_of(chat.path()[0].id) == (0, 2)
    chat.swipe(chat.path()[0].id, +1)
    reply = say(chat, "yes")
    said = [{"role": "assistant", "content": "well well"}, {"role": "user", "content": "yes"}]
    with model.steered({"moral": -0.1}):
        assert reply.text == model.chat(said, system=chat.system, **chat.sampler.__dict__)
    for act in (chat.regenerate, chat.lengthen):
        chat.clear()
        chat.play(load_card(json.dumps(card).encode()))
        with pytest.raises(UsageError, match="say something first"):
            act()


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_message_is_refused_and_changes_nothing(chat, text):
    with pytest.raises(UsageError, match="expected some text"):
        chat.say(text)
    assert texts(chat) == []


def test_half_a_character_that_a_page_sends_is_mended(chat):
    say(chat, "hello \ud83d")
    assert texts(chat)[0] == "hello \ufffd"


def test_a_chat_that_the_model_cannot_reply_to_is_as_it_was(chat, model):
    say(chat)
    kept = texts(chat)
    model.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="chat template"):
        chat.say("well")
    with pytest.raises(CheckpointError, match="chat template"):
        chat.edit(chat.path()[0].id, "well")
    assert texts(chat) == kept


def test_a_reply_that_breaks_off_keeps_its_words_and_one_without_any_is_taken_back(chat, model):
    decoder = model.hf.get_submodule(model.anatomy.decoder_module)
    kept, said = decoder.forward, []

    def fail(*args, **kwargs):
        said.append(0)
        if len(said) > 4:
            raise RuntimeError("out of memory")
        return kept(*args, **kwargs)

    decoder.forward = fail
    reply = say(chat)
    assert (reply.written.ending, len(reply.written.ids)) == ("error", 4)
    assert "out of memory" in chat.last_error
    again(chat)
    assert texts(chat) == ["hello", reply.text]
    assert "out of memory" in chat.last_error
    decoder.forward = kept
    again(chat)
    assert chat.last_error is None


def test_an_empty_reply_is_taken_back_and_said(chat, model):
    first = say(chat).written.ids[0]
    chat.clear()
    model.end_token_ids = frozenset([first])
    say(chat)
    assert texts(chat) == ["hello"]
    assert "empty reply" in chat.last_error


def test_a_profile_brings_sliders_and_sampler_and_leaves_length_and_seed(chat):
    chat.use(
        Profile("wild", sampler=Sampler(temperature=1.5, seed=44), preset=None, sliders=(ProfileSlider("moral", 1),))
    )
    assert (chat.sampler.temperature, chat.sampler.seed, chat.sampler.max_new_tokens) == (1.5, 3, 12)
    assert dict(chat.sliders) == {"moral": 1.0}
    assert chat.profile("mine").sliders == (ProfileSlider("moral", 1.0),)
    with pytest.raises(SteerError, match="kindness"):
        chat.use(Profile("x", sliders=(ProfileSlider("kindness", 1),)))
    assert dict(chat.sliders) == {"moral": 1.0}


def test_a_chat_is_kept_as_it_goes_and_opened_again(chat, model, home):
    assert saved_chats() == ([], [])
    chat.system = "truth"
    chat.panel.set("moral", -0.25)
    say(chat)
    again(chat)
    ((listed,), _) = saved_chats()
    assert (listed.place, listed.title, listed.messages) == (chat.saved, "hello", 2)
    back = Chat(LocalBackend(model), place=listed.place)
    assert texts(back) == texts(chat)
    assert back.place_of(back.path()[-1].id) == (1, 2)
    assert (back.system, dict(back.sliders), back.sampler) == ("truth", {"moral": -0.25}, chat.sampler)
    assert back.path()[-1].written.ids == chat.path()[-1].written.ids
    assert back.path()[-1].written.profile.sliders == (ProfileSlider("moral", -0.25, "add"),)
    # It goes on as it would have.
    assert say(back, "well").text == say(chat, "well").text
    back.close()


def test_a_chat_held_with_another_model_opens_without_its_sliders(chat, model, home):
    chat.panel.set("moral", -0.25)
    say(chat)
    for file in (home / "directions").rglob("*.safetensors"):
        file.unlink()
    back = Chat(LocalBackend(model), place=chat.saved)
    assert texts(back) == texts(chat)
    assert not back.sliders
    assert "left out" in back.last_error
    assert "moral" in back.last_error


def test_a_new_chat_leaves_the_old_one_where_it_was_saved(chat):
    say(chat)
    first = chat.saved
    chat.clear()
    assert texts(chat) == []
    say(chat, "well")
    assert chat.saved != first
    assert {c.title for c in saved_chats()[0]} == {"hello", "well"}


def test_a_chat_that_is_not_to_be_kept_is_not(new_chat):
    say(new_chat(keep=False))
    assert saved_chats() == ([], [])


def test_a_full_disk_is_reported_and_the_chat_goes_on(chat, home):
    home.mkdir(exist_ok=True)
    (home / "chats").write_text("in the way")
    say(chat)
    assert "could not be written" in chat.last_error
    assert len(texts(chat)) == 2


def test_a_chat_longer_than_the_context_goes_on_without_its_oldest_messages(new_chat, model):
    chat = new_chat(4)
    chat.system = "truth"
    for i in range(12):
        reply = say(chat, " ".join(["hello"] * 40 + ["ba", "be"][: i % 2 + 1]))
        assert len(reply.written.ids) == 4
    assert chat.last_error is None
    assert chat.backend.left_out > 0
    said = [{"role": m.role, "content": m.text} for m in chat.path()[chat.backend.left_out : -1]]
    assert said[0]["role"] == "user"
    sampler = chat.sampler.__dict__ | {"seed": reply.written.seed}
    assert reply.text == model.chat(said, system="truth", **sampler)
    chat.clear()
    say(chat)
    assert chat.backend.left_out == 0


def test_what_is_left_out_stays_left_out_until_more_must_go():
    def count(messages) -> list[int]:
        return [0] * sum(len(m["content"]) for m in messages)

    def chat(n: int):
        roles = ("user", "assistant")
        return tuple({"role": roles[i % 2], "content": "xx"} for i in range(n))

    cuts, left_out = [], 0
    for n in range(1, 120, 2):
        ids, left_out = fit(chat(n), count, 100, 20, left_out=left_out)
        assert len(ids) + 20 <= 100
        cuts.append(left_out)
    assert cuts == sorted(cuts)
    assert len(set(cuts)) < len(cuts) / 1.5
    with pytest.raises(UsageError, match="the last message: expected at most 99 tokens"):
        fit(({"role": "user", "content": "x" * 100},), count, 100, 20)
    assert len(fit(({"role": "user", "content": "x" * 95},), count, 100, 20)[0]) == 95
