"""llama.cpp as an engine: the real llama-server with the LoRAs of a bake writes what the transformers engine writes."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import httpx
import pytest
from batched import GREEDY, Listener, ask, job
from commands import command_here
from llama_desk import LONG, STRENGTH, Desk, engine_on
from llama_server import LlamaServer, llama_server
from serving import Served, served
from tiny_chat import save_tiny_chat

from steer.baking.bake import bake
from steer.checkpoint.gguf_file import write_gguf
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.errors import MismatchError, SteerError, UnsupportedError, UsageError
from steer.model.steered import describe
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Event, Job
from steer.serve.llama_cpp.engine import LlamaCppEngine
from steer.serve.llama_cpp.fields import sampling
from steer.serve.llama_cpp.fit import measure_fit
from steer.serve.openai_json import token_bytes
from steer.serve.server import Options


@pytest.fixture
def engine(desk: Desk, llama: LlamaServer) -> Iterator[LlamaCppEngine]:
    with engine_on(desk, llama.url) as made:
        yield made


@pytest.fixture(scope="module")
def ours(desk: Desk) -> Iterator[BatchingEngine]:
    engine = BatchingEngine(desk.model, context=512)
    yield engine
    engine.close()


@pytest.fixture
def server(desk: Desk, engine: LlamaCppEngine) -> Iterator[Served]:
    profile = {"name": "calm", "sliders": [{"slider": "a", "operation": "ablate", "amount": 1.0}]}
    with served(engine.model, Options(profiles=[Profile.parse(profile, "calm")]), engine) as running:
        yield running


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (0.4, 0.8)])
def test_amounts_write_the_tokens_and_log_probabilities_of_the_transformers_engine(desk, engine, ours, a, b):
    made, wanted = (
        ask(writer, Job(tuple(desk.prompt()), LONG, lambda edit=edit: edit, top_logprobs=3)).wait()
        for writer, edit in ((engine, desk.asked(a, b)), (ours, desk.edit(a, b)))
    )
    assert made.tokens == wanted.tokens
    assert len(made.tokens) == 24
    for one, other in zip(made.events[:-1], wanted.events[:-1], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.02)
        assert [t for t, _ in one.top] == [t for t, _ in other.top]
    assert made.last.reason == wanted.last.reason == "length"


def test_the_settings_of_two_clients_at_once_do_not_mix(desk, engine):
    jobs = [job(desk.prompt("hello"), LONG, edit) for edit in (desk.asked(a=1.0), desk.asked(b=1.0), None)]
    alone = [ask(engine, one).wait().tokens for one in jobs]
    assert len({tuple(tokens) for tokens in alone}) == 3
    for _ in range(2):
        listeners = [ask(engine, one) for one in jobs]
        assert [listener.wait().tokens for listener in listeners] == alone


@pytest.mark.parametrize("cache", ["--cache-ram 0", "--cache-ram 64"])
def test_a_prompt_that_was_read_under_other_amounts_is_read_again(desk, caplog, cache):
    """With its cache in RAM llama-server goes on from what it read under other scales, unless it may reuse nothing."""
    long, other = desk.prompt("hello friend, " * 12), desk.prompt("well " * 30)
    command = desk.command().replace("--cache-ram 0", cache)
    with llama_server(command) as running, engine_on(desk, running.url) as engine:
        assert ("--cache-ram 0" in caplog.text) == (cache != "--cache-ram 0")
        edits = (None, desk.asked(a=1.0))
        wanted = {edit: ask(engine, job(long, LONG, edit)).wait().tokens for edit in edits}
        assert wanted[edits[0]] != wanted[edits[1]]
        for edit, tokens in list(wanted.items()) * 2:
            ask(engine, job(other, LONG, edit)).wait()
            assert ask(engine, job(long, LONG, edit)).wait().tokens == tokens


def test_a_slider_moved_in_mid_reply_changes_tokens_after_the_move_and_none_before(desk, engine):
    plain = ask(engine, job(desk.prompt(), LONG)).wait().tokens
    listener, edits = Listener(), [None]

    def hear(event: Event) -> None:
        listener(event)
        if len(listener.tokens) == 6:
            edits[0] = desk.asked(a=1.0)

    engine.submit(Job(tuple(desk.prompt()), LONG, lambda: edits[0]), hear)
    moved = listener.wait().tokens
    assert moved[:6] == plain[:6]
    follow = job([*desk.prompt(), *plain[:6]], replace(LONG, max_new_tokens=18), desk.asked(a=1.0))
    assert moved[6:] == ask(engine, follow).wait().tokens != plain[6:]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_every_token_of_a_character_arrives(desk, engine, llama, logprobs):
    """llama-server's stream has no event for a token that ends within a character."""
    vocabulary = {token_bytes(desk.model.tokenizer, i): i for i in range(len(desk.model.tokenizer))}
    bytes_ = [vocabulary[bytes([b])] for b in "é€".encode()]
    sampler = replace(GREEDY, max_new_tokens=40, frequency_penalty=2.0, logit_bias=[(i, 90.0) for i in set(bytes_)])
    begun = [*desk.prompt(), *bytes_]
    body = {"prompt": begun, "n_predict": 40, "return_tokens": True, "cache_prompt": False}
    lora = {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]}
    whole = llama.post("/completion", body | lora | sampling(sampler, engine.context))
    assert any(ord(c) > 127 and c != "�" for c in whole["content"])
    made = ask(engine, Job(tuple(begun), sampler, lambda: None, top_logprobs=logprobs)).wait()
    ids = made.tokens
    assert desk.model.text(ids) == desk.model.text(whole["tokens"][: len(ids)])
    if logprobs is not None:
        assert ids == whole["tokens"][: len(ids)]
    assert len(ids) >= 36, "but for those of a character that is not whole"
    assert any("within a character" in note for note in made.last.receipt.warnings)


