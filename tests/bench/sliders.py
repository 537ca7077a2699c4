"""What sliders cost while a model writes: decode steps under each of them, over the plain model's.

    python tests/bench/sliders.py [--model demo/merged] [--rounds 40] [--batch 1 --batch 16] [--json]

Beside them a bare forward hook, and repeng, steering-vectors and nnsight where they are installed. What pins older
versions goes beside this project, not into it: `pip install --no-deps --target DIR PACKAGE...`, DIR on PYTHONPATH.

A round gives each a turn, in an order drawn anew. A turn is two steps of the plain model, three of what is timed, one
of the plain model: the first of each kind is not counted, and a turn's figure is its two over the plain two around
them, which a busy machine slows alike. What is printed is the median over the rounds with a 95 % bootstrap interval;
"plain again" shows what of that is noise. `step` is the forward pass over one token of every text after some 200, as
the decode loop makes it; `loop` is the decode loop with the receipts that a chat keeps, all of them writing side by
side, each beside a plain one that is as far. `hooks` is the time inside of ours alone, in percent of the steps it was
taken in: what a hook's call costs is not in it, and next to no noise is.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peers import Around, Peer, bare_hook, installed
from scipy.stats import bootstrap
from torch import Tensor

import steer
from steer.core.dictionary_files import load_dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import CHAT
from steer.core.schedule import ALWAYS, Schedule
from steer.core.slider import Operation, Slider
from steer.model.decode import decode
from steer.model.kv_cache import growing_cache
from steer.model.steered import SteeredModel
from steer.model.steering.low_rank import ForwardContext
from steer.model.steering.module_edits import ModuleEdit
from steer.model.steering.receipts import Tally

ROOT = Path(__file__).parents[2]
PLAIN = ROOT / "steer/measure/texts/plain.txt"
DICTIONARY = ROOT / "dictionaries/smollm2-135m-default-merge/14"
LATENT = 3494
ONE, ALL = 2.0, 4.0
"""The bars in percent: sliders on one site, sliders on every site."""
COUNTED = 2
"""Steps of a turn that are counted; as many of the plain model's."""


