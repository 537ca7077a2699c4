"""Models behind servers: ours scores as the same model in this process does; liars and silent ones are one line."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from serving import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny_eval import Weighing, save_by_letters

from steer.errors import SteerError, UnreachableError, UsageError
from steer.measure.endpoint import EndpointArm, EndpointReader, tokenizer_of
from steer.measure.evaluation import evaluate_arms
from steer.measure.probes.probe import Passage, Size
from steer.measure.readers import LocalReader
from steer.model.steered import load
from steer.serve.server import listen

CHAT = (("system", "Tom is in the inn."), ("user", "Where is Tom?"))
PASSAGES = [Passage(" in the inn", " He is", CHAT), Passage(" He is gone", "", CHAT), Passage(" And then.", "The hen")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    return save_by_letters(tiny_llama, tmp_path_factory.mktemp("tiny") / "chat")


@contextmanager
def running(answer: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    """A server that lists one model and answers completions as it likes."""

    async def completions(request: Request) -> Any:
        return answer(await request.json())

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]})

    app = Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])])
    with listen("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def answer_of(tokenizer: Any, logprob: Callable[[int], float], **more: Any) -> Callable[[dict[str, Any]], JSONResponse]:
    """Answers an echo with these log-probabilities by place."""

    def answer(body: dict[str, Any]) -> JSONResponse:
        tokens = [tokenizer.decode([i]) for i in body["prompt"]]
        echoed = {"tokens": tokens, "token_logprobs": [None, *map(logprob, range(1, len(tokens)))],
                  "top_logprobs": None,
                  "text_offset": [0] * len(tokens)} | more  # fmt: skip
        choice = {
            "index": 0,
            "text": "".join(tokens),
            "finish_reason": "length",
            "logprobs": echoed if body.get("echo") else None,
        }
        return JSONResponse({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})

    return answer


def test_our_server_scores_as_the_model_in_this_process(place: Path, tmp_path: Path) -> None:
    model, (tokenizer, _) = load(place, dtype="float32"), tokenizer_of(str(place))
    local = LocalReader(model)
    with served(model) as server:
        reader = EndpointReader(server.url, tokenizer=tokenizer)
        assert reader.abilities == {"replies", "logprobs"}
        for passage, ours, theirs in zip(PASSAGES, local.logprobs(PASSAGES), reader.logprobs(PASSAGES), strict=True):
            assert reader.length(passage) == local.length(passage)
            assert theirs == pytest.approx(ours, abs=1e-4)
        assert reader.replies([CHAT] * 2, tokens=8, seeds=[1, 1])[0]
        blind = EndpointReader(server.url)
        assert blind.abilities == {"replies"}
        assert "name the checkpoint" in blind.notes[0]
        with pytest.raises(SteerError, match="expected a model nobody"):
            EndpointReader(server.url, "nobody")
        result = evaluate_arms([EndpointArm(server.url, place=str(place))], [Weighing()], Size(), tmp_path / "out")
    assert result["probes"][0]["summary"][0]["items"] == 30


@pytest.mark.parametrize(
    ("logprob", "more", "says"),
    [
        (lambda i: 0.5, {}, "0 at most, found 0.5"),
        (lambda i: -2.0, {}, "every token has the log-probability -2"),
        (lambda i: -random.uniform(0, 7), {}, "scored twice differs"),
        (lambda i: -float(i), {"tokens": ["no"] * 500}, "tokens of the text that was sent"),
        (lambda i: -float(i), {"token_logprobs": [None, -1.0]}, "found 2"),
        (lambda i: -float(i), {"token_logprobs": None, "tokens": None}, "found none"),
    ],
)
def test_a_server_that_lies_can_not_be_asked_for_scores_and_the_run_says_so(
    logprob: Callable[[int], float], more: dict[str, Any], says: str, place: Path, tmp_path: Path
) -> None:
    tokenizer, _ = tokenizer_of(str(place))
    with running(answer_of(tokenizer, logprob, **more)) as url:
        result = evaluate_arms([EndpointArm(url, place=str(place))], [Weighing()], Size(), tmp_path / "out")
    part = result["probes"][0]["arms"][url.partition("://")[2]]
    assert "gives logprobs" in part["skipped"]
    assert says in part["notes"][0]


def test_vllms_own_field_is_read_where_the_echo_is_not_honoured(place: Path) -> None:
    tokenizer, _ = tokenizer_of(str(place))

    def answer(body: dict[str, Any]) -> JSONResponse:
        rows = [None, *({str(t): {"logprob": -float(t)}, "9999": {"logprob": -0.1}} for t in body["prompt"][1:])]
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = rows
        return JSONResponse({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})

    with running(answer) as url:
        reader = EndpointReader(url, tokenizer=tokenizer)
        assert "logprobs" in reader.abilities
        tokens = reader.tokens(PASSAGES[0])
        assert (-reader.logprobs(PASSAGES[:1])[0]).tolist() == list(tokens.ids[tokens.start :])


def test_a_server_that_stops_answering_is_one_line_and_what_is_done_is_kept(place: Path, tmp_path: Path) -> None:
    tokenizer, _ = tokenizer_of(str(place))
    honest = answer_of(tokenizer, lambda i: -1.0 - i % 3)
    asked = {"count": 0, "until": 40}

    def answer(body: dict[str, Any]) -> JSONResponse:
        asked["count"] += 1
        if asked["count"] > asked["until"]:
            time.sleep(1.0)
        return honest(body)

    with running(answer) as url:
        arm, probes = EndpointArm(url, place=str(place), timeout=0.2), [Weighing("one"), Weighing("two")]
        with pytest.raises(UnreachableError, match="no server answers") as stopped:
            evaluate_arms([arm], probes, Size(), tmp_path / "out")
        assert "\n" not in str(stopped.value)
        assert len(list((tmp_path / "out" / "parts").iterdir())) == 1
        asked["until"] = 10**6
        result = evaluate_arms([arm], probes, Size(), tmp_path / "out")
    assert [p["summary"][0]["items"] for p in result["probes"]] == [30, 30]
    with pytest.raises(UnreachableError, match="no server answers"):
        EndpointReader(url)


def test_a_server_that_is_mended_is_asked_again(place: Path, tmp_path: Path) -> None:
    tokenizer, _ = tokenizer_of(str(place))
    lies, answers = answer_of(tokenizer, lambda i: 0.5), answer_of(tokenizer, lambda i: -1.0 - i % 3)
    honest = threading.Event()
    with running(lambda body: answers(body) if honest.is_set() else lies(body)) as url:
        arm = EndpointArm(url, place=str(place))
        refused = evaluate_arms([arm], [Weighing()], Size(), tmp_path / "out")
        assert refused["probes"][0]["arms"][arm.name]["skipped"]
        honest.set()
        mended = evaluate_arms([EndpointArm(url, place=str(place))], [Weighing()], Size(), tmp_path / "out")
    assert mended["probes"][0]["arms"][arm.name]["skipped"] is None
    assert mended["probes"][0]["summary"][0]["items"] == 30


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_limit_that_is_none_is_refused_before_anything_is_asked(timeout: float) -> None:
    with pytest.raises(UsageError, match="expected seconds above 0"):
        EndpointReader("http://127.0.0.1:9", timeout=timeout)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "file:///etc/hosts"])
def test_an_address_without_http_is_refused(url: str) -> None:
    with pytest.raises(SteerError, match=re.escape(url)):
        EndpointReader(url)
