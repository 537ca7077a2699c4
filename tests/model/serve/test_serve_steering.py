"""Steering over the network: live sliders, profiles, a request's own; who feels what, and when."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
import torch
from serving import NO_END, Served

from steer.core.sampler import Sampler
from steer.model.decode import decode, generate
from steer.model.sliders import Sliders

HELLO = [{"role": "user", "content": "hello friend"}]
GREEDY = Sampler(20, 0, repetition_penalty=1.0, logit_bias=((2, -100.0),))
LONG = replace(GREEDY, max_new_tokens=300)
FIELDS = {"temperature": 0, "repetition_penalty": 1.0, "logit_bias": NO_END, "max_tokens": 20}


def said(server: Served, steering: dict | None = None, **more) -> tuple[str, dict]:
    """A greedy reply, and its field `steering`."""
    body = {"messages": HELLO, **FIELDS, **more} | ({} if steering is None else {"steering": steering})
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"].strip(), reply.json()["steering"]


def alone(server: Served, amounts: dict[str, float], sampler: Sampler = GREEDY) -> str:
    """The reply by this process's own decode loop, under these amounts."""
    model = server.model
    sliders = Sliders(model, live=False)
    sliders.update(amounts)
    with model.steering.applied([sliders.current]):
        (ids,) = generate(model, [model.prompt_ids(HELLO)], sampler)
    return model.text(ids)


def row(server: Served, name: str) -> dict:
    rows = {r["name"]: r for r in server.get("/v1/steering").json()["sliders"]}
    return rows[name]


def test_a_requests_own_sliders_are_those_of_the_model_alone(fresh):
    texts = []
    for amounts in ({"moral": 1.5}, {"moral": -1.5}, {"moral:clamp": 2.0, "other": 1.0}, {"other:ablate": 1.0}, {}):
        text, reported = said(fresh, {"sliders": amounts})
        assert text == alone(fresh, amounts)
        assert (reported["sliders"], reported["profile"], reported["live"]) == (amounts, None, False)
        texts.append(text)
    assert len(set(texts)) == 5


def test_openais_client_steers_by_extra_body(fresh):
    reply = fresh.client().chat.completions.create(
        model="chat", messages=HELLO, extra_body={**FIELDS, "steering": {"sliders": {"moral": 1.5}}}
    )
    assert reply.choices[0].message.content.strip() == alone(fresh, {"moral": 1.5})
    reported = reply.model_extra["steering"]
    (slider,) = reported["receipt"]["sliders"]
    prompt = len(fresh.model.prompt_ids(HELLO))
    # The last token of the reply is never read.
    assert (slider["name"], slider["operation"], slider["amount"]) == ("moral", "add", 1.5)
    assert slider["tokens"] == reported["receipt"]["tokens"] == prompt + 19


def test_a_requests_own_sliders_touch_no_other_request(fresh):
    fresh.put({"sliders": {"moral": 1.5}})
    own, live = {"sliders": {"other": 2.0}}, alone(fresh, {"moral": 1.5})
    assert said(fresh)[0] == live
    assert said(fresh, own)[0] == alone(fresh, {"other": 2.0})
    assert said(fresh, {"sliders": {}})[0] == alone(fresh, {})
    assert said(fresh, {})[0] == live
    assert [r["amount"] for r in fresh.get("/v1/steering").json()["sliders"]] == [1.5, 0.0]


