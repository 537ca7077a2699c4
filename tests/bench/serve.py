"""Sixteen clients at once, each with different sliders: is every reply whole, and steered by its request alone?

    python tests/bench/serve.py [--model demo/merged] [--seconds 120] [--clients 16] [--float32] [--json]
    .venv-vllm/bin/python tests/bench/serve.py --engine vllm --no-worst

`steer serve` runs as a separate process; who asks it is in load/clients.py, hang-ups and rubbish among them. Then
every reply is read again in this process, alone and under the sliders of whoever asked: how far are the logprobs that
the server gave from those? Some are read under every other client's sliders too. Where these would have moved the
logprobs by ENOUGH, the reply's own should be nearer to what the server gave, and the reply likelier under them; the
controls ask the same of the next client's. Some requests are sent again when nobody else asks: at bf16 a text in
company is rounded otherwise than alone, so that some tokens are drawn otherwise. `--float32` serves a copy in fp32,
where that is over. Before all that, how much longer one client waits for its first token beside another's worst request
(load/worst.py); `--worst` measures nothing else, `--no-worst` all the rest. Ends with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from load.alone import Reader, ToldApart
from load.clients import SETTINGS, Reply
from load.server import Load, Served, served, under_load
from load.worst import waits

import steer
from steer.core.sampler import CHAT
from steer.model.decode import decode
from steer.serve.limits import Limits

LOOP = 50
"""Tokens a text of the decode loop that the server is compared with: what a reply has here."""
OFF, OFF_FLOAT32 = (0.5, 1.5), (1e-3, 1e-2)
"""Bars in nats for the logprobs: of 99.9 % of them, and of the farthest."""
GROWTH = 50e6
"""Bytes by which the server may grow. Not a share of its memory: most of that are the pages it has from the start."""
LIKELIER = 0.95
"""A reply of some tokens may by chance be likelier under others' sliders."""
DELAY = 2.0
"""Seconds by which one client's worst request may delay another's first token."""
Figure = tuple[float, str, bool | None]
"""A value, its bar in words, whether it keeps it."""


