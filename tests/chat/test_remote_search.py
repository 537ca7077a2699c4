"""A new slider on a model behind `steer serve --allow-find`, through the page's chat: preview, search, use, failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from serving import served, until
from streamlit.testing.v1 import AppTest
from tiny_parrot import save_parrot

from steer.chat.chat import Chat
from steer.chat.preview import TOKENS
from steer.chat.remote import RemoteBackend
from steer.chat.remote_search import RemoteSearch
from steer.core.sampler import Sampler
from steer.core.trait import Trait
from steer.errors import SteerError, UsageError
from steer.finding.new_slider import NewSliderJob
from steer.measure.contrast import SAMPLER
from steer.model.loaded import as_messages
from steer.model.steered import SteeredModel, load
from steer.serve.server import Options

TRAIT = Trait.from_sentences(3 * "ta te ti to tu ", 3 * "va ve vi vo vu ", "ta")
FOUND = 300
"""Seconds for a search: its process imports everything and loads the model."""


@pytest.fixture
def parrot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SteeredModel:
    """A model that repeats its instruction."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    return load(save_parrot(tmp_path / "parrot"))


@pytest.fixture
def chat(parrot: SteeredModel) -> Iterator[Chat]:
    with served(parrot, Options(allow_find=True)) as server:
        chat = Chat(RemoteBackend(server.url), keep=False)
        chat.sampler = Sampler(max_new_tokens=12, temperature=0)
        yield chat
        chat.close()


def say(chat: Chat) -> str:
    chat.clear()
    reply = chat.say("hello")
    assert chat.writer.wait(60)
    return reply.text


def test_a_server_that_allows_no_search_offers_none(parrot: SteeredModel) -> None:
    with served(parrot) as server:
        chat = Chat(RemoteBackend(server.url), keep=False)
        assert not chat.backend.finds
        assert chat.searching is None
        with pytest.raises(UsageError, match="expected a server that searches"):
            chat.preview(TRAIT)
        with pytest.raises(SteerError, match="started without --allow-find"):
            chat.new_slider(TRAIT)
        chat.close()


def test_a_preview_is_what_the_model_says_under_each_sentence(chat: Chat, parrot: SteeredModel) -> None:
    preview = chat.preview(TRAIT)
    assert preview.wait(60)
    assert preview.error is None
    assert [r.message for r in preview.replies] == [TRAIT.held_out[0], TRAIT.held_out[len(TRAIT.held_out) // 2]]
    sampler = replace(SAMPLER, max_new_tokens=TOKENS)
    for reply in preview.replies:
        for text, sentence in ((reply.high, TRAIT.with_instruction), (reply.low, TRAIT.without_instruction)):
            assert text.strip() == parrot.chat(as_messages(reply.message, sentence), **vars(sampler)).strip()
    assert any(reply.high != reply.low for reply in preview.replies)


@pytest.mark.slow
def test_a_slider_is_searched_for_on_the_server_and_moves_the_chat_at_once(chat: Chat) -> None:
    plain = say(chat)
    search = chat.new_slider(TRAIT)
    assert chat.searching is search
    assert search.running
    with pytest.raises(SteerError, match="wait for it"):
        chat.new_slider(Trait.from_sentences("lie", "truth", "other"))
    seen = []
    assert until(lambda: seen.append(search.progress) or not search.running, FOUND)
    assert search.done, search.error
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert search.result is not None
    assert search.result["verdict"]["says"]
    row = chat.panel.row("ta")
    assert row.calibrated
    chat.panel.set("ta", 8.0)
    assert say(chat) != plain
    chat.forget_search()
    assert chat.searching is None


@pytest.mark.slow
def test_the_page_on_a_server_makes_a_slider(parrot: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(parrot, Options(allow_find=True)) as server:
        monkeypatch.setattr("sys.argv", ["app.py", "--server", server.url])
        at = AppTest.from_file(str(Path(__file__).parents[2] / "app.py"), default_timeout=60).run()
        press(at, "New slider")
        sentences = {
            "Instruction at the high": TRAIT.with_instruction,
            "Instruction at the low": TRAIT.without_instruction,
        }
        for begins, sentence in sentences.items():
            next(t for t in at.text_area if t.label.startswith(begins)).set_value(sentence or "")
        next(t for t in at.text_input if t.label == "Name (may be empty)").set_value("ta")
        press(at, "Preview")
        press(at, "Make the slider")
        chat = at.session_state["chat"]
        assert until(lambda: not chat.searching.running, FOUND)
        at.run()
        (said,) = [e.value for e in (*at.success, *at.warning) if "is among your sliders" in e.value]
        assert "held-out AUROC" in said
        assert "ta" in [s.label for s in at.sidebar.slider]
        press(at, "OK")
        assert chat.searching is None
        chat.close()


def press(at: AppTest, label: str) -> None:
    next(b for b in at.button if b.label == label).click().run()
    assert not at.exception
    assert not at.error


@pytest.mark.slow
def test_a_search_that_finds_nothing_says_why_until_it_is_deleted(chat: Chat) -> None:
    search = chat.new_slider(Trait.from_sentences("lie", "truth", "nothing"))
    assert until(lambda: not search.running, FOUND)
    (failed,) = chat.failed_searches()
    assert (failed.name, failed.sentence, failed.opposite) == ("nothing", "lie", "truth")
    assert failed.error is not None
    assert "expected replies that a classifier on words can learn from" in failed.error
    failed.delete()
    assert chat.failed_searches() == []


def test_a_search_is_cancelled(chat: Chat) -> None:
    search = chat.new_slider(TRAIT)
    search.cancel()
    assert not search.running
    assert (search.done, search.error) == (False, "stopped; no slider was made")
    assert chat.failed_searches() == []


def test_a_server_that_goes_away_ends_the_search_with_a_reason(parrot: SteeredModel) -> None:
    with served(parrot, Options(allow_find=True)) as server:
        backend = RemoteBackend(server.url)
        search = RemoteSearch.start(backend, TRAIT)
        job = NewSliderJob.latest(parrot)
    assert until(lambda: not search.running, 60)
    assert search.failed
    assert "no server answers" in (search.error or "")
    assert RemoteSearch.latest(backend) is search
    search.delete()
    assert RemoteSearch.latest(backend) is None
    backend.close()
    assert job is not None
    job.cancel()