def test_a_profile_comes_by_the_models_name_or_the_body_and_brings_its_sampler(fresh):
    body = {"messages": HELLO, "logit_bias": NO_END, "repetition_penalty": 1.0}
    by_name = fresh.post("/v1/chat/completions", body | {"model": "chat@noir"}).json()
    by_body = fresh.post("/v1/chat/completions", body | {"steering": {"profile": "noir"}}).json()
    both = fresh.post("/v1/chat/completions", body | {"model": "chat@noir", "steering": {"profile": "noir"}}).json()
    # Greedy, seven tokens long.
    wanted = alone(fresh, {"moral": -0.5}, replace(GREEDY, max_new_tokens=7))
    for reply in (by_name, by_body, both):
        assert reply["choices"][0]["message"]["content"].strip() == wanted
        assert reply["steering"]["profile"] == "noir"
        assert reply["steering"]["sliders"] == {"moral": -0.5}
    assert (by_name["model"], by_body["model"]) == ("chat@noir", "chat")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sliders", "stand"),
    [
        ({"moral": 1.0}, {"moral": 1.0}),
        ({"moral": None}, {}),
        ({"other": 1.0}, {"moral": -0.5, "other": 1.0}),
        # Disabled in the profile, but known by it.
        ({"other:clamp": 2.0}, {"moral": -0.5, "other:clamp": 2.0}),
        ({}, {"moral": -0.5}),
    ],
)
def test_a_requests_sliders_stand_on_top_of_its_profiles(fresh, sliders, stand):
    text, reported = said(fresh, {"profile": "noir", "sliders": sliders})
    assert reported["sliders"] == stand
    assert text == alone(fresh, stand)
    assert said(fresh, {"profile": "noir"})[1]["sliders"] == {"moral": -0.5}


def test_putting_sliders_merges_null_deletes_and_a_profile_replaces(fresh):
    def standing(body):
        reply = fresh.put(body)
        assert reply.status_code == 200, reply.text
        assert reply.json() == fresh.get("/v1/steering").json()
        return reply.json()["profile"], said(fresh)[1]["sliders"]

    assert standing({"sliders": {"moral": 1.0}}) == (None, {"moral": 1.0})
    assert standing({"sliders": {"other": 0.5}}) == (None, {"moral": 1.0, "other": 0.5})
    assert standing({"sliders": {"moral": None}}) == (None, {"other": 0.5})
    assert standing({"profile": "noir"}) == ("noir", {"moral": -0.5})
    assert standing({"sliders": {"other": 0.5}}) == ("noir", {"moral": -0.5, "other": 0.5})
    assert standing({"profile": "noir", "sliders": {"moral": 0.25}}) == ("noir", {"moral": 0.25})
    assert standing({}) == ("noir", {"moral": 0.25})
    assert standing({"profile": None}) == (None, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"sliders": {"moral": 2.0, "kindness": 1.0}}, 400, "found moral, other"),
        ({"sliders": {"other": 2.0, "moral:ablate": 1.5}}, 400, "from 0 to 1"),
        ({"sliders": {"moral": "much"}}, 400, "valid number"),
        ({"sliders": 3}, 400, "sliders"),
        ({"slider": {"moral": 1}}, 400, "not permitted"),
        ({"profile": "gris"}, 404, "expected one of noir"),
        ({"profile": "gris", "sliders": {"moral": 1.0}}, 404, "expected one of noir"),
    ],
)
def test_a_change_that_cannot_be_changes_nothing(fresh, body, status, says):
    fresh.put({"sliders": {"moral": 0.5}})
    reply = fresh.put(body)
    assert reply.status_code == status
    assert says in reply.json()["error"]["message"]
    assert said(fresh)[1]["sliders"] == {"moral": 0.5}


def test_the_sliders_are_listed_with_their_facts(fresh):
    fresh.put({"profile": "noir", "sliders": {"other:clamp": 1.0}})
    reported = fresh.get("/v1/steering").json()
    assert (reported["profile"], reported["profiles"]) == ("noir", ["noir"])
    slider = fresh.model.sliders.slider("moral")
    assert row(fresh, "moral") == {
        "name": "moral",
        "kind": "direction",
        "operation": "add",
        "amount": -0.5,
        "neutral": 0.0,
        "range": [-1.0, 1.0],
        "share": pytest.approx(slider.share(-0.5), abs=1e-4),
        "unit_share": slider.share(1.0),
        "site": 1,
        "fixed": None,
    }
    clamp = row(fresh, "other:clamp")
    assert (clamp["operation"], clamp["amount"], clamp["neutral"], clamp["range"]) == ("clamp", 1.0, None, None)
    fresh.put({"sliders": {"other:clamp": None}})
    assert row(fresh, "other")["amount"] == 0.0
    assert "other:clamp" not in {r["name"] for r in fresh.get("/v1/steering").json()["sliders"]}


