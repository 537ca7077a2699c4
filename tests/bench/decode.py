"""Tokens a second of a single text, and where a token's time goes.

    python tests/bench/decode.py [--model demo/merged] [--rounds 40] [--json]

A round makes one token each with the plain model and the compiled one, and between them the bare products: every weight
matrix of the model times one vector, with nothing else. What is printed is the median over the rounds; the bars are
shares of the bare products' speed. Where the time goes is the plain model's, from torch's profiler: products, attention
(its products and softmax), all other operations (norms, rotary embedding, sums), and the rest of a step without the
profiler, which is Python between them; then the draw of a token and its text, timed by themselves. llama.cpp is not
among what is compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch.profiler import ProfilerActivity, profile

import steer
from steer.core.sampler import CHAT
from steer.model.decode import Step, decode
from steer.model.kv_cache import growing_cache
from steer.model.sampling import Draw, choose
from steer.model.steered import SteeredModel
from steer.model.tokens import Detokeniser

BARS = {"plain": 0.85, "compiled": 0.95}
"""Of the bare products' speed."""
READY = 60.0
"""Seconds until the compiled model has made its first token."""
CONTEXT = 200
"""Tokens before the first that is timed."""


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    rounds: Annotated[int, typer.Option(help="Tokens of each; three at least for a figure to count.")] = 40,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print how fast single texts are written, beside the bars, and where a token's time goes."""
    torch.set_num_threads(threads)
    live = steer.load(model, dtype=torch.float32)
    prompt = torch.randint(live.anatomy.width, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    start = time.perf_counter()
    live.compile()
    ready = time.perf_counter() - start
    compiled = live.compiled
    texts = {"plain": writing(live, prompt), "compiled": writing(live, prompt)}

    def token(name: str) -> Callable[[], object]:
        def make() -> None:
            live.compiled = compiled if name == "compiled" else None
            next(texts[name])

        return make

    seconds = timed({"bare products": products(live), "plain": token("plain"), "compiled": token("compiled")}, rounds)
    live.compiled = None
    bare = seconds["bare products"]
    out: dict[str, Any] = {
        "tokens a second": {name: 1 / s for name, s in seconds.items()},
        "of the bare products": {name: bare / seconds[name] for name in BARS},
        "bars": BARS,
        "seconds to ready": ready,
        "bar to ready": READY,
        "milliseconds of a token": where(live, prompt),
    }
    if as_json:
        print(json.dumps(out, indent=2))
        return
    for name, s in seconds.items():
        share = f"  {bare / s:.2f} of the bare products, bar {BARS[name]}" if name in BARS else ""
        print(f"{name:14} {1 / s:6.1f} tokens/s{share}")
    print(f"compiled within {ready:.0f} s, bar {READY:.0f}")
    print(
        "where a token's time goes, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in out["milliseconds of a token"].items())
    )


def writing(live: SteeredModel, prompt: list[int]) -> Iterator[Step]:
    """A text that does not end, two tokens in."""
    banned = tuple((token, -100.0) for token in live.end_token_ids)
    steps = decode(live, [prompt], replace(CHAT, max_new_tokens=10**9, logit_bias=banned))
    next(steps)
    next(steps)
    return steps


def products(live: SteeredModel) -> Callable[[], object]:
    """Every matrix of the model times a vector."""
    weights = [m.weight for m in live.hf.modules() if isinstance(m, torch.nn.Linear)]
    vectors = {w.shape[1]: torch.randn(1, 1, w.shape[1]) for w in weights}

    @torch.inference_mode()
    def make() -> None:
        for weight in weights:
            F.linear(vectors[weight.shape[1]], weight)

    return make


def timed(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for n in range(rounds + 2):
        for name, make in work.items():
            start = time.perf_counter()
            make()
            if n > 1:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


@torch.inference_mode()
def where(live: SteeredModel, prompt: list[int], tokens: int = 5) -> dict[str, float]:
    """Milliseconds of a token of the plain model, by what they are spent on."""
    cache = growing_cache(live.hf.config)
    live.hf(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    one = torch.tensor([prompt[:1]])

    def step() -> torch.Tensor:
        return live.hf(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    logits = step()
    # The whole step is timed without the profiler, which slows Python down.
    whole = 1000 * timed({"step": step}, 4 * tokens)["step"]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(tokens):
            step()
    spent = {
        e.key: e.self_cpu_time_total / 1000 / tokens for e in profiled.key_averages() if e.key.startswith("aten::")
    }
    out = {
        "products": sum(spent.pop(name, 0.0) for name in ("aten::mm", "aten::addmm")),
        "attention": sum(spent.pop(name, 0.0) for name in ("aten::bmm", "aten::_softmax")),
        "other operations": sum(spent.values()),
    }
    out["Python"] = whole - sum(out.values())
    draw, text = Draw(CHAT, prompt, 0, live.tokenizer), Detokeniser(live.tokenizer, prompt)
    alone = timed({"draw": lambda: choose(logits, [draw]), "text": lambda: text.add(prompt[0])}, tokens)
    return out | {name: 1000 * s for name, s in alone.items()}


if __name__ == "__main__":
    typer.run(main)