def test_a_cancelled_reply_makes_room(desk, engine):
    long = replace(LONG, max_new_tokens=400)
    listeners = [ask(engine, job(desk.prompt(), long)) for _ in range(3)]
    listeners[0].wait_for(2)
    for listener in listeners:
        listener.cancel()
    assert [listener.wait().last.reason for listener in listeners] == ["cancelled"] * 3
    assert len(ask(engine, job(desk.prompt(), LONG)).wait().tokens) == 24
    assert (engine.running, engine.waiting) == (0, 0)


def test_the_server_lists_what_moves_and_says_what_only_a_restart_moves(server):
    rows = {row["name"]: row for row in server.get("/v1/steering").json()["sliders"]}
    assert set(rows) == {"a:ablate", "b:ablate", "c"}
    assert rows["a:ablate"]["fixed"] is rows["b:ablate"]["fixed"] is None
    assert "start it again" in rows["c"]["fixed"]
    assert (rows["c"]["amount"], rows["a:ablate"]["amount"]) == (1.0, 0.0)


def test_the_server_steers_by_request_by_profile_and_live(desk, server, ours):
    asked = {"max_tokens": 12, "temperature": 0, "repetition_penalty": 1.0, "prompt": desk.prompt()}

    def reply(**more: object) -> str:
        answer = server.post("/v1/completions", asked | more)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    short = replace(LONG, max_new_tokens=12)
    plain, one, other = (
        desk.model.text(ask(ours, job(desk.prompt(), short, edit)).wait().tokens)
        for edit in (desk.edit(), desk.edit(a=1.0), desk.edit(b=0.5))
    )
    assert reply() == plain
    assert reply(steering={"sliders": {"a:ablate": 1.0}}) == one
    assert reply(model=f"{server.model.name}@calm") == one
    assert server.put({"sliders": {"b:ablate": 0.5}}).status_code == 200
    assert reply() == other
    assert reply(steering={"sliders": {}}) == plain