def test_too_much_and_beyond_what_was_calibrated_is_a_warning(fresh):
    assert said(fresh, {"profile": "noir", "sliders": {"moral": 0.25}})[1]["warnings"] == []
    far, beyond = said(fresh, {"profile": "noir", "sliders": {"moral": 1.25}})[1]["warnings"]
    assert "fall apart" in far
    assert "'moral' is at 1.25, its calibrated range is -1 to 1" in beyond
    assert fresh.put({"profile": "noir", "sliders": {"moral": 1.25}}).json()["warnings"] == [far, beyond]
    (never,) = said(fresh, {"sliders": {"moral:scale": 1.0, "other:cap": 1000.0}})[1]["warnings"]
    assert "'other:cap'" in never
    assert "never fired" in never


@pytest.mark.slow
def test_a_slider_that_moves_is_felt_by_replies_that_follow_it_and_by_no_other(fresh):
    """Two streams, one of which follows the live sliders, while they move."""
    body = {"messages": HELLO, **FIELDS, "max_tokens": 300, "stream": True}
    url = f"{fresh.url}/v1/chat/completions"
    with (
        httpx.stream("POST", url, json=body, timeout=60) as following,
        httpx.stream("POST", url, json=body | {"steering": {"sliders": {"other": 0.5}}}, timeout=60) as own,
    ):
        lines = following.iter_lines()
        first = list(itertools.islice((line for line in lines if '"content":" ' in line), 3))
        fresh.put({"sliders": {"moral": 3.0}})
        follows, stays = words(first) + words(lines), words(own.iter_lines())
    plain = alone(fresh, {}, LONG).split()
    steered_from = next(i for i, (a, b) in enumerate(zip(follows, plain, strict=True)) if a != b)
    assert 3 <= steered_from < 300
    # From some token on it is what the model writes when the slider moves there.
    assert any(follows == moved_at(fresh, step, {"moral": 3.0}) for step in range(3, steered_from + 1))
    assert stays == alone(fresh, {"other": 0.5}, LONG).split()


def words(lines) -> list[str]:
    """What a stream of chunks says."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks).split()


def moved_at(server: Served, step: int, amounts: dict[str, float]) -> list[str]:
    """The reply of this process's own decode loop when sliders move before token `step`."""
    model = server.model
    sliders = Sliders(model, live=False)
    sliders.update(amounts)
    made: list[int] = []
    with model.steering.applied([None]):
        steps = decode(model, [model.prompt_ids(HELLO)], LONG)
        for _ in range(step):
            made.append(next(steps).tokens[0])
        with model.steering.applied([sliders.current]):
            made += [s.tokens[0] for s in steps]
    return model.text(made).split()


def test_requests_side_by_side_go_each_by_their_own_sliders(fresh):
    wishes = [{"moral": 1.5}, {"moral": -1.5}, {"other:clamp": 2.0}, {"moral:ablate": 1.0}, {}, {"other": 3.0}]
    with ThreadPoolExecutor(len(wishes)) as pool:
        texts = list(pool.map(lambda amounts: said(fresh, {"sliders": amounts})[0], wishes))
    assert texts == [alone(fresh, amounts) for amounts in wishes]


def test_the_live_sliders_are_not_those_of_the_model_in_this_process(fresh):
    fresh.put({"sliders": {"moral": 2.0}})
    assert dict(fresh.model.sliders) == {}
    assert alone(fresh, {}) != said(fresh)[0]
    with torch.inference_mode():
        assert fresh.model.steering.rows == (None,)
