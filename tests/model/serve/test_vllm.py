"""vLLM as an engine: the same replies as the engine of transformers, on the default model in fp32.

vLLM runs once in a process, so all tests share one engine; `make vllm` sets up what they need.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import httpx
import pytest
import torch
from batched import GREEDY, PATIENCE, Listener, ask, job
from serving import served

from steer.checkpoint.fetch import DEFAULT_MODEL, resolve
from steer.checkpoint.library import direction_place
from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import Sampler
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.model.steered import SteeredModel, describe, load
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Event, Finished, Job, Token

pytest.importorskip("vllm", reason="vLLM is not installed here; make vllm sets up an environment with it")
pytestmark = [pytest.mark.model, pytest.mark.slow]

LONG = replace(GREEDY, max_new_tokens=24)
SITES = (8, 14, 20)


@dataclass(frozen=True)
class Engines:
    """The two engines on one checkpoint, and directions and features that change what it writes."""

    theirs: BatchingEngine
    ours: BatchingEngine
    model: SteeredModel
    directions: tuple[Direction, ...]
    feature: Feature

    def prompt(self, subject: str) -> list[int]:
        return self.model.prompt_ids([{"role": "user", "content": f"Tell me about {subject}."}])

    def both(self, jobs: list[Job]) -> tuple[list[list[int]], list[list[int]]]:
        """What vLLM writes, and what transformers writes, for jobs that are written together."""
        made = [[ask(engine, one) for one in jobs] for engine in (self.theirs, self.ours)]
        return tuple([x.wait().tokens for x in listeners] for listeners in made)  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def engines(own_home) -> Iterator[Engines]:
    from steer.serve.vllm.engine import VllmEngine

    place = resolve(DEFAULT_MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_DTYPE", "float32")
        model = load(DEFAULT_MODEL)
        model.end_token_ids = frozenset()
        directions, feature = _found(model)
        described = describe(DEFAULT_MODEL)
        described.end_token_ids = frozenset()
        with (
            closing(BatchingEngine(model, max_running=16, context=512)) as ours,
            closing(VllmEngine(described, place, max_running=16, context=512)) as theirs,
        ):
            yield Engines(theirs, ours, model, directions, feature)


def _found(model: SteeredModel) -> tuple[tuple[Direction, ...], Feature]:
    """Directions from one subject to another at some sites, and a feature of latents along them."""
    means = []
    for subject in ("a pirate at sea with a parrot", "the tax law of small companies"):
        ids = torch.tensor([model.prompt_ids([{"role": "user", "content": f"Tell me about {subject}."}])])
        with model.record(SITES) as recording, torch.inference_mode():
            model.hf(input_ids=ids)
        means.append({site: recording[site][0, 4:].mean(0) for site in SITES})
    directions = []
    for site in SITES:
        difference = means[0][site] - means[1][site]
        unit = difference / difference.norm()
        a, b = (float(m[site] @ unit) for m in means)
        norm = float(means[0][site].norm())
        directions.append(
            Direction(f"pirate {site}", site, unit, mean=b, with_mean=a, without_mean=b, residual_norm=norm)
        )
    rows = torch.stack([d.vector for d in directions[:1]] * 4) * torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    zeros = torch.zeros(model.anatomy.width)
    dictionary = Dictionary("standard", rows.T.contiguous(), torch.zeros(4), rows, zeros, site=SITES[0])
    return tuple(directions), Feature("pirates", dictionary, (0, 1), (8.0, 8.0))


def _edits(e: Engines) -> dict[str, Edit]:
    early, middle, late = e.directions
    gate = Gate(early, above=0.3)
    moves = {
        "add": [Slider(middle, "add", -4.0)],
        "add at every site": [Slider(d, "add", 2.0) for d in e.directions],
        "ablate": [Slider(middle, "ablate", 1.0)],
        "ablate in part, jointly": [Slider(early, "ablate", 0.7), Slider(late, "ablate", 0.7)],
        "clamp": [Slider(middle, "clamp", 5.0)],
        "cap": [Slider(early, "cap", -1.0)],
        "scale": [Slider(early, "scale", -3.0)],
        "feature added": [Slider(e.feature, "add", 2.0)],
        "feature clamped": [Slider(e.feature, "clamp", 2.0)],
        "in the reply alone": [Slider(middle, "add", 5.0, Schedule("reply", first=9, after=2, ramp=3))],
        "behind a gate": [Slider(late, "add", -4.0, Schedule(gate=gate))],
        "all at once": [
            Slider(early, "add", 2.0), Slider(middle, "clamp", -2.0), Slider(late, "ablate", 1.0),
            Slider(e.feature, "scale", 3.0),
        ],
    }  # fmt: skip
    return {name: Edit(moves=tuple(m)) for name, m in moves.items()}


def test_every_operation_writes_the_tokens_of_the_transformers_engine(engines):
    prompt = engines.prompt("the sea")
    edits = {"none": None, **_edits(engines)}
    jobs = [job(prompt, LONG, edit) for edit in edits.values()]
    for one, name in zip(jobs, edits, strict=True):  # one after the other
        (made,), (wanted,) = engines.both([one])
        assert made == wanted, name
        edits[name] = tuple(made)
    assert len(set(edits.values())) == len(edits)


def test_profiles_in_one_batch_are_each_as_alone_whatever_their_samplers(engines):
    edits = [None, *_edits(engines).values(), None, *list(_edits(engines).values())[:2]]
    drawn = Sampler(max_new_tokens=24, temperature=1.1, min_p=0.05, repetition_penalty=1.2, dry_multiplier=0.8)
    subjects = ("a ship", "taxes in a far country where nobody has ever paid any", "love")
    jobs = [
        job(engines.prompt(subjects[i % 3]), replace(drawn, seed=i) if i % 2 else LONG, edit, key=i)
        for i, edit in enumerate(edits)
    ]
    assert len(jobs) == engines.theirs.max_running
    alone = [ask(engines.theirs, one).wait().tokens for one in jobs]
    together, wanted = engines.both(jobs)
    assert together == alone == wanted


def test_a_slider_moved_in_mid_stream_changes_the_next_token_and_none_before(engines):
    prompt, edit = engines.prompt("the sea"), _edits(engines)["add"]
    plain = ask(engines.theirs, job(prompt, LONG)).wait().tokens
    moved = []
    for engine in (engines.theirs, engines.ours):
        heard, done, edits = [], threading.Event(), [None]

        def hear(event: Event, heard=heard, done=done, edits=edits) -> None:
            if isinstance(event, Token):
                heard.append(event.id)
                if len(heard) == 6:
                    edits[0] = edit
            else:
                done.set()

        engine.submit(Job(tuple(prompt), LONG, lambda edits=edits: edits[0]), hear)
        assert done.wait(PATIENCE)
        moved.append(heard)
    assert moved[0] == moved[1]
    assert moved[0][:6] == plain[:6]
    assert moved[0][6:8] != plain[6:8]


def test_a_cached_prompt_is_used_again_under_the_same_sliders_alone(engines):
    prompt = engines.prompt("the sea, " * 40 + "and ships")
    assert len(prompt) > 64
    add, clamp = (_edits(engines)[name] for name in ("add", "clamp"))
    again = Edit(moves=add.moves)  # another value that does the same
    wanted = {edit: ask(engines.ours, job(prompt, LONG, edit)).wait().tokens for edit in (None, add, clamp)}
    read = []
    for edit in (add, None, clamp, again):
        listener = ask(engines.theirs, job(prompt, LONG, edit)).wait()
        assert listener.tokens == wanted[add if edit is again else edit]
        if edit in (add, again):
            read.append(listener.last.receipt.tokens)
    assert read[1] < read[0] / 2, "the second one read the prompt again"


def test_the_cache_of_a_reply_that_was_under_two_settings_is_not_used_for_one(engines):
    prompt, edit = engines.prompt("the sea, " * 20), _edits(engines)["add"]
    listener, edits = Listener(), [edit]

    def hear(event: Event) -> None:
        listener(event)
        if len(listener.tokens) == 10:
            edits[0] = None

    long = replace(LONG, max_new_tokens=100)
    engines.theirs.submit(Job(tuple(prompt), long, lambda: edits[0]), hear)
    follow = [*prompt, *listener.wait().tokens, *engines.prompt("ships")]
    for under in (edit, None):
        (made,), (wanted,) = engines.both([job(follow, LONG, under)])
        assert made == wanted


def test_log_probabilities_are_those_of_transformers(engines):
    edit = _edits(engines)["all at once"]
    # A prompt of no other test: receipts leave out the tokens that came from the prefix cache.
    jobs = [Job(tuple(engines.prompt("a lighthouse")), LONG, lambda: edit, top_logprobs=3)]
    made, wanted = ([ask(engine, one).wait() for one in jobs] for engine in (engines.theirs, engines.ours))
    for a, b in zip(made[0].events[:-1], wanted[0].events[:-1], strict=True):
        assert a.id == b.id
        assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
        assert [t for t, _ in a.top] == [t for t, _ in b.top]
    theirs, ours = made[0].last.receipt, wanted[0].last.receipt
    assert theirs.tokens == ours.tokens
    assert [(s.name, s.mean_share) for s in theirs.sliders] == [
        (s.name, pytest.approx(s.mean_share, rel=1e-3, nan_ok=True)) for s in ours.sliders
    ]


def test_cancelled_replies_make_room_and_disturb_no_other(engines):
    prompt, long = engines.prompt("the sea"), replace(LONG, max_new_tokens=400)
    edit = _edits(engines)["clamp"]
    wanted = ask(engines.ours, job(prompt, LONG, edit)).wait().tokens
    listeners = [ask(engines.theirs, job(prompt, long, edit if i % 2 else None)) for i in range(15)]
    for listener in listeners:
        listener.wait_for(2)
    kept = ask(engines.theirs, job(prompt, LONG, edit))
    for listener in listeners:
        listener.cancel()
    assert all(listener.wait().last == Finished("cancelled", listener.last.receipt) for listener in listeners)
    assert kept.wait().tokens == wanted
    assert (engines.theirs.running, engines.theirs.waiting) == (0, 0)


def test_the_server_steers_through_it_by_request_and_live(engines):
    provenance = {"sketch": engines.model.sketch().to_header()}
    pirate = replace(engines.directions[1], name="pirate", provenance=provenance)
    place = direction_place(engines.model.sketch(), "pirate")
    place.parent.mkdir(parents=True, exist_ok=True)
    pirate.save(place)
    prompt = engines.prompt("the sea")
    edits = (None, Edit(moves=(Slider(pirate, "add", -4.0),)), Edit(moves=(Slider(pirate, "clamp", 5.0),)))
    plain, added, clamped = (
        engines.model.text(ask(engines.ours, job(prompt, LONG, edit)).wait().tokens) for edit in edits
    )
    with served(engines.theirs.model, engine=engines.theirs) as server:  # which closes the engine: no test after it
        ask_ = {"model": server.model.name, "messages": [{"role": "user", "content": "Tell me about the sea."}]}
        ask_ |= {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 24, "seed": 0}

        def reply(**more: object) -> str:
            answer = server.post("/v1/chat/completions", ask_ | more)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"]

        assert reply() == plain
        assert reply(steering={"sliders": {"pirate": -4.0}}) == added
        assert server.put({"sliders": {"pirate:clamp": 5.0}}).status_code == 200
        assert reply() == clamped
        assert reply(steering={"sliders": {}}) == plain
        refused = server.post("/v1/chat/completions", ask_ | {"steering": {"sliders": {"nobody knows it": 1.0}}})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_slider")


REFUSED = """
import sys
import torch
from steer.errors import UnsupportedError
from steer.model.steered import describe
from steer.serve.vllm import taps
from steer.serve.vllm.engine import VllmEngine

