"""Many clients at once, in fp64, where a batch rounds as a text alone does: each gets what its request gets alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import count

import httpx
import pytest
import torch
from serving import NO_END, Served, served, until

from steer.core.profile import Profile
from steer.core.sampler import PRESETS
from steer.model.decode import generate
from steer.model.profiles import use
from steer.model.sliders import Sliders
from steer.model.steered import load
from steer.serve.server import Options

EACH = 6
"""Requests of a client."""
LATE = Profile.parse(
    {"name": "late", "sliders": [{"slider": "moral", "amount": 3, "when": {"part": "reply", "after": 3, "ramp": 4}}]},
    "late",
)
SETTINGS: list[dict] = [
    {"sliders": {}},
    {"sliders": {"moral": 2.0}},
    {"sliders": {"moral": -2.0}},
    {"sliders": {"moral:clamp": 1.0, "other": -1.0}},
    {"sliders": {"other:cap": -0.5}},
    {"sliders": {"moral:ablate": 1.0}},
    {"profile": "late"},
]
WRONG: list[dict] = [
    {"steering": {"sliders": {"kindness": 1.0}}},
    {"steering": {"profile": "nobody"}},
    {"messages": "hello"},
    {"max_tokens": 2.5},
    {"logit_bias": {"5": "much"}},
]


@pytest.fixture(scope="module")
def exact(served_model) -> Iterator[Served]:
    """The tiny model in fp64, with fewer places than there are clients."""
    with served(load(served_model.name, dtype=torch.float64), Options(profiles=[LATE]), max_running=5) as server:
        yield server


def body_of(client: int, number: int) -> dict:
    """A request, the same whenever it is made."""
    chance = random.Random(f"{client} {number}")
    words = ["hello", "friend", "lie", "truth", "well", "yes", "ba", "do"]
    return {
        "messages": [{"role": "user", "content": " ".join(chance.choices(words, k=chance.randint(1, 12)))}],
        "max_tokens": chance.randint(5, 40),
        "temperature": chance.choice([0.0, 1.0]),
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "seed": chance.randrange(2**31),
        "logit_bias": NO_END,
        "logprobs": True,
        "steering": SETTINGS[client],
    }


def alone(server: Served, body: dict) -> tuple[list[str], list[float]]:
    """Its tokens by this process's own decode loop, and their logprobs in one pass over the whole text."""
    model, setting = server.model, body["steering"]
    sliders = Sliders(model, live=False)
    if "profile" in setting:
        use(sliders, LATE)
    else:
        sliders.update(setting["sliders"])
    drawn = {"temperature": body["temperature"], "min_p": 0.0, "repetition_penalty": 1.1, "logit_bias": NO_END}
    sampler = replace(PRESETS["plain"], **drawn, max_new_tokens=body["max_tokens"], seed=body["seed"])
    prompt = model.prompt_ids(body["messages"])
    with model.steering.applied([sliders.current]):
        (ids,) = generate(model, [prompt], sampler)
        if model.steering.timed:
            return model.tokenizer.convert_ids_to_tokens(ids), []
        with torch.inference_mode():
            logits = model.hf(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    reported = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return model.tokenizer.convert_ids_to_tokens(ids), reported.tolist()


@pytest.mark.slow
def test_everybody_gets_what_they_would_get_alone_whoever_hangs_up_or_sends_rubbish(exact):
    url, over = f"{exact.url}/v1/chat/completions", threading.Event()
    hung_up = exact.metric("steer_hung_up_total")

    def asks(client: int) -> list[tuple[dict, httpx.Response]]:
        bodies = [body_of(client, number) for number in range(EACH)]
        with httpx.Client(timeout=60) as http:
            return [(body, http.post(url, json=body)) for body in bodies]

    def leaves() -> int:
        """It follows the live sliders, which move all the while."""
        body = body_of(1, 0) | {"max_tokens": 400, "stream": True, "steering": None}
        for number in count():
            if over.is_set():
                return number
            with httpx.stream("POST", url, json=body, timeout=60) as reply:
                next(reply.iter_lines())
            exact.put({"sliders": {"moral": [-2.5, 2.5][number % 2]}})

    def sends_rubbish() -> set[int]:
        found = set()
        for number in count():
            if over.is_set():
                return found
            body = body_of(0, number) | WRONG[number % len(WRONG)]
            found.add(httpx.post(url, json=body, timeout=60).status_code)

    with ThreadPoolExecutor(len(SETTINGS) + 2) as pool:
        left, wrong = pool.submit(leaves), pool.submit(sends_rubbish)
        everybody = [pool.submit(asks, client) for client in range(len(SETTINGS))]
        wait(everybody)
        over.set()
    assert until(lambda: (exact.engine.running, exact.engine.waiting) == (0, 0), 5)
    assert left.result() >= 2
    assert until(lambda: exact.metric("steer_hung_up_total") == hung_up + left.result(), 5)
    assert wrong.result() == {400, 404}
    for client in everybody:
        for body, reply in client.result():
            assert reply.status_code == 200, reply.text
            choice = reply.json()["choices"][0]
            tokens, logprobs = alone(exact, body)
            assert [t["token"] for t in choice["logprobs"]["content"]] == tokens
            assert choice["finish_reason"] == "length"
            if logprobs:
                reported = [t["logprob"] for t in choice["logprobs"]["content"]]
                assert reported == pytest.approx(logprobs, abs=1e-5)
