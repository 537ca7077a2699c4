"""What is read inside a reply is what was there when it was written."""

from __future__ import annotations

import math

import pytest
import torch
from serving import until
from tiny_chat import hooks_on

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend
from steer.chat.readout import look_inside, pieces_of
from steer.chat.writer import Task
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.errors import UsageError
from steer.model.decode import decode
from steer.model.steered import load


@pytest.fixture
def model(checkpoint):
    """In fp64: what is read is compared exactly."""
    model = load(checkpoint, dtype=torch.float64)
    model.end_token_ids = frozenset()
    model.tokenizer.eos_token = None
    return model


def recorded(model, chat, moves: dict[int, float]):
    """A reply with sliders that move at some tokens: its ids, its readings and logits as they were at that time."""
    prompt = model.prompt_ids([{"role": "user", "content": "hello"}])
    sliders = LocalBackend(model).sliders
    steps, ids, read, logits = decode(model, [prompt], chat.sampler), [], [], []
    keep = model.hf.get_output_embeddings().register_forward_hook(lambda m, a, out: logits.append(out[0, -1]))
    with model.record([1]) as recording:
        for i in range(chat.sampler.max_new_tokens):
            if i in moves:
                sliders["moral"] = moves[i]
            with model.steering.lock, model.steering.applied([sliders.current]):
                ids.append(next(steps).tokens[0])
    keep.remove()
    direction = sliders.slider("moral").target
    for h in recording.passes(1)[1:]:  # the pass over each reply token but the last
        read.append(float((h[0, -1] @ direction.vector.double() - direction.without_mean) / direction.gap))
    return prompt, ids, read, logits


