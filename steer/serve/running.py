"""State of the jobs that the batching engine (`steer.serve.batching`) has accepted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from steer.core.edit import Edit
from steer.model.sampling import Draw
from steer.model.steering.receipts import Receipt, Tally
from steer.serve.engine import Event, Job
from steer.serve.packed import Part, text_id


@dataclass(eq=False)
class RunningRequest:
    """A job that the engine has accepted, waiting or running; also the job's handle."""

    number: int
    job: Job
    on_event: Callable[[Event], None]
    draw: Draw
    ends: frozenset[int]
    """The model's end tokens."""
    needs: int
    """Pages of the KV cache that the job takes at most."""
    wake: threading.Event
    """Wakes the engine's thread."""
    edit: Edit | None = None
    """The edit applied in the current step."""
    made: int = 0
    """Tokens written so far."""
    begun: float = 0.0
    """When the job left the queue, in seconds of the monotonic clock."""
    cancelled: bool = False
    """Whether `cancel` was called; the job ends before the next step."""
    over: bool = False
    """Whether the last event is sent, or is being sent."""

    @property
    def id(self) -> str:
        """The batcher's id of this text."""
        return text_id(self.job.request, self.number)

    def cancel(self) -> None:
        """See `Handle.cancel`."""
        self.cancelled = True
        self.wake.set()


@dataclass(frozen=True)
class TokenRouting:
    """For each packed token, its edit and where its reply begins. Reused from step to step while `key` is the same."""

    key: tuple[list[Part], list[int]]
    """The parts of the step, and for each text the index of its edit."""
    row: Int[Tensor, " tokens"]
    """Index into the applied edits, one per packed token."""
    first: Int[Tensor, "1 tokens"]
    """For each packed token, the position in its text that writes the first token of the reply."""

    @classmethod
    def of(
        cls, parts: list[Part], rows: list[int], texts: Sequence[RunningRequest], device: torch.device
    ) -> TokenRouting:
        """Build the routing of a step. `rows`: for each text, the index of its edit."""
        counts = torch.tensor([p.tokens.stop - p.tokens.start for p in parts])
        first = torch.tensor([len(t.job.prompt) - t.job.begun - 1 for t in texts])
        row, first = (x.repeat_interleave(counts).to(device) for x in (torch.tensor(rows), first))
        return cls((parts, rows), row, first[None])


class ServerReceipts(Tally):
    """The receipts of all texts that are being written, by the text's number."""

    def ended(self, text: int) -> Receipt:
        """Return a text's receipt and forget the text."""
        receipt = self.receipt(text)
        self._texts.pop(text, None)
        return receipt
