"""The same chat with a real llama-server, without steer serve between: its LoRAs are the sliders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from llama_desk import LONG, STRENGTH, Desk, engine_on
from llama_server import LlamaServer
from serving import served

from steer.chat.chat import Chat
from steer.chat.remote import RemoteBackend
from steer.chat.writer import PendingReply, Task
from steer.core.profile import Profile, ProfileSlider
from steer.core.sampler import Sampler
from steer.errors import SteerError, UsageError
from steer.model.decode import decode

HELLO = ({"role": "user", "content": "hello friend"},)


@pytest.fixture
def chat(llama: LlamaServer) -> Iterator[Chat]:
    chat = Chat(RemoteBackend(llama.url))
    chat.sampler = LONG
    yield chat
    chat.close()


def reply(chat: Chat) -> str:
    chat.clear()
    said = chat.say("hello friend")
    assert chat.writer.wait(60)
    assert chat.last_error is None
    return said.text


def wanted(desk: Desk, a: float = 0.0, b: float = 0.0) -> str:
    """What the model writes in transformers under these amounts."""
    with desk.model.steering.applied([desk.edit(a, b)]):
        ids = [step.tokens[0] for step in decode(desk.model, [desk.prompt()], LONG)]
    return desk.model.text(ids)


def moved_in_mid_reply(desk: Desk, chat: Chat, slider: str) -> PendingReply:
    """A reply during which a slider is moved: its beginning stays, and the rest is another one."""
    draft = chat.backend.draft(Task(HELLO, LONG))
    for _ in range(4):
        assert draft.step()
    begun = draft.text
    chat.sliders[slider] = 1.0
    while draft.step():
        pass
    draft.close()
    assert draft.text.startswith(begun)
    assert draft.text != wanted(desk)
    return draft


def test_scales_of_the_loras_are_sliders_of_each_request(desk, chat):
    chat.panel.set("a:ablate", 0.5)
    assert reply(chat) == wanted(desk, a=0.5 * STRENGTH)
    chat.panel.set("b:ablate", 1.0)
    assert reply(chat) == wanted(desk, a=0.5 * STRENGTH, b=STRENGTH)
    chat.panel.on = False
    assert reply(chat) == wanted(desk)


def test_a_slider_moved_in_mid_reply_is_felt_and_what_is_written_stays(desk, chat):
    draft = moved_in_mid_reply(desk, chat, "a:ablate")
    assert [s.start for s in draft.stretches] == [0, 4]


def test_rows_say_which_sliders_move_and_which_need_a_restart(chat):
    rows = {row.name: row for row in chat.panel.rows()}
    assert list(rows) == ["a:ablate", "b:ablate", "c"]
    assert (rows["a:ablate"].title, rows["a:ablate"].operation) == ("a", "ablate")
    assert rows["a:ablate"].fixed is rows["b:ablate"].fixed is None
    assert (rows["a:ablate"].low, rows["a:ablate"].high, rows["a:ablate"].amount) == (0.0, 1.0, 0.0)
    assert rows["c"].amount == 1.0
    assert "start it again" in rows["c"].fixed
    assert "only a restart" in chat.backend.slider_note
    with pytest.raises(UsageError, match="start it again"):
        chat.panel.set("c", 0.5)


def test_a_profile_names_its_loras_and_its_sampler_reaches_llama_server(desk, chat):
    greedy = replace(LONG, order=("temperature", "penalties"))
    chat.use(Profile("p", sampler=greedy, preset=None, sliders=(ProfileSlider("b", 0.5, "ablate"),)))
    assert dict(chat.sliders) == {"b:ablate": 0.5}
    assert chat.profile("q").sliders == (ProfileSlider("b", 0.5, "ablate"),)
    assert reply(chat) == wanted(desk, b=0.5 * STRENGTH)
    chat.sampler = Sampler(max_new_tokens=24, temperature=1.0, top_k=1, repetition_penalty=1.0, min_p=0.0)
    assert reply(chat) == wanted(desk, b=0.5 * STRENGTH)
    with pytest.raises(SteerError, match="expected one that"):
        chat.use(Profile("p", sliders=(ProfileSlider("nobody", 0.5),)))


def test_behind_steer_serve_the_page_has_the_same_rows(desk, llama):
    with engine_on(desk, llama.url) as engine, served(engine.model, engine=engine) as running:
        chat = Chat(RemoteBackend(running.url))
        chat.sampler = LONG
        rows = {row.name: row for row in chat.panel.rows()}
        assert {name: row.fixed is None for name, row in rows.items()} == {
            "a:ablate": True, "b:ablate": True, "c": False,
        }  # fmt: skip
        chat.use(Profile("p", sampler=LONG, preset=None, sliders=(ProfileSlider("a", 0.5, "ablate"),)))
        assert reply(chat) == wanted(desk, a=0.5)
        chat.close()