@pytest.mark.parametrize(
    ("sliders", "says"),
    [
        ({"a": 0.5}, "found add"),
        ({"a:clamp": 0.5}, "found clamp"),
        ({"c": 0.0}, "start it again"),
        ({"c:ablate": 1.0}, "found ablate"),
        ({"nobody": 1.0}, "found a:ablate, b:ablate"),
        ({"a:ablate": 1.5}, "from 0 to 1"),
    ],
)
def test_what_llama_server_cannot_do_is_an_error_in_a_request(server, sliders, says):
    answer = server.post("/v1/completions", {"prompt": "hello", "steering": {"sliders": sliders}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_slider")
    assert says in answer.json()["error"]["message"]


def test_a_profile_that_acts_at_times_is_refused_at_the_start(desk, engine):
    entry = {"slider": "a", "operation": "ablate", "amount": 1.0, "when": {"part": "reply"}}
    with (
        pytest.raises(UnsupportedError, match="on some tokens"),
        served(engine.model, Options(profiles=[Profile.parse({"name": "x", "sliders": [entry]}, "x")]), engine),
    ):
        pass


def test_what_llama_cpp_does_otherwise_is_a_warning_in_the_reply(server):
    asked = {"prompt": "hello", "max_tokens": 2, "frequency_penalty": 0.5, "steering": {"sliders": {"a:ablate": 1.0}}}
    warnings = server.post("/v1/completions", asked).json()["steering"]["warnings"]
    assert [w.partition(":")[0] for w in warnings] == ["receipt", "frequency_penalty"]
    refused = server.post("/v1/completions", asked | {"echo": True, "logprobs": 1})
    assert refused.status_code == 400
    assert "echo" in refused.json()["error"]["message"]


def test_directions_that_are_not_orthogonal_are_one_slider(desk, tmp_path, tiny_llama, make_direction):
    bake(desk.checkpoint, tmp_path / "out", Edit((make_direction("x"), make_direction("y", seed=8))), "gguf")
    with llama_server(desk.command(tmp_path / "out")) as running, engine_on(desk, running.url) as engine:
        assert list(engine.model.sliders.known()) == ["x+y:ablate"]
        with pytest.raises(UsageError, match=r"found x\+y:ablate"):
            engine.model.sliders.slider("x:ablate")
        edit = engine.model.sliders.edit({"x+y:ablate": 0.5})
        assert engine.adapters.scales(edit) == {0: 0.5}


def test_a_lora_of_others_keeps_its_scale(desk, tmp_path):
    foreign = Path(shutil.copy(desk.baked / "ablate-b.gguf", tmp_path / "style.gguf"))
    command = f"llama-server -m {desk.gguf} --lora {desk.baked / 'ablate-a.gguf'} --lora-scaled {foreign}:0.25"
    with llama_server(command) as running, engine_on(desk, running.url) as engine:
        assert engine.adapters.scales(desk.asked(a=0.4)) == {0: pytest.approx(0.5), 1: 0.25}


def test_the_folder_of_a_bake_may_be_named_where_the_paths_are_of_another_machine(desk, tmp_path):
    elsewhere = Path(shutil.copy(desk.baked / "ablate-a.gguf", tmp_path / "ablate-a.gguf"))
    with llama_server(f"llama-server -m {desk.gguf} --lora {elsewhere}") as running:
        with pytest.raises(UsageError, match="--baked"), engine_on(desk, running.url):
            pass
        with engine_on(desk, running.url, baked=[desk.baked]) as engine:
            assert engine.adapters.scales(desk.asked(a=STRENGTH)) == {0: 1.0}


def test_a_llama_server_that_was_started_again_with_other_loras_is_refused(desk):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with llama_server(desk.command(), port=port) as running:
        engine = LlamaCppEngine(describe(desk.checkpoint), url=running.url, place=desk.checkpoint)
        assert ask(engine, job(desk.prompt(), LONG)).wait().tokens
    try:
        assert isinstance(ask(engine, job(desk.prompt(), LONG)).wait().last, SteerError)
        assert "no llama-server answers" in engine.problem
        swapped = f"llama-server -m {desk.gguf} --lora {desk.baked / 'ablate-b.gguf'},{desk.baked / 'ablate-a.gguf'}"
        with llama_server(swapped, port=port):
            refused = ask(engine, job(desk.prompt(), LONG, desk.asked(a=1.0))).wait()
            assert (refused.tokens, str(refused.last)) == ([], engine.problem)
            assert "start steer serve again" in engine.problem
        with llama_server(desk.command(), port=port):
            assert ask(engine, job(desk.prompt(), LONG)).wait().tokens
            assert engine.problem is None
    finally:
        engine.close()


def test_a_lora_that_changes_nothing_is_refused_at_the_start(desk, tmp_path):
    copy = Path(shutil.copytree(desk.baked, tmp_path / "copy"))
    reader = gguf.GGUFReader(copy / "ablate-b.gguf", "r+")
    for tensor in reader.tensors:
        tensor.data[:] = 0
    reader.data.flush()
    with (
        llama_server(desk.command(copy)) as running,
        pytest.raises(UnsupportedError, match="slider 'b:ablate' to change log-probabilities"),
        engine_on(desk, running.url),
    ):
        pass


def test_another_checkpoint_is_refused_at_the_start(desk, llama, tmp_path, tiny_llama):
    other = save_tiny_chat(tiny_llama, tmp_path / "other", max_position_embeddings=512)
    with (
        pytest.raises(MismatchError, match="expected a bake of"),
        engine_on(replace(desk, checkpoint=other), llama.url),
    ):
        pass
    (tmp_path / "words").mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(desk.checkpoint / name, tmp_path / "words" / name)
    for file in other.glob("*token*"):
        shutil.copy(file, tmp_path / "words" / file.name)
    words = replace(desk, checkpoint=tmp_path / "words")
    with pytest.raises(MismatchError, match="expected the tokens of"), engine_on(words, llama.url):
        pass


def test_an_address_where_nothing_answers_is_named(desk):
    with pytest.raises(SteerError, match="no llama-server answers"), engine_on(desk, "http://127.0.0.1:9"):
        pass
    for wrong in ("127.0.0.1:9", "http://[", "http://127.0.0.1:port"):
        with pytest.raises(SteerError, match=re.escape(wrong)), engine_on(desk, wrong):
            pass


@pytest.mark.parametrize("stored", ["F32", "Q4_0"])
def test_fit_says_how_far_a_quantised_model_changes_as_the_original_does(desk, tmp_path, stored):
    write_gguf(desk.checkpoint, tmp_path / "model.gguf", stored)
    command = replace(desk, gguf=tmp_path / "model.gguf").command().partition(" --control-vector")[0]
    with llama_server(command) as running, engine_on(desk, running.url) as engine:
        found = measure_fit(desk.model, engine, replies=2, tokens=12)
    assert [f.slider for f in found] == ["a:ablate", "b:ablate"]
    for f in found:
        assert (f.tokens, f.change > 0.1) == (24, True)
        if stored == "F32":
            assert (f.slope, f.distance, f.plain, f.warning) == (
                pytest.approx(1, abs=0.01), pytest.approx(0, abs=0.01), pytest.approx(0, abs=0.01), None,
            )  # fmt: skip
        else:
            assert f.distance > 0.01
            assert f.plain > 0.01


def test_fit_warns_of_a_lora_that_changes_another_direction(desk, tmp_path, monkeypatch, capfd):
    copy = Path(shutil.copytree(desk.baked, tmp_path / "copy"))
    shutil.copy(copy / "ablate-b.gguf", copy / "ablate-a.gguf")
    with llama_server(desk.command(copy)) as running:
        steer, url = command_here(monkeypatch, capfd), ("--server", running.url)
        done = steer("fit", "model.gguf", desk.checkpoint, *url, "--json")
        assert done.code == 0, done.err
        a, b = done.result["sliders"]
        assert "is not its effect in the original" in a["warning"]
        assert b["distance"] < a["distance"]
        refused = steer("fit", "other.gguf", desk.checkpoint, *url)
        assert (refused.code, "found model.gguf" in refused.err) == (1, True)


@pytest.mark.slow
def test_the_command_serves_and_stops(desk, llama):
    steer = str(Path(sys.executable).with_name("steer"))
    command = [steer, "serve", str(desk.checkpoint), "--engine", "llama.cpp", "--url", llama.url, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(line for line in process.stderr if line.startswith("http")).split()[0]
            asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
            answer = httpx.post(f"{url}/chat/completions", json=asked, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 5
            assert answer["steering"]["live"]
        finally:
            process.terminate()
            said = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in said) == (143, False), said


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ((), 2, "expected --url beside llama.cpp alone"),
        (("--url", "http://127.0.0.1:9"), 1, "no llama-server answers"),
        (("--url", "http://127.0.0.1:9", "--four-bit"), 2, "expected neither --device-map nor --four-bit"),
    ],
)
def test_the_command_refuses_in_one_line(desk, monkeypatch, capfd, more, code, says):
    done = command_here(monkeypatch, capfd)("serve", desk.checkpoint, "--engine", "llama.cpp", *more)
    assert done.code == code
    assert says in done.err
    assert len(done.err.splitlines()) == 1
