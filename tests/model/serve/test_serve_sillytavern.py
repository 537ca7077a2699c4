"""The bodies that SillyTavern sends, replayed: text completion, custom chat completion with fields of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_desk import engine_on
from serving import served

from steer.core.profile import Profile
from steer.core.sampler import PRESETS
from steer.serve.limits import Limits
from steer.serve.requests import ChatRequest, CompletionRequest, chat_prompt, completion_prompts, sampler_of
from steer.serve.server import Options

FIXTURES = Path(__file__).parent / "fixtures"


def body(name: str) -> dict:
    return json.loads((FIXTURES / f"sillytavern_{name}.json").read_text(encoding="utf-8"))


def events(text: str) -> list[dict]:
    """What its reader of event streams gets: one JSON value an event, until [DONE]."""
    *lines, done = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def test_its_settings_of_a_text_completion_reach_the_sampler():
    request = CompletionRequest.model_validate(body("text_completion"))
    sampler = sampler_of(request, PRESETS["plain"], Limits(), 77, 512)
    felt = {
        "max_new_tokens": 24,
        "temperature": 1.1,
        "min_p": 0.05,
        "repetition_penalty": 1.03,
        "dry_multiplier": 0.8,
        "dry_sequence_breakers": ("\n", ":", '"', "*"),
        "xtc_probability": 0.5,
        "temperature_last": True,
        "top_k": 0,
        "logit_bias": (),
    }
    assert {name: getattr(sampler, name) for name in felt} == felt
    assert sampler.seed >= 0
    assert request.stop == ["\nYou:", "<|user|>"]
    assert request.logprobs == 10


def test_a_prompt_that_brings_its_template_gets_no_second_bos(served_model):
    request = CompletionRequest.model_validate(body("text_completion"))
    (prompt,) = completion_prompts(served_model, request, served_model.context)
    assert list(prompt.ids).count(served_model.tokenizer.bos_token_id) == 1
    chat = [{"role": "system", "content": "be well"}, {"role": "user", "content": "hello friend"}]
    assert list(prompt.ids) == served_model.prompt_ids(chat)


def text_completion(server):
    """The streamed chunks of its text completion, and the whole reply with the same seed, which has their text."""
    sent = body("text_completion") | {"seed": 3}  # by another seed the first token may end the reply
    reply = server.post("/v1/completions", sent)
    assert reply.status_code == 200, reply.text
    chunks = events(reply.text)
    text = "".join(c["choices"][0]["text"] for c in chunks)
    whole = server.post("/v1/completions", sent | {"stream": False, "seed": chunks[-1]["steering"]["seed"]}).json()
    assert text == whole["choices"][0]["text"] != ""
    return chunks, whole


def test_its_text_completion_streams(fresh):
    chunks, whole = text_completion(fresh)
    reported = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]["tokens"]]
    # Its panel of token probabilities reads these.
    assert all(10 <= len(top) <= 11 for t in reported for top in t["top_logprobs"])
    assert [t for c in reported for t in c["tokens"]] == whole["choices"][0]["logprobs"]["tokens"]


@pytest.mark.parametrize("stream", [True, False])
def test_its_chat_with_a_body_of_the_users_is_steered(fresh, stream):
    reply = fresh.post("/v1/chat/completions", body("chat_completion") | {"stream": stream})
    assert reply.status_code == 200, reply.text
    last = events(reply.text)[-1] if stream else reply.json()
    assert last["model"] == "chat@noir"
    assert last["steering"]["profile"] == "noir"
    assert last["steering"]["sliders"] == {"moral": -0.5, "other": 1.0}
    assert last["steering"]["seed"] == 7
    assert {s["name"] for s in last["steering"]["receipt"]["sliders"]} == {"moral", "other"}
    if stream:
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in events(reply.text)).strip()


def test_its_prefill_is_continued(served_model):
    request = ChatRequest.model_validate(body("chat_completion"))
    prompt = chat_prompt(served_model, request)
    head = served_model.prompt_ids([m.model_dump() for m in request.messages[:-1]])
    assert list(prompt.ids) == [*head, *served_model.tokenizer("well", add_special_tokens=False).input_ids]
    assert prompt.begun == 1


def test_its_check_of_the_connection_finds_the_models(fresh):
    assert [m["id"] for m in fresh.get("/v1/models").json()["data"]] == ["chat", "chat@noir"]


def test_its_requests_are_answered_by_llama_cpp_too(desk, llama):
    noir = {"name": "noir", "sliders": [{"slider": "a", "operation": "ablate", "amount": 0.5}]}
    options = Options(profiles=[Profile.parse(noir, "noir")], any_model_name=True)
    with engine_on(desk, llama.url) as engine, served(engine.model, options, engine) as server:
        chunks, _ = text_completion(server)
        tops = [top for c in chunks for top in c["choices"][0]["logprobs"]["top_logprobs"]]
        assert len(tops) > 5
        assert all(10 <= len(top) <= 11 for top in tops)
        for stream in (True, False):
            chat = body("chat_completion") | {"steering": {"sliders": {"b:ablate": 1.0}}}
            reply = server.post("/v1/chat/completions", chat | {"stream": stream})
            assert reply.status_code == 200, reply.text
            steering = (events(reply.text)[-1] if stream else reply.json())["steering"]
            assert (steering["profile"], steering["seed"]) == ("noir", 7)
            assert steering["sliders"] == {"a:ablate": 0.5, "b:ablate": 1.0}
            assert steering["warnings"] == ["receipt: llama.cpp does not report how far its LoRAs moved the reply"]
