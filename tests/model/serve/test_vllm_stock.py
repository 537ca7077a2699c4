"""Stock `vllm serve` with steer installed beside it: sliders in `vllm_xargs`, found through vLLM's entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from socket import create_server

import httpx
import pytest
from batched import GREEDY, by_decoding, job

from steer.checkpoint.fetch import DEFAULT_MODEL, resolve
from steer.checkpoint.library import direction_place
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.model.steered import SteeredModel, load

pytest.importorskip("vllm", reason="vLLM is not installed here; make vllm sets up an environment with it")
pytestmark = [pytest.mark.model, pytest.mark.slow]
SECONDS = 600
PROFILE = """
name: held
sliders:
- {slider: push, operation: clamp, amount: 3.0, when: {part: reply, after: 4}}
"""


@pytest.fixture(scope="module")
def model() -> SteeredModel:
    return load(DEFAULT_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def push(model, make_direction, own_home) -> Direction:
    direction = make_direction("push", site=14, width=model.anatomy.width)
    # Of that norm are the model's tokens there: of one that is ten times longer, no projection is set.
    direction = replace(direction, with_mean=40.0, without_mean=0.0, residual_norm=100.0)
    direction.provenance["sketch"] = model.sketch().to_header()
    place = direction_place(model.sketch(), "push")
    place.parent.mkdir(parents=True, exist_ok=True)
    direction.save(place)
    return direction


@pytest.fixture(scope="module")
def url(push, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "held.yaml").write_text(PROFILE)
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        # `vllm serve` itself does not start from the wheel for CPUs: it asks for the version of a package named vllm.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve(DEFAULT_MODEL), "--port",
        str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", "merged",
    ]  # fmt: skip
    env = os.environ | {"STEER_PROFILES": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
            while not _answers(url):
                assert server.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
                time.sleep(1)
            yield url
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _ask(url: str, prompt: list[int], steering: object = None) -> httpx.Response:
    body = {"model": "merged", "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    body |= {"ignore_eos": True} | ({} if steering is None else {"vllm_xargs": {"steering": json.dumps(steering)}})
    return httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS)


def test_each_request_of_a_batch_is_under_its_own_sliders(url, model, push):
    held = Slider(push, "clamp", 3.0, when=Schedule("reply", after=4))
    asked = {
        None: None,
        Edit(moves=(Slider(push, "add", 1.0),)): {"sliders": {"push": 1.0}},
        Edit(moves=(Slider(push, "add", -1.5),)): {"sliders": {"push": -1.5}},
        Edit(moves=(Slider(push, "clamp", -2.0),)): {"sliders": {"push:clamp": -2.0}},
        Edit(moves=(held,)): {"profile": "held"},
    }
    prompt = model.prompt_ids([{"role": "user", "content": "Tell me about " + "the sea, the ships, " * 30}])
    model.end_token_ids = frozenset()
    wanted = [by_decoding(model, job(prompt, replace(GREEDY, max_new_tokens=16), edit)) for edit in asked]
    assert len({tuple(w) for w in wanted}) == len(asked)
    with ThreadPoolExecutor(len(asked)) as threads:
        for _ in range(2):  # the second time the prompt is cached, under each edit apart
            answers = list(threads.map(lambda steering: _ask(url, prompt, steering), asked.values()))
            assert [a.status_code for a in answers] == [200] * len(asked), answers[0].text
            assert [a.json()["choices"][0]["token_ids"] for a in answers] == wanted


@pytest.mark.parametrize(
    ("steering", "found"),
    [
        ({"sliders": {"nobody knows it": 1.0}}, "nobody knows it"),
        ({"profile": "none of that name"}, "none of that name"),
        ({"sliders": {"push:ablate": 7.0}}, "ablate takes an amount from 0 to 1"),
        ({"slider": 1}, "expected JSON as in"),
    ],
)
def test_what_cannot_be_done_is_an_error_and_never_plain_text(steering, found, url, model):
    answer = _ask(url, model.prompt_ids([{"role": "user", "content": "Hello."}]), steering)
    assert answer.status_code == 400
    assert found in answer.text
