"""llama.cpp as an engine: the real llama-server, with the LoRAs of a bake, writes what the transformers engine writes.

A tiny model of random weights, whose tokens are bytes; its embedding and head differ, so that the LoRAs change every
writer, as hooks do. What is asked of it is kept to ASCII, as its bytes are else no characters.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest
import torch
from batched import GREEDY, Listener, ask, job
from llama_server import LlamaServer, llama_server
from serving import Served, served
from tiny_chat import save_tiny_chat

from steer.baking.bake import bake
from steer.baking.certificate import server_command
from steer.checkpoint.gguf_file import write_gguf
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.core.sampler import Sampler
from steer.core.slider import Slider
from steer.errors import MismatchError, SteerError, UnsupportedError, UsageError
from steer.model.steered import SteeredModel, describe, load
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Event, Job
from steer.serve.llama_cpp.engine import LlamaCppEngine, sampling
from steer.serve.openai_json import token_bytes
from steer.serve.server import Options

STRENGTH = 0.8
"""What the LoRAs remove at scale 1."""


@dataclass(frozen=True)
class Desk:
    """A checkpoint, its GGUF, two ablations and an add baked for llama.cpp, and the model in transformers."""

    checkpoint: Path
    gguf: Path
    baked: Path
    model: SteeredModel
    directions: tuple[Direction, ...]

    def command(self, baked: Path | None = None) -> str:
        from steer.baking.certificate import Certificate

        folder = baked or self.baked
        return server_command(Certificate.load(folder), str(folder)).replace("MODEL.gguf", str(self.gguf))

    def edit(self, a: float = 0.0, b: float = 0.0) -> Edit:
        """Amounts of the two ablations beside the add, which llama-server always has."""
        one, other, added = self.directions
        return Edit(moves=(Slider(one, "ablate", a), Slider(other, "ablate", b), Slider(added, "add", 1.0)))

    def asked(self, a: float = 0.0, b: float = 0.0) -> Edit | None:
        """The same without the add, for llama-server."""
        return Edit.of([Slider(d, "ablate", x) for d, x in zip(self.directions, (a, b), strict=False)])

    @property
    def greedy(self) -> Sampler:
        """Greedy, ASCII alone."""
        tokens = range(len(self.model.tokenizer))
        foreign = [i for i in tokens if max(token_bytes(self.model.tokenizer, i), default=0) > 127 or i < 6]
        return replace(GREEDY, max_new_tokens=24, logit_bias=tuple((i, -100.0) for i in foreign))


@pytest.fixture(scope="module")
def desk(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("desk")
    checkpoint = save_tiny_chat(
        tiny_llama, root / "chat", by_bytes=True, merges=[("h", "e")], tie=False, max_position_embeddings=512
    )
    model = load(checkpoint)
    q, _ = torch.linalg.qr(torch.randn(model.anatomy.width, 3, generator=torch.Generator().manual_seed(1)))
    a, b, c = (
        Direction(name, 1, v.contiguous(), with_mean=1.5, without_mean=-0.5, residual_norm=4.0)
        for name, v in zip("abc", q.T, strict=True)
    )
    write_gguf(checkpoint, root / "model.gguf", "F32")
    bake(checkpoint, root / "baked", Edit((a, b), STRENGTH, add=((c, 1.0),)), "gguf")
    return Desk(checkpoint, root / "model.gguf", root / "baked", model, (a, b, c))


@pytest.fixture(scope="module")
def llama(desk: Desk) -> Iterator[LlamaServer]:
    with llama_server(desk.command(), slots=2) as running:
        yield running


@contextmanager
def engine_on(desk: Desk, url: str, **options: object) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(describe(desk.checkpoint), url=url, place=desk.checkpoint, **options)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        engine.close()


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


def prompt(desk: Desk, text: str = "hello friend") -> list[int]:
    return desk.model.prompt_ids([{"role": "user", "content": text}])


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (0.4, 0.8)])
def test_amounts_write_the_tokens_and_log_probabilities_of_the_transformers_engine(desk, engine, ours, a, b):
    made, wanted = (
        ask(writer, Job(tuple(prompt(desk)), desk.greedy, lambda edit=edit: edit, top_logprobs=3)).wait()
        for writer, edit in ((engine, desk.asked(a, b)), (ours, desk.edit(a, b)))
    )
    assert made.tokens == wanted.tokens
    assert len(made.tokens) == 24
    for one, other in zip(made.events[:-1], wanted.events[:-1], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.02)
        assert [t for t, _ in one.top] == [t for t, _ in other.top]
    assert made.last.reason == wanted.last.reason == "length"


def test_the_settings_of_two_clients_at_once_do_not_mix(desk, engine):
    jobs = [job(prompt(desk, "hello"), desk.greedy, edit) for edit in (desk.asked(a=1.0), desk.asked(b=1.0), None)]
    alone = [ask(engine, one).wait().tokens for one in jobs]
    assert len({tuple(tokens) for tokens in alone}) == 3
    for _ in range(2):
        listeners = [ask(engine, one) for one in jobs]
        assert [listener.wait().tokens for listener in listeners] == alone


def test_a_prompt_that_was_read_under_other_amounts_is_read_again(desk, engine):
    long, other = prompt(desk, "hello friend, " * 12), prompt(desk, "well " * 30)
    wanted = {edit: ask(engine, job(long, desk.greedy, edit)).wait().tokens for edit in (None, desk.asked(a=1.0))}
    for edit, tokens in list(wanted.items()) * 2:
        ask(engine, job(other, desk.greedy, edit)).wait()
        assert ask(engine, job(long, desk.greedy, edit)).wait().tokens == tokens


def test_a_slider_moved_in_mid_reply_changes_tokens_after_the_move_and_none_before(desk, engine):
    plain = ask(engine, job(prompt(desk), desk.greedy)).wait().tokens
    listener, edits = Listener(), [None]

    def hear(event: Event) -> None:
        listener(event)
        if len(listener.tokens) == 6:
            edits[0] = desk.asked(a=1.0)

    engine.submit(Job(tuple(prompt(desk)), desk.greedy, lambda: edits[0]), hear)
    moved = listener.wait().tokens
    assert moved[:6] == plain[:6]
    follow = job([*prompt(desk), *plain[:6]], replace(desk.greedy, max_new_tokens=18), desk.asked(a=1.0))
    assert moved[6:] == ask(engine, follow).wait().tokens != plain[6:]


def test_every_token_of_a_character_arrives(desk, engine, llama):
    """llama-server's stream has no event for a token that ends within a character."""
    vocabulary = {token_bytes(desk.model.tokenizer, i): i for i in range(len(desk.model.tokenizer))}
    bytes_ = [vocabulary[bytes([b])] for b in "é€".encode()]
    sampler = replace(GREEDY, max_new_tokens=40, frequency_penalty=2.0, logit_bias=[(i, 90.0) for i in set(bytes_)])
    begun = [*prompt(desk), *bytes_]
    body = {"prompt": begun, "n_predict": 40, "return_tokens": True, "cache_prompt": False}
    lora = {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]}
    whole = llama.post("/completion", body | lora | sampling(sampler, engine.context))
    assert "é" in whole["content"]
    made = ask(engine, Job(tuple(begun), sampler, lambda: None, top_logprobs=1)).wait()
    assert desk.model.text(made.tokens).strip("�") == whole["content"].strip("�")
    assert any("within a character" in note for note in made.last.receipt.warnings)


