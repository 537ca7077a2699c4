"""Drift, the probe of long chats: how a model's figures change with the number of turns.

It measures, at several turns, how well the model predicts the replies, how much it repeats, and what every other probe
finds. The chats are written beforehand. Their exchanges make sense in any order and each chat has another order, so
that a change from turn to turn comes from the length of the chat and not from the text. For the same reason the other
probes ask the same items at every turn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from steer.measure.harness import repetition
from steer.measure.probes.choice import ForcedChoice
from steer.measure.probes.probe import (
    QUICK_TOKENS,
    Chat,
    Example,
    Figure,
    LogProbs,
    Metric,
    Passage,
    Probe,
    Reader,
    Result,
    Size,
)
from steer.measure.probes.stories import exchanged, written
from steer.measure.probes.words import runs, share, words
from steer.progress import Advance

TURNS = 40
AT = (0, 12, 24, 38)
"""The turns at which the model writes."""
LATER = (0, 20, 38)
"""The turns at which the other probes are asked."""
PHRASE = 4
"""Words of a phrase."""
TOKENS = 48
SYSTEM = ("system", "You are a friendly neighbour who likes to talk.")


class Drift(Probe):
    """A chat of `TURNS` messages, or as many as fit."""

    name = "drift"
    says = (
        "Whether the model falls apart as the chat grows: its surprise at fitting replies, what it repeats, and the "
        "other probes, asked late in the chat."
    )
    by_turn = (
        Metric("surprise", "lower", "perplexity per token of a reply, by turn", exponent=True),
        Metric("repetition", "lower", "share of three-word phrases seen before in the same reply"),
        Metric("copied", "lower", "share of four-word phrases copied from earlier in the chat"),
    )
    needs = frozenset({"logprobs", "replies"})

    def __init__(self, of: Sequence[Probe] = ()) -> None:
        """`of`: the probes that are asked by turn too, by their headlines, and not in a quick run."""
        self.of = tuple(of)
        headlines = ((probe.name, probe.metrics[0]) for probe in self.of)
        self.metrics = (*self.by_turn, *(replace(m, name=name, label=f"{m.label} in {name}") for name, m in headlines))

    def plan(self, size: Size) -> Any:
        """Return the chats, at which turns the reader writes to how many of them, how often, and the other probes."""
        rng = random.Random(size.seed)
        chats = [rng.sample(written("dialogue"), TURNS // 2) for _ in range(size.of(6, 1))]
        turns = (AT[0], AT[-1]) if size.quick else AT
        written_to = {"turns": turns, "chats": size.of(3, 1), "samples": size.of(4, 8)}
        return {
            "system": SYSTEM,
            "chats": chats,
            "replies": written_to,
            "tokens": size.of(TOKENS, QUICK_TOKENS),
            "seed": size.seed,
            "probes": {} if size.quick else {probe.name: probe.plan(_few(size)) for probe in self.of},
        }

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Score every reply of the chats, and let the reader write some itself."""
        plan = self.plan(size)
        asked = [
            (number, 2 * i, user, Passage(reply, chat=_chat(chat[:i], user)))
            for number, chat in enumerate(plan["chats"])
            for i, (user, reply) in enumerate(chat)
        ]
        fits = [a for a in asked if reader.length(a[3]) + plan["tokens"] <= reader.context]
        out = Result([])
        if len(fits) < len(asked):
            last = max((turn for _, turn, _, _ in fits), default=0)
            out.notes.append(f"the chats end at turn {last} of {TURNS}: the context has {reader.context} tokens")
        for (number, turn, user, _), found in zip(
            fits, reader.logprobs([passage for *_, passage in fits], advance), strict=True
        ):
            out.figures.append(Figure("surprise", f"{number} {turn}", float(-found.mean()), user, turn=turn))
        self._write(out, reader, plan, fits, advance)
        for number, probe in enumerate(() if size.quick else self.of):
            self._ask(out, reader, probe, size, plan["chats"][number % len(plan["chats"])], advance)
        if size.quick and self.of:
            out.notes.append("the other probes are asked by turn without --quick")
        return out

    def _ask(
        self, out: Result, reader: Reader, probe: Probe, size: Size, chat: list[list[str]], advance: Advance | None
    ) -> None:
        """Add what another probe finds after some of a chat."""
        items = probe.items(_few(size)) if isinstance(probe, ForcedChoice) else []
        asked: dict[int, int] = {}
        for turn in LATER:
            later = cast(Reader, LaterReader(reader, exchanged(chat[: turn // 2])))
            if isinstance(probe, ForcedChoice):
                found = probe.ask(later, items, advance)
            else:
                found = probe.run(later, _few(size), advance)
            figures = [f for f in found.figures if f.metric == probe.metrics[0].name]
            asked[turn] = len(figures)
            out.figures.extend(
                replace(f, metric=probe.name, item=f"{turn} {f.item}", group=f.group or f.item, n=None, turn=turn)
                for f in figures
            )
        whole = max(1, *asked.values())
        if fewer := [turn for turn, n in asked.items() if n < whole]:
            limit = f"the context has {reader.context} tokens"
            out.notes.append(f"{probe.name}: fewer items from turn {fewer[0]} on: {limit}")

    def _write(self, out: Result, reader: Reader, plan: Any, fits: list[Any], advance: Advance | None) -> None:
        """Add what the reader writes at some turns of the first chats."""
        want, samples = plan["replies"], plan["replies"]["samples"]
        asked = [
            (number, turn, sample, passage.chat)
            for number, turn, _, passage in fits
            if number < want["chats"] and turn in want["turns"]
            for sample in range(samples)
        ]
        seeds = [(plan["seed"] * TURNS + turn) * samples + sample for _, turn, sample, _ in asked]
        texts = reader.replies([chat for *_, chat in asked], tokens=plan["tokens"], seeds=seeds, advance=advance)
        for (number, turn, sample, chat), text in zip(asked, texts, strict=True):
            item, reply = f"{number} {turn} reply {sample}", words(text)
            before = {phrase for _, message in chat for phrase in runs(words(message), PHRASE)}
            phrases = runs(reply, PHRASE)
            copied = share(sum(phrase in before for phrase in phrases), len(phrases))
            for metric, value in (("repetition", repetition(reply)), ("copied", copied)):
                out.figures.append(Figure(metric, item, value, turn=turn))
            if sample == 0 and number == 0:
                out.examples.append(Example(item, f"turn {turn}: {chat[-1][1]}", "", text))


class LaterReader:
    """A `Reader` for whom every chat has some messages of another one before it, after its system message."""

    def __init__(self, reader: Reader, before: Chat) -> None:
        self._reader, self._before = reader, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def length(self, passage: Passage) -> int:
        return self._reader.length(self._later(passage))

    def logprobs(self, passages: Sequence[Passage], advance: Advance | None = None) -> list[LogProbs]:
        return self._reader.logprobs([self._later(p) for p in passages], advance)

    def replies(
        self, chats: Sequence[Chat], *, tokens: int, seeds: Sequence[int], advance: Advance | None = None
    ) -> list[str]:
        return self._reader.replies([self._after(c) for c in chats], tokens=tokens, seeds=seeds, advance=advance)

    def divergences(self, pairs: Sequence[tuple[Passage, Passage]], advance: Advance | None = None) -> list[LogProbs]:
        return self._reader.divergences([(self._later(p), self._later(q)) for p, q in pairs], advance)

    def _later(self, passage: Passage) -> Passage:
        return replace(passage, chat=self._after(passage.chat)) if passage.chat else passage

    def _after(self, chat: Chat) -> Chat:
        systems = sum(role == "system" for role, _ in chat[:1])
        return (*chat[:systems], *self._before, *chat[systems:])


def _few(size: Size) -> Size:
    """How much the other probes ask at each turn."""
    return Size(quick=True, seed=size.seed)


def _chat(exchanges: list[list[str]], user: str) -> Chat:
    """A chat of exchanges that ends with a message of the user."""
    return (SYSTEM, *exchanged(exchanges), ("user", user))
