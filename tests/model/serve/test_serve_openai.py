"""OpenAI's own client against a real server: chats, completions, streams, stop strings, logprobs, usage, seeds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from serving import NO_END, Served

from steer.core.sampler import PRESETS, Sampler
from steer.model.decode import generate

HELLO = [{"role": "user", "content": "hello friend"}]
GREEDY = {"temperature": 0, "logit_bias": NO_END, "extra_body": {"repetition_penalty": 1.0}}


def alone(server: Served, messages: list[dict[str, str]], sampler: Sampler, key: int = 0) -> str:
    """The reply by this process's own decode loop."""
    model = server.model
    (ids,) = generate(model, [model.prompt_ids(messages)], sampler, [key])
    return model.text(ids)


def test_a_chat_is_the_reply_that_the_model_gives_alone(server):
    reply = server.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=12, **GREEDY)
    wanted = alone(server, HELLO, Sampler(12, 0, repetition_penalty=1.0, logit_bias=((2, -100.0),)))
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content.strip(), choice.finish_reason) == (
        "assistant",
        wanted,
        "length",
    )
    assert reply.object == "chat.completion"
    assert reply.model == "chat"
    prompt = len(server.model.prompt_ids(HELLO))
    assert reply.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_choices_draw_from_streams_of_their_own_within_the_seed(server, seed):
    reply = server.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=9, seed=seed, n=3)
    sampler = Sampler(**{**vars(PRESETS["plain"]), "max_new_tokens": 9, "seed": seed})
    assert [c.index for c in reply.choices] == [0, 1, 2]
    said = [c.message.content.strip() for c in reply.choices]
    assert said == [alone(server, HELLO, sampler, key) for key in range(3)]
    assert len(set(said)) == 3


