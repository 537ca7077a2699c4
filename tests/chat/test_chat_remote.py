"""The same chat with a model behind `steer serve`: a real server, in a separate thread."""

from __future__ import annotations

import time

import pytest
from feature_indexes import keep_dictionary
from serving import NO_END, Served, served, until

from steer.chat.chat import Chat
from steer.chat.remote import RemoteBackend
from steer.chat.session import Session
from steer.chat.writer import Task
from steer.core.profile import Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import Sampler
from steer.errors import SteerError, UnsupportedError, UsageError
from steer.serve.server import Options

SAMPLER = Sampler(
    max_new_tokens=12,
    temperature=1.0,
    repetition_penalty=1.0,
    seed=3,
    logit_bias=[(int(t), b) for t, b in NO_END.items()],
)


@pytest.fixture
def server(model, moral):
    with served(model, Options(api_key="secret")) as running:
        yield running


@pytest.fixture
def dictionary(model, moral):
    return keep_dictionary(model)


@pytest.fixture
def chat(server: Served):
    chat = Chat(RemoteBackend(server.url, "secret"))
    chat.sampler = SAMPLER
    yield chat
    chat.close()


def spoken(text: str) -> str:
    """Without the space that a tokenizer of words puts between the prompt and the first of them."""
    return text.removeprefix(" ")


def say(chat: Chat, text: str = "hello"):
    reply = chat.say(text)
    assert chat.writer.wait(30)
    assert chat.last_error is None
    return reply


def test_a_chat_is_what_the_model_says_and_goes_on(chat, model):
    first = say(chat)
    assert spoken(first.text) == model.chat("hello", **SAMPLER.__dict__)
    second = say(chat, "well")
    said = [{"role": m.role, "content": m.text} for m in chat.path()[:3]]
    assert spoken(second.text) == model.chat(said, **(SAMPLER.__dict__ | {"seed": 4}))
    assert (first.written.ending, first.written.ids) == ("length", ())


def test_sliders_of_a_chat_are_its_own_and_their_receipt_comes_back(chat, server, model):
    plain = say(chat).text
    chat.clear()
    chat.panel.set("moral", -3.0)
    steered = say(chat)
    with model.steered({"moral": -3.0}):
        assert spoken(steered.text) == model.chat("hello", **SAMPLER.__dict__) != spoken(plain)
    assert steered.written.receipt["sliders"][0]["name"] == "moral"
    assert steered.written.profile.sliders == (ProfileSlider("moral", -3.0),)
    other = Chat(RemoteBackend(server.url, "secret"), keep=False)
    other.sampler = SAMPLER
    assert say(other).text == plain
    other.close()
    chat.panel.on = False
    chat.clear()
    assert say(chat).text == plain


def test_a_slider_moved_in_mid_reply_is_felt_and_what_is_written_stays(chat):
    draft = chat.backend.draft(Task(({"role": "user", "content": "hello"},), SAMPLER))
    for _ in range(4):
        assert draft.step()
    begun = draft.text
    chat.sliders["moral"] = -3.0
    while draft.step():
        pass
    draft.close()
    assert draft.text.startswith(begun)
    assert [s.start for s in draft.stretches] == [0, 4]
    assert draft.stretches[1].profile.sliders[0].amount == -3.0
    assert draft.receipt().sliders[0].name == "moral"
    assert draft.tokens == 12
    assert len(draft.text.split()) == 12


def test_regenerate_lengthen_and_stop(chat):
    first = say(chat)
    chat.regenerate()
    assert chat.writer.wait(30)
    second = chat.path()[-1]
    assert second.text != first.text
    begun = second.text
    chat.lengthen()
    assert chat.writer.wait(30)
    assert second.text.startswith(begun)
    assert len(second.text) > len(begun)
    chat.sampler = Sampler(max_new_tokens=400, logit_bias=SAMPLER.logit_bias)
    third = chat.say("well")
    until(lambda: third.text)
    began = time.monotonic()
    chat.stop()
    assert time.monotonic() - began < 10
    assert third.written.ending == "stopped"


