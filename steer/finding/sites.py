"""Which site steers best: sites that read a trait equally well are tried on fit topics, and one is chosen.

Used by `find_trait` after `directions` computed a vector per site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from steer.core.edit import Edit
from steer.core.sampler import MEASURE, Sampler
from steer.finding.directions import Candidates, rough_direction
from steer.measure.fluency import Reference, mean_repetition
from steer.measure.scorer import Scorer
from steer.model.loaded import Message
from steer.model.steered import SteeredModel

BAND = (0.2, 0.8)
"""First and last depth tried, as shares of the model's depth: earlier sites carry words rather than behaviour, later
ones the next word."""
AMOUNTS = (-1.0, 1.0)
"""Amounts tried at each site."""
KL_COST = 2.0
"""Weight of KL in the merit: 0.1 nats at amount -1 cancel an effect of 0.2. A site that costs much at amount 1 falls
apart at 2."""
REPETITION_COST = 4.0
"""Weight of repetition in the merit: repeating a tenth of the trigrams cancels an effect of 0.4."""
NEUTRAL = 8
"""Number of neutral replies that a site's KL is computed on."""


@dataclass(frozen=True)
class SiteCheck:
    """The measured effect of steering at one site."""

    site: int
    auroc: float
    """Held-out AUROC of the site's projection."""
    below: float
    """Mean trait probability of replies at amount -1."""
    above: float
    """Mean trait probability of replies at amount 1."""
    repetition: float
    """Mean repetition of the replies at both amounts."""
    kl: float
    """KL at amount -1 on neutral prompts, nats per token."""
    error: float
    """Standard error over topics of the effect, the mean of `above - below`."""

    @property
    def merit(self) -> float:
        """Effect minus weighted costs: what sites are compared by."""
        return self.above - self.below - KL_COST * self.kl - REPETITION_COST * self.repetition


def chosen(checks: Sequence[SiteCheck], depth: int) -> int:
    """The site nearest to the middle of `depth` blocks, of those whose merit is not clearly lower than the best.

    Clearly lower means by more than two standard errors of the difference. A few replies per site leave noise in its
    merit: among sites that cannot be distinguished, which one has the best number is chance and changes with the seed
    and the machine; the middle does not. This is the one-standard-error rule (Breiman et al. 1984) with the error of
    the difference in place of that of the best; that directions steer best from the middle is from Rimsky et al. 2024.
    """
    best = max(checks, key=lambda c: c.merit)
    near = [c for c in checks if best.merit - c.merit <= 2 * math.hypot(best.error, c.error)]
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
    """Steer at each of `sites` sites by amounts -1 and 1, and measure the replies to `topics` fit topics.

    The sites are spread evenly over those in `BAND` that read the trait as well as the best. All replies are generated
    in one batch. `on_tokens` is called with the number of tokens written since its last call.
    """
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
