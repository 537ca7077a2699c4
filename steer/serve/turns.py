"""A scheduler for transformers' continuous batching that divides the prompt tokens of each step fairly by request.

Importing this file registers it with transformers; `steer.serve.packed.Batcher` selects it by the name FAIR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.generation.continuous_batching import FIFOScheduler
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

STEP = 0.5
"""Seconds that a step which reads prompts should take. After a step that took longer (late in a long prompt, or with a
larger model) the next step reads fewer tokens."""
LEAST = 32
"""Prompt tokens that a step reads at least, however long it takes."""
OLDEST = 8
"""One in OLDEST prompt tokens goes to the request that came first, so that shorter requests cannot block it forever."""
FAIR = "steer_fair"
"""The scheduler's name in transformers."""


class FairScheduler(FIFOScheduler):
    """Texts that write go first, as in transformers; `shares` divides the remaining tokens of a step among prompts."""

    most: int
    """Upper limit of prompt tokens per step."""
    read: int
    """Prompt tokens that the next step may read, chosen so that it takes STEP seconds."""

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
        """Adjust `read` from the seconds of the last step: as many tokens as would have taken STEP seconds."""
        self.read = next_read(self.read, self.most, sum(self._shares.values()), seconds)


def next_read(read: int, most: int, used: int, seconds: float) -> int:
    """Return how many prompt tokens the next step may read, at most `most`, after a step that could read `read` and
    read `used` in `seconds`. A quick step with fewer tokens than it could read changes nothing."""
    if not used or (seconds <= STEP and used < read):
        return read
    return int(min(most, max(LEAST, used * STEP / seconds)))


def shares(wanted: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Divide a step's `tokens` among texts. `wanted`: text id -> prompt tokens still to read. Same keys are returned.

    The request that came first gets one in OLDEST tokens. The rest goes to the request with the fewest tokens to read,
    then to the next, so that a short prompt does not wait behind a long one.

    >>> shares({"a 1": 100, "b 2": 10}, 16)
    {'a 1': 6, 'b 2': 10}
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
