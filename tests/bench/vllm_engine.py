"""What sliders cost under vLLM: tokens a second of plain vLLM, and of `steer serve --engine vllm` under sliders.

    .venv-vllm/bin/python tests/bench/vllm_engine.py [--model demo/merged] [--rounds 5] [--tokens 64] [--json]

Plain vLLM runs without the plugin, in a separate process, as the transformers engine does. The processes take turns,
in an order drawn anew each round: one writes, the others wait. A figure is the median of a round's rate over that of
plain vLLM in the same round; the bars are 0.99 for neutral sliders and 0.95 for different profiles at all sites. Beside
it stands the same share of tokens per second of CPU time, which hardly moves where other programs take the cores.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Annotated, Any

import typer

PROMPT = "Tell me about the sea, the ships that sail on it, and what the people on board eat and drink."
BARS = {"neutral": 0.99, "profiles": 0.95}
CONTEXT, PLACES = 512, 16


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    batch: Annotated[list[int] | None, typer.Option(help="Texts at once; again for another number.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if worker is not None:
        serve_turns(worker, model)
        return
    if find_spec("vllm") is None:
        print("left out: vLLM is not installed (make vllm, then .venv-vllm/bin/python tests/bench/vllm_engine.py)")
        return
    workers = {name: start(name, model) for name in ("plain", "ours", "transformers")}
    turns = [
        ("plain vLLM", "plain", "neutral"), ("neutral", "ours", "neutral"), ("one slider, one site", "ours", "one"),
        ("all sites", "ours", "all"), ("profiles", "ours", "profiles"), ("transformers", "transformers", "neutral"),
    ]  # fmt: skip
    found: dict[str, Any] = {}
    try:
        for texts in batch or [1, PLACES]:
            rates: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in turns}
            for number in range(rounds + 1):
                for name, process, what in random.sample(turns, len(turns)):
                    rate = ask(workers[process], {"what": what, "texts": texts, "tokens": tokens})
                    if number:  # the first turn of each compiles and warms up
                        rates[name].append(rate)
            plain = rates["plain vLLM"]
            for name, of in rates.items():
                share, cpu = (
                    statistics.median(a[clock] / b[clock] for a, b in zip(of, plain, strict=True)) for clock in (0, 1)
                )
                row = found[f"{name}, {texts}"] = {
                    "tokens_per_second": round(statistics.median(rate for rate, _ in of), 1),
                    "share": round(share, 3), "cpu_share": round(cpu, 3), "bar": BARS.get(name),
                }  # fmt: skip
                if not as_json:
                    bar = "" if row["bar"] is None else f"  (bar {row['bar']})"
                    print(
                        f"{name}, {texts}".ljust(28), f"{row['tokens_per_second']:8.1f} tokens/s",
                        f"{row['share']:.3f} of plain vLLM{bar}, {row['cpu_share']:.3f} by CPU time", flush=True,
                    )  # fmt: skip
    finally:
        for process in workers.values():
            process.terminate()
    if as_json:
        print(json.dumps(found, indent=2))
    if any(row["bar"] is not None and row["share"] < row["bar"] for row in found.values()):
        sys.exit(1)


def start(name: str, model: str) -> subprocess.Popen[str]:
    plugins = {"VLLM_PLUGINS": ""} if name == "plain" else {}
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", name, "--model", model], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | plugins | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"{name}: did not start; its messages are above")
    return process


def ask(process: subprocess.Popen[str], turn: dict[str, Any]) -> tuple[float, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(turn), file=process.stdin, flush=True)
    while not (line := process.stdout.readline()).startswith("rate "):
        if not line:
            raise SystemExit("a process has ended; its messages are above")
    _, rate, of_cpu = line.split()
    return float(rate), float(of_cpu)


def serve_turns(name: str, model: str) -> None:
    """Write for each line of stdin, and print the rate in tokens a second, and in tokens per second of CPU time."""
    write = _plain(model) if name == "plain" else _engine(name, model)
    print("ready", flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        written, start, cpu = turn["texts"] * turn["tokens"], time.perf_counter(), time.process_time()
        write(turn["what"], turn["texts"], turn["tokens"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print("rate", written / seconds, written / cpu, flush=True)


def _plain(model: str) -> Any:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(model, dtype="float32", max_model_len=CONTEXT, max_num_seqs=PLACES, kv_cache_memory_bytes=2**30)

    def write(what: str, texts: int, tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        llm.generate([f"{PROMPT} ({i})" for i in range(texts)], sampling, use_tqdm=False)

    return write


def _engine(name: str, model: str) -> Any:
    import queue

    import torch

    from steer.core.direction import Direction
    from steer.core.edit import Edit
    from steer.core.sampler import Sampler
    from steer.core.slider import Slider
    from steer.model.steered import describe, load
    from steer.serve.batching import BatchingEngine
    from steer.serve.engine import Job, Token

    os.environ["STEER_DTYPE"] = "float32"
    if name == "ours":
        from steer.serve.vllm.engine import VllmEngine

        live = describe(model)
        engine: BatchingEngine = VllmEngine(live, model, PLACES, context=CONTEXT)
    else:
        live = load(model)
        engine = BatchingEngine(live, PLACES, context=CONTEXT)
    live.end_token_ids = frozenset()
    stream = torch.Generator().manual_seed(0)

    def direction(site: int) -> Direction:
        vector = torch.randn(live.anatomy.width, generator=stream)
        return Direction(f"random {site}", site, vector, with_mean=0.1, residual_norm=100.0)

    sites = range(live.anatomy.blocks)
    each = [direction(site) for site in sites]
    profiles = [
        Edit(moves=tuple(Slider(d, "add" if i % 2 else "scale", 0.5 + i / 20) for d in each)) for i in range(PLACES)
    ]
    edits = {
        "neutral": [None] * PLACES,
        "one": [Edit(moves=(Slider(each[len(each) // 2], "add", 1.0),))] * PLACES,
        "all": [Edit(moves=tuple(Slider(d, "add", 1.0) for d in each))] * PLACES,
        "profiles": profiles,
    }

    def write(what: str, texts: int, tokens: int) -> None:
        sampler = Sampler(max_new_tokens=tokens, temperature=0, repetition_penalty=1.0)
        events: queue.Queue[Any] = queue.Queue()
        for i in range(texts):
            edit = edits[what][i]
            engine.submit(Job(tuple(live.encode(f"{PROMPT} ({i})")), sampler, lambda edit=edit: edit), events.put)
        ended = 0
        while ended < texts:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            ended += not isinstance(event, Token)

    return write


if __name__ == "__main__":
    typer.run(main)
