"""Whose prompts a step reads: a scheduler for transformers' continuous batching that is fair between requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.generation.continuous_batching import FIFOScheduler
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

STEP = 0.5
"""Seconds that a step which reads prompts should take: after one that took longer, as it does far behind in a long
prompt or with a larger model, the next reads fewer tokens."""
LEAST = 32
"""Tokens of prompts that a step reads however long it takes."""
OLDEST = 8
"""One in so many tokens goes to the request that came first, so that shorter ones cannot keep it waiting for ever."""
FAIR = "steer_fair"
"""What transformers knows the scheduler by."""


class FairScheduler(FIFOScheduler):
    """Texts that write go first, as transformers has it; what a step reads of prompts is divided by `shares`."""

    most: int
    """Tokens of prompts in a step, at most."""
    read: int
    """Of the next step, which should take STEP seconds."""

    def _process_candidates(self, candidates: list[Any], token_budget: int, *more: Any) -> Any:
        reading = [s for s in candidates if s.status != RequestStatus.DECODING]
        left = token_budget - (len(candidates) - len(reading))
        wanted = {s.request_id: len(s.remaining_prefill_tokens) for s in reading}
        self._shares = shares(wanted, max(0, min(self.read, left)))
        chosen = [s for s in candidates if self._shares.get(s.request_id, 1)]
        return super()._process_candidates(chosen, token_budget, *more)

    def _schedule_request(self, state: Any, request_tokens: list[int], token_budget: int, *more: Any) -> None:
        share = self._shares.get(state.request_id, token_budget)
        super()._schedule_request(state, request_tokens, min(token_budget, share), *more)

    def took(self, seconds: float) -> None:
        """How long the last step took: the next reads what would have filled STEP."""
        read = sum(self._shares.values())
        if read and (seconds > STEP or read >= self.read):
            self.read = int(min(self.most, max(LEAST, read * STEP / seconds)))


def shares(wanted: Mapping[str, int], tokens: int) -> dict[str, int]:
    """How many of a step's `tokens` go to each text, of which `wanted` are still to be read; by `text_id`.

    The request that came first gets one in OLDEST. The rest goes to the request that has least to read, then to the
    next, so that a short prompt is not read behind a long one.
    """
    left: dict[str, int] = {}
    for text in sorted(wanted, key=lambda id: int(id.split()[1])):
        request = text.split()[0]
        left[request] = left.get(request, 0) + wanted[text]
    given = {request: min(n, -(-tokens // OLDEST)) for request, n in list(left.items())[:1]}
    tokens -= sum(given.values())
    for request in sorted(left, key=left.__getitem__):
        more = min(left[request] - given.get(request, 0), tokens)
        given[request] = given.get(request, 0) + more
        tokens -= more
    out = {}
    for text, n in wanted.items():
        request = text.split()[0]
        out[text] = min(n, given[request])
        given[request] -= out[text]
    return out


SCHEDULER_MAPPING[FAIR] = FairScheduler
