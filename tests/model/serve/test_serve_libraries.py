"""Client libraries against a real server on each engine: openai with tools, litellm, LangChain; and schemathesis, which
sends what the server's own OpenAPI document allows, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import openai
import pytest
from llama_desk import engine_on
from pydantic import BaseModel
from serving import NO_END, Served, served

from steer.serve.limits import Limits
from steer.serve.server import Options

HELLO = [{"role": "user", "content": "hello friend"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server that takes any model's name."""
    options = Options(any_model_name=True, limits=Limits(tokens=6, choices=4))
    if request.param == "transformers":
        with served(request.getfixturevalue("served_model"), options) as running:
            yield running
    else:
        llama = request.getfixturevalue("llama").url
        with (
            engine_on(request.getfixturevalue("desk"), llama) as engine,
            served(engine.model, options, engine) as running,
        ):
            yield running


@pytest.fixture(scope="module")
def chain(server: Served) -> Any:
    """LangChain's client."""
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="any", model="gpt-4o", max_tokens=5, seed=1, temperature=0,
        logit_bias=NO_END, max_retries=0,
    )  # fmt: skip


def test_openais_client_reads_a_reply_to_a_request_with_tools(server):
    chat: Any = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "well"},
    ]
    reply = server.client().chat.completions.create(model="gpt-4o", messages=chat, tools=TOOLS, max_tokens=3)
    assert reply.choices[0].message.tool_calls is None
    warnings = reply.model_extra["steering"]["warnings"]
    assert [w.partition(":")[0] for w in warnings] == ["tools", "messages[1], messages[2]"]


def test_openais_client_streams_with_its_own_helper(server):
    with server.client().chat.completions.stream(
        model="gpt-4o", messages=HELLO, max_tokens=4, seed=1, logit_bias=NO_END
    ) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.current_completion_snapshot.choices[0].message.content == said != ""


def test_openais_client_asks_for_a_form_that_the_reply_has_not(server):
    class City(BaseModel):
        name: str

    with pytest.raises((ValueError, openai.OpenAIError)):
        server.client().chat.completions.parse(model="gpt-4o", messages=HELLO, max_tokens=3, response_format=City)


@pytest.mark.slow
def test_langchain_answers_streams_and_counts(chain):
    whole = chain.invoke("hello friend")
    assert whole.usage_metadata["output_tokens"] == 5
    chunks = list(chain.stream("hello friend", stream_usage=True))
    assert "".join(c.content for c in chunks) == whole.content != ""
    assert sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks) == 5


@pytest.mark.slow
def test_langchain_sends_tools_and_their_results_back(chain):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    call = {"name": "weather", "args": {"city": "bo"}, "id": "a"}
    chat = [
        SystemMessage("be well"),
        HumanMessage(["hello", {"type": "text", "text": "friend"}]),
        AIMessage("", tool_calls=[call]),
        ToolMessage("yes", tool_call_id="a"),
    ]
    assert chain.bind_tools(TOOLS).invoke(chat).content


@pytest.mark.slow
def test_langchain_raises_openais_errors(chain):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chain.bind(temperature=-1).invoke("hello")


@pytest.mark.slow
def test_litellm_answers_streams_and_raises_its_own_errors(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import fetches a list of prices
    litellm = pytest.importorskip("litellm")
    asked: dict[str, Any] = {
        "model": "openai/any", "api_base": f"{server.url}/v1", "api_key": "any", "messages": HELLO, "max_tokens": 4,
        "seed": 1, "logit_bias": NO_END, "tools": TOOLS,
    }  # fmt: skip
    whole = litellm.completion(**asked)
    assert whole.usage.completion_tokens == 4
    assert whole.choices[0].finish_reason == "length"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))
    assert said == whole.choices[0].message.content != ""
    text = litellm.text_completion(**{k: v for k, v in asked.items() if k not in ("messages", "tools")}, prompt="hello")
    assert text.choices[0].text
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked, temperature=-1)


@pytest.mark.slow
def test_schemathesis_finds_no_answer_that_the_openapi_document_does_not_foresee(server):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import checks

    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    wanted = [
        checks.not_a_server_error, checks.CHECKS.get_one("status_code_conformance"),
        checks.CHECKS.get_one("content_type_conformance"), checks.CHECKS.get_one("response_schema_conformance"),
    ]  # fmt: skip
    tried = []
    for result in document.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=25, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def call(case: Any) -> None:
                case.call_and_validate(checks=wanted)
                tried.append(case.path)

            with suppress(Unsatisfiable):  # nothing can be wrong in a request that takes nothing
                call()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/steering", "/v1/models", "/metrics"} <= set(tried)
