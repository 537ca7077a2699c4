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
    error: float
    """The standard error of the effect over topics: of the mean of above - below."""

    @property
    def merit(self) -> float:
        """Effect, less what it costs."""
        return self.above - self.below - KL_COST * self.kl - REPETITION_COST * self.repetition


def chosen(checks: Sequence[SiteCheck], depth: int) -> int:
    """Of the sites whose merit is within a standard error of the best one's, the nearest to the middle of `depth`.

    A few replies a site leave noise in its merit. Among sites that cannot be told apart the best number is chance and
    another seed's or machine's would be another, while the middle stays where it is (the one-standard-error rule,
    Breiman et al. 1984; that directions steer best from the middle of a model: Rimsky et al. 2024).
    """
    best = max(checks, key=lambda c: c.merit)
    near = [c for c in checks if c.merit >= best.merit - best.error]
    return min(near, key=lambda c: (abs(c.site - (depth - 1) / 2), c.site)).site


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
        on_tokens=on_tokens,
    )
    costs = Reference.of(model, found.contrast.neutral[:NEUTRAL]).kls(model, edits[::2])
    out = []
    for i, site in enumerate(tried):
        below, above = (rows[(2 * i + j) * len(chats) : (2 * i + j + 1) * len(chats)] for j in range(len(AMOUNTS)))
        low, high = (scorer.probabilities([model.text(r) for r in replies]) for replies in (below, above))
        out.append(
            SiteCheck(
                site=site,
                auroc=found.auroc[site],
                below=float(low.mean()),
                above=float(high.mean()),
                repetition=mean_repetition([*below, *above]),
                kl=costs[i],
                error=float((high - low).std() / np.sqrt(len(chats))),
            )
        )
    return out
