"""What `steer serve --engine llama.cpp` costs over llama-server: tokens a second of one stream, with two sliders.

    python tests/bench/llama_cpp.py [--model demo/merged] [--rounds 9] [--tokens 64] [--json]

llama-server (the wheel xllamacpp) is another process, with an F32 GGUF of the model and two ablations as LoRAs; so
is `steer serve` in front of it. Each round asks llama-server for a reply without LoRAs and for one with both, and ours
for the latter, in a random order. A rate counts the tokens after the first. A figure is the median of a round's rate
over llama-server's own; the bar is 0.97. What LoRAs cost llama-server itself is shown beside.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from steer.model.steered import SteeredModel, describe
from steer.serve.llama_cpp.fields import lora

sys.path.insert(0, str(Path(__file__).parents[1]))

BAR = 0.97
SLIDERS = ("a:ablate", "b:ablate")
PROMPT = "Tell me about the sea, the ships that sail on it, and what the people on board eat and drink."


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 9,
    tokens: Annotated[int, typer.Option(help="Tokens of each reply.")] = 64,
    minutes: Annotated[float, typer.Option(help="No further round after these, of which three are written.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of llama-server.")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    slots: Annotated[int, typer.Option(hidden=True)] = 1,
) -> None:
    if worker is not None:
        from llama_server import llama_server

        with llama_server(worker, slots, threads) as running:
            print(running.url, flush=True)
            sys.stdin.read()
        return
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(model, Path(folder), rounds, tokens, threads, minutes)
    plain, own = rates["llama-server"], rates["llama-server, two LoRAs"]
    found = {
        name: {
            "tokens_per_second": round(statistics.median(row), 1),
            "of_plain": round(statistics.median(a / b for a, b in zip(row, plain, strict=True)), 3),
            "of_own": round(statistics.median(a / b for a, b in zip(row, own, strict=True)), 3),
        }
        for name, row in rates.items()
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, row in found.items():
            print(
                f"{name:28} {row['tokens_per_second']:7.1f} tokens/s  {row['of_plain']:.3f} of llama-server, "
                f"{row['of_own']:.3f} of it with the same LoRAs (bar {BAR})"
            )
    if found["ours, two sliders"]["of_own"] < BAR:
        sys.exit(1)


def measure(model: str, folder: Path, rounds: int, tokens: int, threads: int, minutes: float) -> dict[str, list[float]]:
    """Return name -> tokens a second in each round."""
    end = time.monotonic() + 60 * minutes
    with started(model, folder, threads) as (described, url), served(model, url) as our_url:
        ids = described.prompt_ids([{"role": "user", "content": PROMPT}])
        theirs: dict[str, Any] = {"prompt": ids, "n_predict": tokens, "temperature": 0, "stream": True}
        theirs |= {"ignore_eos": True}
        ours: dict[str, Any] = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "repetition_penalty": 1.0}
        ours |= {"stream": True, "steering": {"sliders": dict.fromkeys(SLIDERS, 0.5)}}
        ours |= {"logit_bias": {str(token): -100 for token in described.end_token_ids}}
        turns = {
            "llama-server": (f"{url}/completion", theirs | lora({0: 0.0, 1: 0.0})),
            "llama-server, two LoRAs": (f"{url}/completion", theirs | lora({0: 0.5, 1: 0.5})),
            "ours, two sliders": (f"{our_url}/completions", ours),
        }
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(rounds + 1):
            if number > 3 and time.monotonic() > end:
                print(f"stopped after {number - 1} of {rounds} rounds: {minutes:g} minutes are over", file=sys.stderr)
                break
            for name in random.sample(list(turns), len(turns)):
                found = rate(*turns[name], tokens)
                if number:  # the first turn warms up
                    rates[name].append(found)
        return rates


@contextmanager
def served(model: str, url: str) -> Iterator[str]:
    """Yield the address of `steer serve` in front of a llama-server, in another process."""
    steer = str(Path(sys.executable).with_name("steer"))
    command = [steer, "serve", model, "--engine", "llama.cpp", "--url", url, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(line for line in process.stderr if line.startswith("http")).split()[0]
        finally:
            process.terminate()


@contextmanager
def started(model: str, folder: Path, threads: int, slots: int = 1) -> Iterator[tuple[SteeredModel, str]]:
    """Yield the model, described, and the address of a llama-server in another process. It has the model in F32,
    and two LoRAs that ablate random directions."""
    import torch

    from steer.baking.bake import bake
    from steer.baking.certificate import server_command
    from steer.checkpoint.fetch import resolve
    from steer.checkpoint.gguf_file import write_gguf
    from steer.core.direction import Direction
    from steer.core.edit import Edit

    place, described = Path(resolve(model)), describe(model)
    q, _ = torch.linalg.qr(torch.randn(described.anatomy.width, 2, generator=torch.Generator().manual_seed(0)))
    pair = [Direction(n, 1, v.contiguous(), with_mean=1.0, residual_norm=1.0) for n, v in zip("ab", q.T, strict=True)]
    write_gguf(place, folder / "model.gguf", "F32")
    command = server_command(bake(place, folder / "baked", Edit(pair), "gguf"), str(folder / "baked"))
    process = subprocess.Popen(
        [sys.executable, __file__, "--threads", str(threads), "--slots", str(slots),
         "--worker", command.replace("MODEL.gguf", str(folder / "model.gguf"))],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield described, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def rate(url: str, body: dict[str, Any], tokens: int) -> float:
    """Return the tokens a second of a stream after its first event with text."""
    times: list[float] = []
    with httpx.stream("POST", url, json=body, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    # One event is one token in both, but for the few within a character and the one at the end.
    return (tokens - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    typer.run(main)