def test_a_cancelled_reply_makes_room(desk, engine):
    long = replace(desk.greedy, max_new_tokens=400)
    listeners = [ask(engine, job(prompt(desk), long)) for _ in range(3)]
    listeners[0].wait_for(2)
    for listener in listeners:
        listener.cancel()
    assert [listener.wait().last.reason for listener in listeners] == ["cancelled"] * 3
    assert len(ask(engine, job(prompt(desk), desk.greedy)).wait().tokens) == 24
    assert (engine.running, engine.waiting) == (0, 0)


def test_the_server_lists_what_moves_and_says_what_only_a_restart_moves(server):
    rows = {row["name"]: row for row in server.get("/v1/steering").json()["sliders"]}
    assert set(rows) == {"a:ablate", "b:ablate", "c"}
    assert rows["a:ablate"]["fixed"] is rows["b:ablate"]["fixed"] is None
    assert "start it again" in rows["c"]["fixed"]
    assert (rows["c"]["amount"], rows["a:ablate"]["amount"]) == (1.0, 0.0)


def test_the_server_steers_by_request_by_profile_and_live(desk, server, ours):
    asked = {"max_tokens": 12, "temperature": 0, "repetition_penalty": 1.0, "prompt": prompt(desk)}
    asked |= {"logit_bias": {str(t): b for t, b in desk.greedy.logit_bias}}

    def reply(**more: object) -> str:
        answer = server.post("/v1/completions", asked | more)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    short = replace(desk.greedy, max_new_tokens=12)
    plain, one, other = (
        desk.model.text(ask(ours, job(prompt(desk), short, edit)).wait().tokens)
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
    with llama_server(f"{desk.command()} --port {port}") as running:
        engine = LlamaCppEngine(describe(desk.checkpoint), url=running.url, place=desk.checkpoint)
        assert ask(engine, job(prompt(desk), desk.greedy)).wait().tokens
    try:
        assert isinstance(ask(engine, job(prompt(desk), desk.greedy)).wait().last, SteerError)
        assert "no llama-server answers" in engine.problem
        swapped = f"llama-server -m {desk.gguf} --lora {desk.baked / 'ablate-b.gguf'},{desk.baked / 'ablate-a.gguf'}"
        with llama_server(f"{swapped} --port {port}"):
            refused = ask(engine, job(prompt(desk), desk.greedy, desk.asked(a=1.0))).wait()
            assert (refused.tokens, str(refused.last)) == ([], engine.problem)
            assert "start steer serve again" in engine.problem
        with llama_server(f"{desk.command()} --port {port}"):
            assert ask(engine, job(prompt(desk), desk.greedy)).wait().tokens
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
