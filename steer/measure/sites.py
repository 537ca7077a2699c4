"""Which site steers: the sites that read a trait equally well, tried on fit topics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from steer.features.find import Candidates, rough_direction
from steer.live.model import Message, SteeredModel
from steer.measure.fluency import Reference, mean_repetition
from steer.measure.scorer import Scorer
from steer.values.edit import Edit
from steer.values.sampler import MEASURE, Sampler

BAND = (0.2, 0.8)
"""Sites tried, as shares of the depth: earlier ones carry words rather than behaviour, later ones the next word."""
AMOUNTS = (-1.0, 1.0)
KL_COST = 2.0
"""A tenth of a nat at amount -1 weighs as much as an effect of 0.2: what is dear at 1 falls apart at 2."""
REPETITION_COST = 4.0
"""A reply that repeats a tenth of its trigrams is as bad as one that misses the trait by 0.4."""
NEUTRAL = 8
"""Neutral replies that a site's KL is taken on."""


@dataclass(frozen=True)
class SiteCheck:
    """What moving one site did."""

    site: int
    auroc: float
    below: float
    """Mean trait probability of replies at amount -1."""
    above: float
    """At amount 1."""
    repetition: float
    """Mean of both."""
    kl: float
    """What amount -1 costs on neutral prompts, nats per token."""

    @property
    def merit(self) -> float:
        """Effect, less what it costs."""
        return self.above - self.below - KL_COST * self.kl - REPETITION_COST * self.repetition


def chosen(checks: Sequence[SiteCheck]) -> int:
    """The site of the most merit, each one's averaged with its neighbours'.

    A few replies a site leave noise in its merit, while what a site does changes slowly with depth: a lone peak is
    chance, and among equals the same region wins again on another machine. Neighbours weigh half as much.
    """
    ordered = sorted(checks, key=lambda c: c.site)
    merits = np.pad([c.merit for c in ordered], 1, mode="edge")
    return ordered[int((merits[:-2] + 2 * merits[1:-1] + merits[2:]).argmax())].site


def check_sites(
    model: SteeredModel,
    found: Candidates,
    scorer: Scorer,
    *,
    sites: int = 5,
    topics: int = 16,
    sampler: Sampler | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[SiteCheck]:
    """Replies to a few fit topics with each site moved down and up by one gap, all in one batch."""
    depth = model.anatomy.blocks
    inside = [s for s in found.readable if BAND[0] <= (s + 1) / depth <= BAND[1]] or found.readable
    tried = [inside[i] for i in sorted({round(x) for x in np.linspace(0, len(inside) - 1, sites)})]
    chats: list[list[Message]] = [[{"role": "user", "content": t}] for t in found.contrast.trait.fit[:topics]]
    edits = [Edit(add=((rough_direction(found, s), a),)) for s in tried for a in AMOUNTS]
    rows = model.replies(
        chats * len(edits),
        sampler or Sampler(**{**vars(MEASURE), "max_new_tokens": 48}),
        [e for e in edits for _ in chats],
        keys=list(range(len(chats))) * len(edits),
        batch=96,
        on_tokens=on_tokens,
    )
    costs = Reference.of(model, found.contrast.neutral[:NEUTRAL]).kls(model, edits[::2])
    out = []
    for i, site in enumerate(tried):
        below, above = (rows[(2 * i + j) * len(chats) : (2 * i + j + 1) * len(chats)] for j in range(len(AMOUNTS)))
        out.append(
            SiteCheck(
                site=site,
                auroc=found.auroc[site],
                below=float(scorer.probabilities([model.text(r) for r in below]).mean()),
                above=float(scorer.probabilities([model.text(r) for r in above]).mean()),
                repetition=mean_repetition([*below, *above]),
                kl=costs[i],
            )
        )
    return out