def hook(path):
    def plain(module, args, output):
        if path.endswith(PATH) and WRONG == "is not there":
            return None
        if path.endswith(PATH):
            output = output[0] if WRONG == "reads half of the stream" else (output[0], torch.zeros_like(output[0]))
        return usual(path)(module, args, output)
    return plain

usual, taps._hook, (PATH, WRONG) = taps._hook, hook, sys.argv[2:]
try:
    VllmEngine(describe(sys.argv[1]), sys.argv[1], max_running=2, context=64, enforce_eager=True)
except UnsupportedError as e:
    print("refused:", e)
"""


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("layers.1.mlp.down_proj", "is not there"),
        ("layers.1", "reads half of the stream"),
        ("layers.2", "changes a copy of half of it"),
    ],
)
def test_a_model_that_edits_do_not_reach_is_refused_at_start(path, wrong, tiny_llama, tmp_path):
    place = _tiny(tiny_llama, tmp_path)
    made = subprocess.run([sys.executable, "-c", REFUSED, place, path, wrong], capture_output=True, text=True)
    assert "refused: vLLM: expected edits" in made.stdout, made.stderr[-2000:]


def test_the_command_serves_with_vllm(tiny_llama, tmp_path):
    command = [sys.executable, "-m", "steer.cli.main", "serve", _tiny(tiny_llama, tmp_path), "--engine", "vllm"]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "(Ctrl-C stops)" in line:
                    break
            assert "(Ctrl-C stops)" in lines[-1], "".join(lines[-20:])
            body = {"prompt": "hello friend", "max_tokens": 4, "logit_bias": {"2": -100}}
            answer = httpx.post(f"{lines[-1].split()[0]}/completions", json=body, timeout=PATIENCE)
            assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
        finally:
            server.terminate()


def _tiny(tiny_llama, tmp_path) -> str:
    from tiny_chat import save_tiny_chat

    place = save_tiny_chat(tiny_llama, tmp_path / "tiny", hidden_size=128, num_attention_heads=4, head_dim=32)
    assert json.loads((place / "config.json").read_text())["head_dim"] == 32
    return str(place)