@dataclass
class Contestant:
    """Something that may cost time."""

    model: SteeredModel
    around: Around
    edits: tuple[Edit | None, ...] = ()
    """What it applies, if it is ours."""
    bar: float | None = None
    """In percent."""


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    rounds: Annotated[int, typer.Option(help="Turns of each; three at least for a figure to count.")] = 40,
    batch: Annotated[list[int] | None, typer.Option(help="Texts at once; again for another number.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the longest text before the first step.")] = 200,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print how much longer a step takes under each, in percent, beside its bar."""
    torch.set_num_threads(threads)
    live = steer.load(model)
    peers, left_out = installed()
    out: dict[str, Any] = {}
    for size in batch or [1, 16]:
        field, steps = contestants(live, size, peers), Steps(live, texts(live, size, context))
        check_that_vectors_arrive(field, steps)
        # Shorter, since every one of them reads its own.
        prompts = texts(live, size, context // 4)
        out[f"batch {size}"] = {
            "step": compared(field, steps.of, rounds),
            "loop": compared(field, partial(loop, prompts=prompts), rounds),
            "hooks": {name: hooks(c, steps.of(live), rounds) for name, c in field.items() if any(c.edits)},
        }
    if as_json:
        print(json.dumps({**out, "left out": left_out}, indent=2))
        return
    for size, of in out.items():
        step, wrote = (of[kind]["plain again"]["ms"] for kind in ("step", "loop"))
        print(f"{size}: a plain step takes {step:.1f} ms, one of the decode loop {wrote:.1f} ms")
        print(f"{'longer by, in percent':36}{'step':>22}{'loop':>22}{'bar':>5}{'hooks':>8}")
        for name, row in of["step"].items():
            bar = "" if row["bar"] is None else f"{row['bar']:g}"
            inside = f"{of['hooks'][name]:.2f}" if name in of["hooks"] else ""
            print(f"{name:36}{shown(row):>22}{shown(of['loop'][name]):>22}{bar:>5}{inside:>8}")
    print(*left_out, sep="\n")


def texts(live: SteeredModel, batch: int, context: int) -> list[list[int]]:
    """Prompts of different lengths, a token less each, as the rows of a real batch have."""
    ids = live.tokenizer(PLAIN.read_text(), add_special_tokens=False).input_ids
    ids = ids * (1 + batch * context // len(ids))
    return [ids[row * context : (row + 1) * context - row] for row in range(batch)]


def contestants(live: SteeredModel, batch: int, peers: dict[str, Peer]) -> dict[str, Contestant]:
    """Everything that is timed, by name."""
    site, sites = live.anatomy.blocks // 2 - 1, range(live.anatomy.blocks)
    vector = torch.randn(live.anatomy.width, generator=torch.Generator().manual_seed(0))
    # So small a gap that the model still writes under it at every site.
    r = Direction("random", site, vector, with_mean=2.0, residual_norm=150.0)
    here, everywhere = [r], [r.at(s) for s in sites]

    def edit(operation: Operation, amount: float, of: Iterable[Direction], when: Schedule = ALWAYS) -> Edit | None:
        return Edit.of([Slider(d, operation, amount, when, f"{operation} at {d.site}") for d in of])

    ours = {
        "neutral profile": (edit("add", 0.0, everywhere), None),
        "add, one site": (edit("add", 0.5, here), ONE),
        "add, all sites": (edit("add", 0.5, everywhere), ALL),
        "clamp, one site": (edit("clamp", 0.5, here), ONE),
        "clamp, all sites": (edit("clamp", 0.5, everywhere), ALL),
        "add on the reply, one site": (edit("add", 0.5, here, Schedule("reply")), ONE),
        "add on the reply, all sites": (edit("add", 0.5, everywhere, Schedule("reply")), ALL),
        "ablate, every writer": (edit("ablate", 1.0, here), ALL),
    }
    if (dictionary := load_dictionary(DICTIONARY)).width == live.anatomy.width:
        ours["clamp of a feature, one site"] = (
            Edit.of([Slider(Feature.latent(dictionary, LATENT), "clamp", 0.5)]),
            ONE,
        )
    out = {"plain again": Contestant(live, lambda run: run())}
    out |= {name: applying(live, (e,), bar) for name, (e, bar) in ours.items()}
    if batch > 1:
        for operation in ("add", "clamp"):
            each = tuple(edit(operation, (row + 1) / batch, everywhere) for row in range(batch))
            out[f"{operation}, all sites, its own a row"] = applying(live, each, ALL)
    added = vector.to(live.device, live.hf.dtype)
    shared = {id(tensor): tensor for tensor in (*live.hf.parameters(), *live.hf.buffers())}
    for name, peer in {"bare hook": bare_hook, **peers}.items():
        # The same weights under separate modules, so that what a peer leaves on them slows no other.
        own = SteeredModel(copy.deepcopy(live.hf, dict(shared)), live.tokenizer, name)
        for label, where in (("one site", [site]), ("all sites", sites)):
            out[f"{name}, {label}"] = Contestant(own, peer(own.hf, where, added))
    return out


def applying(live: SteeredModel, edits: tuple[Edit | None, ...], bar: float | None) -> Contestant:
    """One of ours."""

    def around(run: Callable[[], object]) -> None:
        with live.steering.applied(edits):
            run()

    return Contestant(live, around, edits, bar)


# How it is timed


class Steps:
    """The same step again and again: a token of every text, over a cache that is cut back after it."""

    def __init__(self, live: SteeredModel, prompts: Sequence[Sequence[int]]) -> None:
        width = max(len(p) for p in prompts)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=live.device)
        ids = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts], device=live.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.fed, self.cache = ids[:, -1:], growing_cache(live.hf.config)
        with torch.inference_mode():
            live.hf(
                input_ids=ids[:, :-1], attention_mask=self.mask[:, :-1], position_ids=self.positions[:, :-1],
                past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip

    def of(self, model: SteeredModel) -> Callable[[], float]:
        """The step as this model makes it; returns its seconds."""
        return lambda: self._step(model)[0]

    def logits(self, contestant: Contestant) -> Tensor:
        """What comes out of it."""
        found: list[Tensor] = []
        contestant.around(lambda: found.append(self._step(contestant.model)[1]))
        return found[0]

    def _step(self, model: SteeredModel) -> tuple[float, Tensor]:
        seen = self.cache.get_seq_length()
        start = time.perf_counter()
        with model.steering.lock, torch.inference_mode():
            index = torch.ones_like(self.fed) if model.steering.timed else None
            with model.steering.passing(ForwardContext(index=index)):
                logits = model.hf(
                    input_ids=self.fed, attention_mask=None if bool(self.mask.all()) else self.mask,
                    position_ids=self.positions[:, -1:], past_key_values=self.cache, use_cache=True, logits_to_keep=1,
                ).logits[:, -1]  # fmt: skip
            _wait()
        seconds = time.perf_counter() - start
        self.cache.crop(seen - self.cache.get_seq_length())
        return seconds, logits


def loop(model: SteeredModel, prompts: Sequence[Sequence[int]]) -> Callable[[], float]:
    """The decode loop's next token of every text, in seconds. No text ends."""
    banned = tuple((token, -100.0) for token in model.end_token_ids)
    writing = decode(model, prompts, replace(CHAT, max_new_tokens=10**9, logit_bias=banned), tally=Tally())

    def step() -> float:
        start = time.perf_counter()
        next(writing)
        _wait()
        return time.perf_counter() - start

    return step


