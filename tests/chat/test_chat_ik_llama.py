"""The same chat with the real llama-server of ik_llama.cpp, which moves control vectors while it runs."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from batched import ask
from llama_desk import LONG, STRENGTH, Desk
from test_chat_llama_server import HELLO, moved_in_mid_reply, reply

from steer.baking.bake import bake
from steer.chat.chat import Chat
from steer.chat.remote import RemoteBackend
from steer.chat.writer import Task
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.slider import Slider
from steer.model.decode import decode
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Job

SERVER = Path(__file__).parents[2] / ".ik-llama" / "build" / "bin" / "llama-server"
pytestmark = pytest.mark.skipif(not SERVER.is_file(), reason="`make ik-llama` builds the server")


@pytest.fixture(scope="module")
def baked(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation without the embedding, for which ik_llama.cpp takes no LoRA, and an add."""
    out = tmp_path_factory.mktemp("ik") / "baked"
    bake(desk.checkpoint, out, edit(desk, STRENGTH, 1.0), "gguf")
    return out


@pytest.fixture
def url(desk: Desk, baked: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [SERVER, "-m", desk.gguf, "--lora", baked / "ablate-a.gguf", "--port", str(port), "--jinja"]
    command += ["-c", "512", "-t", "1", "-ctk", "f32", "-fa", "off", "-np", "1"]  # its values are in F16 without -fa
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            found, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while not healthy(found):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.fixture
def chat(url: str) -> Iterator[Chat]:
    chat = Chat(RemoteBackend(url))
    chat.sampler = LONG
    yield chat
    chat.close()


def edit(desk: Desk, a: float, c: float) -> Edit | None:
    one, _, added = desk.directions
    blocks = (0, desk.model.anatomy.blocks - 1)
    return Edit((one,) if a else (), a, blocks, add=((added, c),) if c else ()) if a or c else None


def wanted(desk: Desk, a: float = 0.0, c: float = 0.0) -> str:
    """What the model writes in transformers under these amounts."""
    with desk.model.steering.applied([edit(desk, a, c)]):
        ids = [step.tokens[0] for step in decode(desk.model, [desk.prompt()], LONG)]
    return desk.model.text(ids)


def scales(url: str, path: str = "control-vectors") -> list[float]:
    return [row["scale"] for row in httpx.get(f"{url}/{path}").json()]


def test_a_control_vector_and_a_lora_move_without_a_restart(desk, chat):
    rows = {row.name: row for row in chat.panel.rows()}
    assert {name: (row.fixed, row.amount) for name, row in rows.items()} == {"a:ablate": (None, 0.0), "c": (None, 0.0)}
    assert "one setting for all chats" in chat.backend.slider_note
    texts = set()
    for a, c in ((0.0, 0.0), (0.0, 1.0), (0.0, -0.5), (STRENGTH, 0.0), (0.4, 0.5), (0.0, 0.0)):
        chat.panel.set("a:ablate", a / STRENGTH)
        chat.panel.set("c", c)
        texts.add(said := reply(chat))
        assert said == wanted(desk, a, c)
    assert len(texts) == 5


@pytest.mark.parametrize(("a", "c"), [(0.0, 0.0), (0.0, 1.0), (0.0, -0.5), (0.4, 0.5)])
def test_amounts_give_the_log_probabilities_of_the_transformers_engine(desk, url, chat, a, c):
    body = {"messages": HELLO, "max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    with chat.backend.moved({"a:ablate": a / STRENGTH, "c": c}):
        answer: Any = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    engine = BatchingEngine(desk.model, context=512)
    made = ask(engine, Job(tuple(desk.prompt()), LONG, lambda: edit(desk, a, c), top_logprobs=3)).wait()
    engine.close()
    steps = answer["choices"][0]["logprobs"]["content"]
    assert [step["id"] for step in steps] == made.tokens
    assert len(steps) == 24
    for step, token in zip(steps, made.events[:-1], strict=True):
        found, expected = {likely["id"]: likely["logprob"] for likely in step["top_logprobs"]}, dict(token.top)
        both = found.keys() & expected.keys()  # the third may be another where two are equally likely
        assert len(both) >= 2
        best = max(both, key=expected.__getitem__)  # ik_llama.cpp's probabilities do not sum to 1 over the vocabulary
        assert [found[id] - found[best] for id in both] == pytest.approx(
            [expected[id] - expected[best] for id in both], abs=0.02
        )


def test_a_control_vector_moved_in_mid_reply_is_felt_and_what_is_written_stays(desk, chat):
    moved_in_mid_reply(desk, chat, "c")


def test_after_a_reply_or_a_part_of_one_the_server_is_as_it_was_found(desk, url, chat):
    assert scales(url) == []  # to look changes nothing
    found = scales(url, "lora-adapters")
    chat.sliders["c"], chat.sliders["a:ablate"] = 1.0, 0.5
    draft = chat.backend.draft(Task(HELLO, LONG))
    assert draft.step()
    assert (scales(url), scales(url, "lora-adapters")) == ([1.0], [0.5])
    draft.close()
    assert (scales(url), scales(url, "lora-adapters")) == ([0.0], found)
    reply(chat)
    assert (scales(url), scales(url, "lora-adapters")) == ([0.0], found)


def test_a_vector_that_others_loaded_is_a_slider_with_the_amount_of_its_bake(desk, url, tmp_path):
    added = desk.directions[2]
    other = Direction("other", 2, added.vector, with_mean=1.5, without_mean=-0.5, residual_norm=4.0)
    bake(desk.checkpoint, tmp_path / "more", Edit((), add=((other, 2.0),)), "gguf")
    body = {"path": str(tmp_path / "more" / "control_vector.gguf"), "scale": 0.25}
    httpx.post(f"{url}/control-vectors/load", json=body).raise_for_status()
    chat = Chat(RemoteBackend(url))
    chat.sampler = LONG
    chat.panel.set("other", 1.0)
    with chat.backend.moved(chat.backend.amounts):
        assert scales(url) == [0.5, 0.0]
    assert scales(url) == [0.25, 0.0]
    # What the longer one wrote into the last layer does not act when only the shorter one does.
    for amounts in ({"other": 1.0}, {"c": 1.0}, {"c": 1.0, "other": -0.5}):
        chat.sliders.replace(amounts)
        said = reply(chat)
        moves = [Slider(added, "add", amounts.get("c", 0.0)), Slider(other, "add", amounts.get("other", 0.0))]
        with desk.model.steering.applied([Edit.of(moves)]):
            ids = [step.tokens[0] for step in decode(desk.model, [desk.prompt()], LONG)]
        assert said == desk.model.text(ids)
    chat.close()