def test_readings_are_those_of_the_passes_that_wrote_the_reply(chat, model):
    moves = {0: -1.0, 4: 0.5, 9: 2.0}
    prompt, ids, read, logits = recorded(model, chat, moves)
    target = chat.sliders.slider("moral").target
    edits = [(at, Edit.of([Slider(target, "add", amount)])) for at, amount in moves.items()]
    look = look_inside(model, prompt, ids, edits, {"moral": chat.sliders.slider("moral")})
    assert look.steered["moral"][:-1] == pytest.approx(read, abs=1e-5)
    assert len(look.steered["moral"]) == len(look.plain["moral"]) == len(look.kl) == len(look.pieces) == 12
    plain = model.hf(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    steered = torch.stack(logits).log_softmax(-1)
    wanted = (steered.exp() * (steered - plain)).sum(-1)
    assert look.kl == pytest.approx(wanted.tolist(), abs=1e-4)
    assert hooks_on(model) == 0


def test_sliders_that_count_reply_tokens_are_read_at_the_tokens_they_acted_on(new_chat, model):
    chat = new_chat(10)
    chat.panel.set("moral", 2.0)
    chat.panel.reshape("moral", when=Schedule("reply", after=4))
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    look = chat.inside(reply.id, ["moral"])
    # Token 4 is the first that is chosen under it, by the pass over token 3.
    assert look.kl[:4] == pytest.approx([0] * 4, abs=1e-5)
    assert look.kl[4] > 1e-3
    moved = [a - b for a, b in zip(look.steered["moral"], look.plain["moral"], strict=True)]
    assert moved[:3] == pytest.approx([0] * 3, abs=1e-5)
    assert moved[3] == pytest.approx(2.0, abs=1e-5)


def test_without_sliders_nothing_differs(chat):
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    look = chat.inside(reply.id, ["moral"])
    assert look.kl == [0.0] * 12
    assert look.steered == look.plain
    assert "".join(look.pieces) == reply.text
    assert look.titles == {"moral": "moral"}


def test_a_reply_is_read_as_it_was_written_wherever_the_sliders_stand_now(chat, model):
    chat.panel.set("moral", -1.0)
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    before = chat.inside(reply.id, ["moral"])
    chat.panel.set("moral", 2.0)
    chat.edit(chat.say("well").id, "ba")
    again = Chat(LocalBackend(model), place=chat.saved)
    after = again.inside(reply.id, ["moral"])
    assert after.kl == pytest.approx(before.kl)
    assert after.steered["moral"] == pytest.approx(before.steered["moral"])
    assert max(before.kl) > 1e-3


def test_a_reading_is_kept_and_a_change_of_the_text_makes_another(chat):
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    first = chat.inside(reply.id, ["moral"])
    assert chat.inside(reply.id, ["moral"]) is first
    chat.edit(reply.id, "ba be bi")
    look = chat.inside(reply.id, ["moral"])
    assert "".join(look.pieces) == "ba be bi"
    assert len(look.kl) == 3


def test_colours_and_charts(chat):
    chat.panel.set("moral", 3.0)
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    look = chat.inside(reply.id, ["moral"])
    assert look.scale("moral") >= 1
    assert all(-1 <= x <= 1 for x in look.heat("moral"))
    rows = look.chart()
    assert len(rows) == 2 * 12
    assert rows[0] == {
        "token": 0, "text": look.pieces[0], "name": "moral", "title": "moral",
        "amount": look.steered["moral"][0], "under": "sliders",
    }  # fmt: skip
    assert rows[-1]["under"] == "no sliders"


def test_what_cannot_be_read_is_refused_in_a_line(new_chat, model, make_direction):
    chat = new_chat(300)
    reply = chat.say("hello")
    with pytest.raises(UsageError, match="expected a reply that is written"):
        chat.inside(reply.id, ["moral"])
    until(lambda: reply.text)
    chat.stop()
    with pytest.raises(UsageError, match="expected a reply that is written"):
        chat.inside(chat.path()[0].id, ["moral"])
    with pytest.raises(UsageError, match="kindness"):
        chat.inside(reply.id, ["kindness"])
    with pytest.raises(UsageError, match="at least one token"):
        look_inside(model, [1], [], [], {})


def test_pieces_join_to_the_text_where_a_character_takes_several_tokens(byte_checkpoint):
    model = load(byte_checkpoint)
    text = "caf\u00e9 \u2603!"
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    pieces = pieces_of(model, ids)
    assert len(ids) == len(pieces) == 10
    assert "".join(pieces) == text
    assert pieces[3:5] == ["", "\u00e9"]
    assert "".join(pieces_of(model, ids[:4])) == "caf\ufffd"


def test_a_reply_cut_within_a_character_goes_on_to_the_whole_of_it(byte_checkpoint):
    model = load(byte_checkpoint)
    backend = LocalBackend(model)
    snow = model.tokenizer("\u2603", add_special_tokens=False).input_ids
    chat = ({"role": "user", "content": "hello"},)

    def write(n: int, wanted: int, ids: tuple[int, ...], text: str):
        only = Sampler(max_new_tokens=n, temperature=0, repetition_penalty=1.0, logit_bias=[(wanted, 100)])
        draft = backend.draft(Task(chat, only, text, ids))
        while draft.step():
            pass
        draft.close()
        return tuple(draft.ids), draft.text

    ids, text = write(1, snow[0], (), "")
    assert (ids, text) == ((snow[0],), "")
    for token in snow[1:]:
        draft = backend.draft(Task(chat, Sampler(), "x", ids))
        assert tuple(draft.ids) == ids
        ids, text = write(1, token, ids, text or "\u200b")
    assert ids == tuple(snow)
    assert text == "\u200b\u2603"


def test_readings_of_a_clamp_are_where_it_holds_them(new_chat, model):
    chat = new_chat(6)
    chat.sliders.put(Slider(chat.sliders.slider("moral").target, "clamp"), 0.5)
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    look = chat.inside(reply.id, ["moral"])
    assert look.steered["moral"] == pytest.approx([0.5] * 6, abs=1e-6)
    assert not math.isclose(look.plain["moral"][0], 0.5, abs_tol=1e-3)
