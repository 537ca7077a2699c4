"""Drift: what a long chat does to a model, by turn: how well it still predicts the replies, and what it repeats.

The chats are written beforehand, of exchanges that make sense in any order, and every chat has them in another order:
what changes with the turn is then the turn's doing, not the text's.
"""

from __future__ import annotations

import random
from typing import Any

from steer.measure.harness import repetition
from steer.measure.probes.probe import QUICK_TOKENS, Chat, Example, Figure, Metric, Passage, Probe, Reader, Result, Size
from steer.measure.probes.stories import written
from steer.measure.probes.words import runs, share, words
from steer.progress import Advance

TURNS = 40
PHRASE = 4
"""Words of a phrase."""
TOKENS = 48
SYSTEM = ("system", "You are a friendly neighbour who likes to talk.")


class Drift(Probe):
    """A chat of `TURNS` messages, or as many as fit."""

    name = "drift"
    says = "Whether the model falls apart as the chat grows: its surprise at fitting replies, and what it repeats."
    metrics = (
        Metric("surprise", "lower", "perplexity per token of a reply, by turn", exponent=True),
        Metric("repetition", "lower", "share of three-word phrases seen before in the same reply"),
        Metric("copied", "lower", "share of four-word phrases copied from earlier in the chat"),
    )
    needs = frozenset({"logprobs", "replies"})

    def plan(self, size: Size) -> Any:
        """Return the chats, and at which turns the reader writes to how many of them, how often."""
        rng = random.Random(size.seed)
        chats = [rng.sample(written("dialogue"), TURNS // 2) for _ in range(size.of(6, 1))]
        turns = (0, 38) if size.quick else (0, 12, 24, 38)
        written_to = {"turns": turns, "chats": size.of(3, 1), "samples": size.of(4, 8)}
        return {
            "system": SYSTEM,
            "chats": chats,
            "replies": written_to,
            "tokens": size.of(TOKENS, QUICK_TOKENS),
            "seed": size.seed,
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
        return out

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
            before = {phrase for _, said in chat for phrase in runs(words(said), PHRASE)}
            phrases = runs(reply, PHRASE)
            copied = share(sum(phrase in before for phrase in phrases), len(phrases))
            for metric, value in (("repetition", repetition(reply)), ("copied", copied)):
                out.figures.append(Figure(metric, item, value, turn=turn))
            if sample == 0 and number == 0:
                out.examples.append(Example(item, f"turn {turn}: {chat[-1][1]}", "", text))


def _chat(exchanges: list[list[str]], user: str) -> Chat:
    """A chat of exchanges that ends with a message of the user."""
    said = [message for pair in exchanges for message in zip(("user", "assistant"), pair, strict=True)]
    return (SYSTEM, *said, ("user", user))
