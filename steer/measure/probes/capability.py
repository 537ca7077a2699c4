"""Capability, the probe of general damage: how well the model predicts plain prose that has nothing to do with a
trait."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from steer.measure.harness import plain_paragraphs
from steer.measure.probes.probe import Example, Figure, Metric, Passage, Probe, Reader, Result, Size
from steer.progress import Advance

WORDS = 8
"""Words of a piece. The first piece of a paragraph is read and not scored."""


class Capability(Probe):
    """Nats per token of pieces of plain prose, each given what comes before it in its paragraph."""

    name = "capability"
    says = "How well the model predicts plain prose: a lower perplexity is better, and damage raises it first."
    metrics = (Metric("perplexity", "lower", "perplexity of plain prose, per token", exponent=True),)
    needs = frozenset({"logprobs"})

    def plan(self, size: Size) -> Any:
        """Return the pieces as JSON."""
        return [(item, group, asdict(p)) for item, group, p in self._pieces()]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Read every paragraph once."""
        pieces = self._pieces()
        asked = [piece for piece in pieces if reader.length(piece[2]) <= reader.context]
        left = len(pieces) - len(asked)
        note = f"{left} of {len(pieces)} pieces left out: longer than the context of {reader.context} tokens"
        found = reader.logprobs([p for _, _, p in asked], advance)
        scored = [(*piece, -float(f.mean())) for piece, f in zip(asked, found, strict=True)]
        return Result(
            [Figure("perplexity", item, nats, group) for item, group, _, nats in scored],
            [
                Example(item, f"{p.begun[-80:]}…", p.text.strip(), f"{nats:.2f} nats per token")
                for item, _, p, nats in scored[:: max(1, len(scored) // 5)]
            ],
            [note] if left else [],
        )

    @staticmethod
    def _pieces() -> list[tuple[str, str, Passage]]:
        """Return (item, its paragraph, the piece) of the half of the paragraphs that no search has seen."""
        out = []
        # All of them in a quick run too, a thousand tokens: among fewer groups no p-value is small.
        for number, paragraph in enumerate(plain_paragraphs()[1]):
            words, group = paragraph.split(), f"paragraph {number + 1}"
            for at in range(WORDS, len(words), WORDS):
                piece = Passage(f" {' '.join(words[at : at + WORDS])}", " ".join(words[:at]))
                out.append((f"{group}, word {at + 1}", group, piece))
        return out