def compared(
    field: dict[str, Contestant], stepping: Callable[[SteeredModel], Callable[[], float]], rounds: int
) -> dict[str, dict[str, float | None]]:
    """How much longer a step takes than the plain one, in percent, with the ends of its interval."""
    plain = field["plain again"].model
    steps = {name: (stepping(plain), stepping(c.model)) for name, c in field.items()}
    longer: dict[str, list[float]] = {name: [] for name in field}
    milliseconds: dict[str, list[float]] = {name: [] for name in field}
    order = list(field)
    for n in range(rounds + 1):
        random.Random(n).shuffle(order)
        for name in order:
            bare, under = steps[name]
            turn: list[float] = []
            bare()
            around = bare()
            field[name].around(lambda under=under, turn=turn: turn.extend(under() for _ in range(1 + COUNTED)))
            around += bare()
            if n:  # the first round warms up
                longer[name].append(100 * (sum(turn[1:]) / around - 1))
                milliseconds[name].append(1000 * sum(turn[1:]) / COUNTED)
    out: dict[str, dict[str, float | None]] = {}
    for name, contestant in field.items():
        sample = (np.array(longer[name]),)
        ends = (
            bootstrap(sample, np.median, method="percentile", rng=0).confidence_interval if rounds > 2 else (None, None)
        )
        out[name] = {
            "percent": float(np.median(longer[name])), "low": ends[0], "high": ends[1], "bar": contestant.bar,
            "ms": statistics.median(milliseconds[name]),
        }  # fmt: skip
    return out


def hooks(contestant: Contestant, step: Callable[[], float], steps: int) -> float:
    """The share of a step that passes inside of our hooks, in percent: a median over steps."""
    apply, inside, shares = ModuleEdit.apply, 0.0, []

    def timed(program: ModuleEdit, h: Tensor, text: ForwardContext) -> Tensor:
        nonlocal inside
        start = time.perf_counter()
        out = apply(program, h, text)
        inside += time.perf_counter() - start
        return out

    def run() -> None:
        nonlocal inside
        for _ in range(1 + steps):
            inside = 0.0
            seconds = step()
            shares.append(100 * inside / seconds)

    ModuleEdit.apply = timed  # type: ignore[method-assign]
    try:
        contestant.around(run)
    finally:
        ModuleEdit.apply = apply  # type: ignore[method-assign]
    return statistics.median(shares[1:])


def check_that_vectors_arrive(field: dict[str, Contestant], steps: Steps) -> None:
    """Nobody is timed doing nothing: a peer's logits are the bare hook's."""
    for name, contestant in field.items():
        if contestant.model is not field["plain again"].model:
            wanted = steps.logits(field[f"bare hook, {name.split(', ')[1]}"])
            torch.testing.assert_close(steps.logits(contestant), wanted, rtol=0.02, atol=0.05, msg=f"{name}: no effect")


def shown(row: dict[str, float]) -> str:
    """A figure with its interval."""
    return f"{row['percent']:+.2f}" + (f" ({row['low']:+.2f} {row['high']:+.2f})" if row["low"] is not None else "")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
