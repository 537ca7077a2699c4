"""Tokens a second of every engine that is installed: the same prompts in one run, plain, neutral and slid.

    python tests/bench/engines.py [--model demo/merged] [--rounds 3] [--tokens 24] [--json]

transformers and llama.cpp run in any environment of `make`, vLLM beside them in .venv-vllm. Every process waits while
another writes, and the order is drawn anew each round. A rate counts the reading of the prompt too, which vLLM has in
its cache after the first round, and no HTTP of ours. A share is of the same engine without our part in
it, of transformers without sliders. The bars stand where one engine is looked at closely: vllm_engine.py, llama_cpp.py
and sliders.py.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import httpx
import llama_cpp
import typer
import vllm_engine

sys.path.insert(0, str(Path(__file__).parents[1]))

Write = Callable[[int], Any]
"""Writes the replies to so many prompts."""
VLLM = {"neutral": "neutral", "one slider": "one", "every site": "all"}
"""What a row is called -> what it is called in vllm_engine.py."""


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    batch: Annotated[list[int] | None, typer.Option(help="Texts at once; again for another number.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 24,
    threads: Annotated[int, typer.Option(help="Threads of llama-server.")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        turns = _of_vllm_and_transformers(stack, model, tokens) | _of_llama_cpp(stack, model, tokens, threads)
        for texts in batch or [1, vllm_engine.PLACES]:
            rates: dict[str, list[float]] = {name: [] for name in turns}
            for number in range(rounds + 1):
                for name in random.sample(list(turns), len(turns)):
                    start = time.perf_counter()
                    turns[name](texts)
                    if number:  # the first turn of each compiles and warms up
                        rates[name].append(texts * tokens / (time.perf_counter() - start))
            for name, row in rates.items():
                engine = name.partition(", ")[0]
                without = rates.get(f"{engine}, plain", rates[f"{engine}, neutral"])
                share = statistics.median(a / b for a, b in zip(row, without, strict=True))
                rate = statistics.median(row)
                found[f"{name}, {texts}"] = {"tokens_per_second": round(rate, 1), "of_engine_alone": round(share, 3)}
                if not as_json:
                    print(
                        f"{name}, {texts}".ljust(32),
                        f"{rate:8.1f} tokens/s",
                        f"{share:6.3f} of the engine alone",
                        flush=True,
                    )
    if as_json:
        print(json.dumps(found, indent=2))


def _of_vllm_and_transformers(stack: ExitStack, model: str, tokens: int) -> dict[str, Write]:
    def turn(process: Any, what: str) -> Write:
        return lambda texts: vllm_engine.ask(process, {"what": what, "texts": texts, "tokens": tokens})

    def start(name: str) -> Any:
        process = vllm_engine.start(name, model)
        stack.callback(process.terminate)
        return process

    transformers = start("transformers")
    turns = {f"transformers, {name}": turn(transformers, what) for name, what in VLLM.items()}
    if find_spec("vllm") is None:
        print("left out: vLLM is not installed (make vllm, then .venv-vllm/bin/python tests/bench/engines.py)")
        return turns
    ours = start("ours")
    turns |= {"vLLM, plain": turn(start("plain"), "neutral")}
    return turns | {f"vLLM, {name}": turn(ours, what) for name, what in VLLM.items()}


def _of_llama_cpp(stack: ExitStack, model: str, tokens: int, threads: int) -> dict[str, Write]:
    if find_spec("xllamacpp") is None:
        print("left out: llama.cpp is not installed (pip install xllamacpp)")
        return {}
    from batched import ask

    from steer.checkpoint.fetch import resolve
    from steer.core.sampler import Sampler
    from steer.serve.engine import Job
    from steer.serve.llama_cpp.engine import LlamaCppEngine

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    described, url = stack.enter_context(llama_cpp.started(model, Path(folder), threads, vllm_engine.PLACES))
    engine = LlamaCppEngine(described, url=url, place=Path(resolve(model)))
    stack.callback(engine.close)
    pool = stack.enter_context(ThreadPoolExecutor(vllm_engine.PLACES))
    http = stack.enter_context(httpx.Client(base_url=url, timeout=600))
    turns = count()

    def prompts(texts: int) -> list[list[int]]:
        """Under other scales llama-server reads a prompt again; under the same ones too if it begins otherwise."""
        turn = next(turns)
        return [engine.model.encode(f"{turn} {vllm_engine.PROMPT} ({i})") for i in range(texts)]

    body = {"n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    body |= llama_cpp.lora({0: 0.0, 1: 0.0})
    ends = tuple((token, -100.0) for token in engine.model.end_token_ids)
    sampler = Sampler(max_new_tokens=tokens, temperature=0, repetition_penalty=1.0, logit_bias=ends)
    two = engine.model.sliders.edit(dict.fromkeys(llama_cpp.SLIDERS, 0.5))

    def one(prompt: list[int]) -> None:
        http.post("/completion", json=body | {"prompt": prompt}).raise_for_status()

    def slid(edit: Any) -> Write:
        def write(texts: int) -> None:
            for listener in [ask(engine, Job(tuple(p), sampler, lambda: edit)) for p in prompts(texts)]:  # type: ignore[arg-type]
                listener.wait()

        return write

    return {
        "llama.cpp, plain": lambda texts: list(pool.map(one, prompts(texts))),
        "llama.cpp, neutral": slid(None),
        "llama.cpp, two sliders": slid(two),
    }


if __name__ == "__main__":
    typer.run(main)