def test_a_reply_without_a_seed_shows_the_one_that_gives_it_again(server):
    client = server.client()
    first, other = (client.chat.completions.create(model="chat", messages=HELLO, max_tokens=16) for _ in range(2))
    assert first.choices[0].message.content != other.choices[0].message.content
    seed = first.model_extra["steering"]["seed"]
    again = client.chat.completions.create(model="chat", messages=HELLO, max_tokens=16, seed=seed)
    assert again.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_same_reply_in_pieces(server, n):
    asked = {"model": "chat", "messages": HELLO, "max_tokens": 10, "seed": 3, "n": n}
    whole = server.client().chat.completions.create(**asked)
    said, ends = [""] * n, [None] * n
    chunks = list(server.client().chat.completions.create(**asked, stream=True))
    for chunk in chunks:
        (choice,) = chunk.choices
        said[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert said == [c.message.content for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert [c.choices[0].delta.role for c in chunks[:n]] == ["assistant"] * n
    assert len({c.id for c in chunks}) == 1
    assert len(chunks) > 3 * n
    assert chunks[-1].model_extra["steering"] == whole.model_extra["steering"]
    assert all("steering" not in c.model_extra for c in chunks[:-1])


def test_usage_of_a_stream_comes_when_asked_for_in_a_last_chunk_of_its_own(server):
    asked = {"model": "chat", "messages": HELLO, "max_tokens": 10, "seed": 3}
    whole = server.client().chat.completions.create(**asked)
    *chunks, last = server.client().chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.model_extra["steering"] == whole.model_extra["steering"]
    assert all(c.usage is None and "steering" not in c.model_extra for c in chunks)


def test_events_are_lines_of_ascii_json_and_end_with_done(server):
    body = {"messages": HELLO, "max_tokens": 3, "stream": True}
    reply = server.post("/v1/chat/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.content.isascii()
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: "))["object"] == "chat.completion.chunk" for e in events[:-2])


def test_an_end_token_stops_a_reply_and_is_no_text(server):
    forced = {"logit_bias": {"2": 100}}
    reply = server.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=10, **forced)
    assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("stop", "")
    assert reply.usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_reply_before_them(server, stream):
    asked = {"model": "chat", "messages": HELLO, "max_tokens": 14, **GREEDY}
    text = server.client().chat.completions.create(**asked).choices[0].message.content
    words = text.split(" ")
    # Of two letters of one token, a space, and one letter of the next.
    stop = f"{words[5]} {words[6][0]}"
    assert text.index(stop) > 0
    reply = server.client().chat.completions.create(**asked, stop=["nowhere", stop], stream=stream)
    if stream:
        chunks = list(reply)
        said = "".join(c.choices[0].delta.content or "" for c in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        said, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert reply.usage.completion_tokens == len(text[: text.index(stop) + len(stop)].split())
    assert said == text[: text.index(stop)]
    assert finish == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models_own_before_any_sampling(server, stream):
    asked = {"model": "chat", "messages": HELLO, "max_tokens": 5, "seed": 5, "logprobs": True, "top_logprobs": 3}
    reply = server.client().chat.completions.create(**asked, logit_bias=NO_END, stream=stream)
    if stream:
        chunks = [c for c in reply if c.choices[0].logprobs]
        reported = [t for c in chunks for t in c.choices[0].logprobs.content]
    else:
        reported = reply.choices[0].logprobs.content
    assert len(reported) == 5
    model = server.model
    ids = model.prompt_ids(HELLO)
    for one in reported:
        logits = model.hf(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
        (token,) = model.tokenizer.convert_tokens_to_ids([one.token])
        assert one.logprob == pytest.approx(float(logits[token]), abs=1e-4)
        assert bytes(one.bytes).decode() == one.token
        values, likeliest = logits.topk(3)
        assert [t.token for t in one.top_logprobs] == model.tokenizer.convert_ids_to_tokens(likeliest.tolist())
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        ids.append(token)


def test_a_completion_goes_on_from_its_prompt_with_offsets_into_its_text(server):
    reply = server.client().completions.create(
        model="chat", prompt="<s> hello friend", max_tokens=4, logprobs=2, **GREEDY
    )
    (choice,) = reply.choices
    ids = server.model.tokenizer("<s> hello friend", add_special_tokens=False).input_ids
    (made,) = generate(server.model, [ids], Sampler(4, 0, repetition_penalty=1.0, logit_bias=((2, -100.0),)))
    assert reply.object == "text_completion"
    assert choice.text.split() == server.model.text(made).split()
    reported = choice.logprobs
    assert reported.tokens == server.model.tokenizer.convert_ids_to_tokens(made)
    assert [choice.text[at:].split()[0] for at in reported.text_offset] == reported.tokens
    assert all(
        t[token] == lp
        for t, token, lp in zip(reported.top_logprobs, reported.tokens, reported.token_logprobs, strict=True)
    )
    assert reply.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_reply(server, stream):
    asked = {"model": "chat", "prompt": "hello friend", "max_tokens": 4, **GREEDY}
    plain = server.client().completions.create(**asked).choices[0].text
    reply = server.client().completions.create(**asked, echo=True, stream=stream)
    said = "".join(c.choices[0].text for c in reply) if stream else reply.choices[0].text
    assert said == "hello friend" + plain


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_its_log_probabilities(server, stream):
    ids = server.model.tokenizer("<s> hello friend well hello", add_special_tokens=False).input_ids
    asked = {"model": "chat", "prompt": ids, "max_tokens": 2, "logprobs": 3, "echo": True, **GREEDY}
    made = server.client().completions.create(**asked, stream=stream)
    reported = [c.choices[0].logprobs for c in made if c.choices[0].logprobs] if stream else [made.choices[0].logprobs]
    tokens, logprobs, top, offsets = (
        [x for part in reported for x in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert tokens[: len(ids)] == server.model.tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) == len(logprobs) == len(top) == len(offsets) == len(ids) + 2
    with torch.no_grad():
        scores = server.model.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert logprobs[0] is top[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx([float(scores[i, t]) for i, t in enumerate(ids[1:])], abs=1e-5)
    assert sorted(top[2].values())[-3:] == pytest.approx(sorted(scores[1].topk(3).values.tolist()), abs=1e-5)
    assert offsets == sorted(offsets)


def test_an_echoed_prompt_is_scored_under_the_sliders_of_its_request(server):
    asked = {"model": "chat", "prompt": "hello friend well", "max_tokens": 1, "logprobs": 0, "echo": True, **GREEDY}
    plain = server.client().completions.create(**asked).choices[0].logprobs
    name = next(iter(server.model.sliders.known()))
    extra = asked["extra_body"] | {"steering": {"sliders": {name: 2.0}}}
    moved = server.client().completions.create(**asked | {"extra_body": extra}).choices[0].logprobs
    assert moved.tokens[:3] == plain.tokens[:3]
    assert moved.token_logprobs[1] != pytest.approx(plain.token_logprobs[1], abs=1e-3)


def test_prompts_may_be_texts_token_ids_and_several(server):
    def texts(prompt, **more):
        made = server.client().completions.create(model="chat", prompt=prompt, max_tokens=5, seed=1, **more)
        return [c.text for c in made.choices], made.usage.prompt_tokens

    ids = server.model.tokenizer("hello friend").input_ids
    one, counted = texts("hello friend")
    assert texts(ids) == texts([ids]) == (one, counted)
    two, both = texts(["hello friend", "well"])
    assert two == one + texts("well")[0]
    assert both == counted + texts("well")[1]
    assert texts(["hello friend", "well"], n=2)[0] == texts("hello friend", n=2)[0] + texts("well", n=2)[0]


def test_a_last_message_of_the_assistants_is_continued(server):
    begun = [*HELLO, {"role": "assistant", "content": "well yes"}]
    reply = server.client().chat.completions.create(model="chat", messages=begun, max_tokens=6, **GREEDY)
    ids = [*server.model.prompt_ids(HELLO), *server.model.tokenizer("well yes", add_special_tokens=False).input_ids]
    (made,) = generate(server.model, [ids], Sampler(6, 0, repetition_penalty=1.0, logit_bias=((2, -100.0),)))
    assert reply.choices[0].message.content.split() == server.model.text(made).split()
    assert reply.usage.prompt_tokens == len(ids)
    empty = server.client().chat.completions.create(
        model="chat", messages=[*HELLO, {"role": "assistant", "content": ""}], max_tokens=6, **GREEDY
    )
    plain = server.client().chat.completions.create(model="chat", messages=HELLO, max_tokens=6, **GREEDY)
    assert empty.choices[0].message.content == plain.choices[0].message.content


def test_messages_of_one_role_in_a_row_parts_and_a_system_prompt_in_the_middle(server):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "friend"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "user", "content": "well"},
        {"role": "developer", "content": "lie"},
    ]
    reply = server.client().chat.completions.create(model="chat", messages=chat, max_tokens=1)
    plain = [{"role": "user", "content": "hello friend"}, chat[1], {"role": "system", "content": "lie"}]
    assert reply.usage.prompt_tokens == len(server.model.prompt_ids(plain))


def test_a_reply_is_cut_to_the_context(server):
    prompt = [10] * (server.engine.context - 3)
    reply = server.client().completions.create(model="chat", prompt=prompt, logit_bias=NO_END)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == server.engine.context


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"top_k": 1}, {"temperature": 0}),
        ({"top_k": -1}, {}),
        ({"seed": -1, "temperature": 0}, {"temperature": 0}),
        ({"min_p": 1.0}, {"temperature": 0}),
        ({"rep_pen": 1.7}, {"repetition_penalty": 1.7}),
        ({"typical": 0.2}, {"typical_p": 0.2}),
        ({"n_predict": 4}, {"max_tokens": 4}),
        ({"max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"stop_sequence": "a"}, {"stop": ["a"]}),
        ({"stop": ["", "a"]}, {"stop": "a"}),
        ({"logit_bias": [[10, 100]]}, {"logit_bias": {"10": 100}}),
        ({"logit_bias": [[10, 100], [2, False]]}, {"logit_bias": {"10": 100, "2": -100}}),
        (
            {"dry_multiplier": 5, "dry_sequence_breakers": '["a", "b"]'},
            {"dry_multiplier": 5, "dry_sequence_breakers": ["a", "b"]},
        ),
        (
            {"dry_multiplier": 5, "dry_sequence_breakers": '"a", "b"'},
            {"dry_multiplier": 5, "dry_sequence_breakers": ["a", "b"]},
        ),
        ({"dry_multiplier": 5, "dry_penalty_last_n": 7}, {"dry_multiplier": 5, "dry_range": 7}),
        ({"mirostat_mode": 2, "tools": [], "user": None, "prompt_template": {}}, {}),
        ({"temperature": None, "stop": None, "n": None, "steering": None, "logit_bias": None}, {}),
    ],
)
def test_fields_go_by_the_names_that_clients_give_them(server, fields, same):
    def said(body):
        reply = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 20, "seed": 11} | body)
        assert reply.status_code == 200, reply.text
        return [c["message"]["content"] for c in reply.json()["choices"]]

    if "max_tokens" in same:
        fields = {"max_tokens": None} | fields
    assert said(fields) == said(same)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3.0},
        {"top_p": 0.3},
        {"min_p": 0.6},
        {"typical_p": 0.3},
        {"repetition_penalty": 3.0},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"dry_multiplier": 5.0, "dry_allowed_length": 0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"logit_bias": {"10": 20}},
        {"seed": 12},
    ],
)
def test_every_field_of_the_sampler_is_felt(server, fields):
    base = {"prompt": "hello", "max_tokens": 24, "seed": 11, "temperature": 1.0, "min_p": 0, "repetition_penalty": 1.0}
    said = [server.post("/v1/completions", base | f).json()["choices"][0]["text"] for f in ({}, fields)]
    assert said[0] != said[1]


def test_temperature_last_comes_after_the_other_stages(server):
    fields = {"temperature": 50.0, "min_p": 0.95, "prompt": "hello", "max_tokens": 12, "seed": 1, "logit_bias": NO_END}
    first, last, greedy = (
        server.post("/v1/completions", fields | more).json()["choices"][0]["text"]
        for more in ({}, {"temperature_last": True}, {"temperature": 0})
    )
    assert last == greedy
    assert first != greedy


def test_models_are_the_checkpoint_and_each_profile_on_it(server):
    assert [m.id for m in server.client().models.list()] == ["chat", "chat@noir"]
    assert server.client().models.retrieve("chat@noir").id == "chat@noir"


def test_the_likeliest_tokens_are_all_finite(server):
    reply = server.client().chat.completions.create(
        model="chat", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=20, logit_bias=NO_END
    )
    for one in reply.choices[0].logprobs.content:
        assert len(one.top_logprobs) == 20
        assert all(math.isfinite(t.logprob) for t in one.top_logprobs)