def main(
    model: Annotated[str, typer.Option(help="The default merge: the sliders are its own.")] = "demo/merged",
    seconds: Annotated[int, typer.Option(min=5, help="How long they ask.")] = 120,
    clients: Annotated[int, typer.Option(min=2, max=len(SETTINGS), help="How many ask at once.")] = len(SETTINGS),
    again: Annotated[int, typer.Option(min=1, help="Requests of each client that are sent again.")] = 2,
    others: Annotated[int, typer.Option(min=1, help="Replies of each that are read under others' sliders.")] = 3,
    float32: Annotated[bool, typer.Option("--float32", help="Serve a copy in fp32.")] = False,
    worst: Annotated[bool | None, typer.Option(help="Only the worst requests, or all but them.")] = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print what was served, how fast, and each check beside its bar."""
    with tempfile.TemporaryDirectory() as temporary:
        live = steer.load(model, dtype=torch.float32 if float32 else None)
        if float32:
            model = str(Path(temporary) / "float32")
            live.hf.save_pretrained(model)
            live.tokenizer.save_pretrained(model)
        figures, problems = {}, []
        if worst is not False:
            say("one client beside another's worst requests")
            with served(model, Path(temporary) / "worst", Limits().body, engine) as server:
                figures = delays(server, live.context)
        if not worst:
            with served(model, Path(temporary), engine=engine) as server:
                say(f"{clients} clients ask for {seconds} s")
                load = under_load(server, live, seconds, clients)
                say(f"{len(load.replies)} replies; some of them again")
                once = first_of_each(load.replies, clients, again)
                twice = [server.again(reply.ask) for reply in once]
            say("the decode loop; every reply under its own sliders, and some under everybody's")
            reader, problems = Reader(live), load.problems
            figures |= health(reader, load) | speed(reader, load, clients)
            figures |= rounding(reader, load, once, twice, float32)
            figures |= whose(reader, first_of_each(load.replies, clients, others), clients)
    if as_json:
        rows = {name.strip(): {"value": v, "bar": bar, "kept": kept} for name, (v, bar, kept) in figures.items()}
        print(json.dumps({"seconds": seconds, "clients": clients, **rows, "problems": problems}, indent=2))
    else:
        for name, (value, bar, kept) in figures.items():
            print(f"{name:60}{value:>10,.4g}   {bar}{'   MISSED' if kept is False else ''}".rstrip())
        print(*problems[:20], sep="\n")
    raise typer.Exit(any(kept is False for _, _, kept in figures.values()))


def say(text: str) -> None:
    """What goes on: it takes minutes."""
    print(text, file=sys.stderr, flush=True)


def first_of_each(replies: Sequence[Reply], clients: int, number: int) -> list[Reply]:
    """The first replies of every client."""
    return [r for c in range(clients) for r in [x for x in replies if x.ask.client == c][:number]]


def delays(server: Served, context: int) -> dict[str, Figure]:
    """How much longer a short chat waits for its first token beside each worst request than alone."""
    alone, beside = waits(server.url, server.name(), context)
    rows: dict[str, Figure] = {"seconds to the first token with nobody else": (alone, "", None)}
    for label, waited in beside.items():
        rows[f"  more beside {label}"] = (waited - alone, f"bar {DELAY:g}", waited - alone < DELAY)
    return rows


def health(reader: Reader, load: Load) -> dict[str, Figure]:
    """Whether all was answered as it should be, and nothing stays behind."""
    whole = statistics.fmean(reader.is_whole(r) for r in load.replies)
    (before, after), (left, noticed) = load.memory, load.hung_up
    grown = after - before
    return {
        "replies": (len(load.replies), "", None),
        "share of them that are whole": (whole, "bar 1", whole == 1),
        "requests that are none": (load.rubbish, "", None),
        "clients that hung up": (left, "", None),
        "of them unnoticed": (left - noticed, "bar 0", left == noticed),
        "what went otherwise than it should": (len(load.problems), "bar 0", not load.problems),
        "answers from status 500": (load.failed, "bar 0", load.failed == 0),
        "texts that run or wait when all is over": (load.left, "bar 0", load.left == 0),
        "the server's memory once all had a reply, MB": (before / 1e6, "", None),
        "grown by the end, MB": (grown / 1e6, f"bar {GROWTH / 1e6:g}", grown < GROWTH),
    }


def speed(reader: Reader, load: Load, clients: int) -> dict[str, Figure]:
    """Tokens a second, and how long clients wait for the first."""
    loop, cpu = decode_loop(reader, first_of_each(load.replies, clients, 1))
    streamed = [r for r in load.replies if r.first is not None]
    waited = [r.first for r in streamed if r.asked >= load.begun]
    return {
        "tokens/s of all together": (load.rate, "", None),
        f"tokens/s of the decode loop, {clients} texts at once": (loop, "", None),
        "  share of the decode loop": (load.rate / loop, "", None),
        "CPU ms a token": (1000 * load.cpu, "", None),
        "  over those of the decode loop": (load.cpu / cpu, "", None),
        "seconds to the first token, median": (float(np.quantile(waited or np.nan, 0.5)), "", None),
        "  95 %": (float(np.quantile(waited or np.nan, 0.95)), "", None),
        "  the longest, as the first requests look up their sliders": (max(r.first for r in streamed), "", None),
    }


def decode_loop(reader: Reader, replies: Sequence[Reply]) -> tuple[float, float]:
    """This process's own: tokens a second, CPU seconds a token. All texts begin together, their prompts are read, each
    goes by its client's sliders, none ends early."""
    live = reader.live
    prompts, edits = [live.prompt_ids(r.ask.chat) for r in replies], [reader.edits[r.ask.client] for r in replies]
    sampler = replace(CHAT, max_new_tokens=LOOP, logit_bias=tuple((end, -100.0) for end in live.end_token_ids))
    rounds = []
    for _ in range(3):
        begun, worked = time.perf_counter(), time.process_time()
        with live.steering.applied(edits):
            made = sum(len(step.tokens) for step in decode(live, prompts, sampler))
        rounds.append((made / (time.perf_counter() - begun), (time.process_time() - worked) / made))
    rates, cpu = zip(*rounds, strict=True)
    return statistics.median(rates), statistics.median(cpu)


def rounding(
    reader: Reader, load: Load, once: Sequence[Reply], twice: Sequence[Reply], float32: bool
) -> dict[str, Figure]:
    """What the server gave for every token beside what the model says alone; and requests that were sent again."""
    given, alone = reader.off(load.replies), reader.off(twice)
    most, (bar, bar_most) = float(np.quantile(given, 0.999)), OFF_FLOAT32 if float32 else OFF
    same = statistics.fmean(a.tokens == b.tokens for a, b in zip(once, twice, strict=True))
    return {
        "logprobs given": (len(given), "", None),
        "off from its own sliders, alone: median, nats": (float(np.median(given)), "", None),
        "  99.9 % of them by at most": (most, f"bar {bar:g}", most < bar),
        "  the farthest": (float(given.max()), f"bar {bar_most:g}", float(given.max()) < bar_most),
        "  asked again, with no company: median": (float(np.median(alone)), "", None),
        "  asked again, with no company: 99.9 %": (float(np.quantile(alone, 0.999)), "", None),
        "share of the same tokens when asked again": (same, "bar 1" if float32 else "", same == 1 if float32 else None),
    }


def whose(reader: Reader, replies: Sequence[Reply], clients: int) -> dict[str, Figure]:
    """Whose sliders a reply went by."""
    read = [np.stack([reader.logprobs(r, c) for c in range(clients)]) for r in replies]
    own, control = ToldApart.of(replies, read), ToldApart.of(replies, read, shift=1)
    return {
        "pairs of a reply and others' sliders": (len(replies) * (clients - 1), "", None),
        "share of them that differ enough": (own.differ, "", None),
        "  own sliders nearer to what was given": (own.nearer, "bar 1", own.nearer == 1),
        "    control: the next client's nearer": (control.nearer, "", None),
        "  likelier under own sliders": (own.likelier, f"bar {LIKELIER:g}", own.likelier >= LIKELIER),
        "    control: likelier under the next client's": (control.likelier, "", None),
    }


if __name__ == "__main__":
    typer.run(main)