def test_rows_show_what_the_server_offers_and_what_it_does_not_is_refused(chat):
    (row,) = chat.panel.rows()
    assert (row.name, row.operation, row.site, row.operations) == ("moral", "add", 1, ("add",))
    chat.panel.set("moral", 0.1)
    assert chat.panel.undo()
    assert not chat.backend.local
    for refused in (
        lambda: chat.inside(0, ["moral"]),
        lambda: chat.features,
        lambda: chat.compare("x", None, None),
        lambda: chat.model,
    ):
        with pytest.raises(UnsupportedError, match="does not offer"):
            refused()
    with pytest.raises(UnsupportedError, match="steer serve --profile"):
        chat.panel.reshape("moral", "clamp")
    with pytest.raises(UsageError, match="expected one that"):
        chat.panel.set("kindness", 1.0)


@pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")
def test_features_that_the_server_names_come_after_the_traits(dictionary, chat):
    assert [(r.name, r.kind) for r in chat.panel.rows()] == [
        ("moral", "trait"), ("preach", "feature"), ("against", "feature"),
    ]  # fmt: skip
    assert chat.panel.pin("L1/5").kind == "feature"


def test_profiles_go_as_far_as_a_request_can_say(chat, model):
    chat.use(Profile("p", sampler=SAMPLER, preset=None, sliders=(ProfileSlider("moral", 0.2, "clamp", range=(-1, 1)),)))
    assert dict(chat.sliders) == {"moral:clamp": 0.2}
    assert chat.profile("q").sliders == (ProfileSlider("moral", 0.2, "clamp", range=(-1, 1)),)
    reply = say(chat)
    with model.steered({"moral:clamp": 0.2}):
        assert spoken(reply.text) == model.chat("hello", **SAMPLER.__dict__)
    for slider in (ProfileSlider("moral", 1, when=ScheduleSpec("reply")), ProfileSlider("x.safetensors", 1)):
        with pytest.raises(UsageError, match="steer serve MODEL --profile FILE"):
            chat.use(Profile("p", sliders=(slider,)))


@pytest.mark.slow
def test_mistakes_and_absent_servers_are_one_line(server, chat):
    with pytest.raises(SteerError, match="no server answers"):
        RemoteBackend("http://127.0.0.1:9")
    with pytest.raises(SteerError, match="key"):
        RemoteBackend(server.url, "wrong")
    pieces = RemoteBackend(server.url, "secret", "nonsense").write([{"role": "user", "content": "x"}], SAMPLER, {})
    with pytest.raises(SteerError, match="nonsense"):
        next(pieces)
    chat.panel.set("L1/5", 1.0)  # whether there is such a latent only the server knows
    chat.say("hello")
    assert chat.writer.wait(30)
    assert server.url in chat.last_error
    assert "\n" not in chat.last_error
    assert [m.text for m in chat.path()] == ["hello"]


def test_the_terminal_chat_has_the_same_session(server, model):
    session = Session(RemoteBackend(f"{server.url}/v1", "secret"), sampler=SAMPLER)
    session.sliders["moral"] = -3.0
    text = "".join(session.reply("hello"))
    with model.steered({"moral": -3.0}):
        assert spoken(text) == model.chat("hello", **SAMPLER.__dict__)
    assert session.messages[-1] == {"role": "assistant", "content": text}
    assert session.receipts[-1].sliders[0].name == "moral"
    pieces = session.reply("well")
    said = next(pieces)
    pieces.close()
    assert session.messages[-1]["content"] == said
    assert "after block 1 by up to 6.00 of its norm" in session.warnings()[0]
    session.reread()
    session.use(Profile("p", sampler=SAMPLER, preset=None, sliders=(ProfileSlider("moral", 0.5),)))
    assert dict(session.sliders) == {"moral": 0.5}
    session.clear()
    assert (session.messages, session.receipts) == ([], [])


def test_the_terminal_runs_on_it(server):
    import io

    from rich.console import Console

    from steer.chat.terminal import run_chat

    out = io.StringIO()
    session = Session(RemoteBackend(server.url, "secret"), sampler=SAMPLER)
    lines = "/moral -1\n/sliders\nhello\n/receipt\n/undo\n/reset\n/clear\n/quit\n"
    run_chat(session, stdin=io.StringIO(lines), console=Console(file=out, width=100))
    said = out.getvalue()
    assert "moral -1" in said
    assert "tokens went through the model" in said
    assert "conversation forgotten" in said
