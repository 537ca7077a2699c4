"""What the batching engine keeps of the jobs that it has taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from steer.live.receipts import Receipt, Tally
from steer.live.sampling import Draw
from steer.live.serve.engine import Event, Job
from steer.live.serve.packed import Part, text_id
from steer.values.edit import Edit


@dataclass(eq=False)
class Taken:
    """A job that was taken, and its handle."""

    number: int
    job: Job
    on_event: Callable[[Event], None]
    draw: Draw
    ends: frozenset[int]
    """The model's end tokens."""
    needs: int
    """How much of the pages it takes."""
    wake: threading.Event
    """Of the engine."""
    edit: Edit | None = None
    """That of the step being made."""
    made: int = 0
    """Tokens so far."""
    begun: float = 0.0
    """When, by the monotonic clock."""
    cancelled: bool = False
    """Somebody wants it to end; it does so before the next step."""
    over: bool = False
    """It hears, or has heard, its last event."""

    @property
    def id(self) -> str:
        """What the batcher knows it by."""
        return text_id(self.job.request, self.number)

    def cancel(self) -> None:
        """See `Handle.cancel`."""
        self.cancelled = True
        self.wake.set()


@dataclass(frozen=True)
class Places:
    """What there is to know of each packed token. The same from step to step while no text comes or goes."""

    key: tuple[list[Part], list[int]]
    """The parts of the step, and the row that each text goes by."""
    row: Int[Tensor, " tokens"]
    first: Int[Tensor, "1 tokens"]
    """The position in its text that writes the first token of the reply."""

    @classmethod
    def of(cls, parts: list[Part], rows: list[int], texts: Sequence[Taken], device: torch.device) -> Places:
        """Those of a step over `texts`."""
        counts = torch.tensor([p.tokens.stop - p.tokens.start for p in parts])
        first = torch.tensor([len(t.job.prompt) - t.job.begun - 1 for t in texts])
        row, first = (x.repeat_interleave(counts).to(device) for x in (torch.tensor(rows), first))
        return cls((parts, rows), row, first[None])


class Accounts(Tally):
    """The receipts of the texts that are being written."""

    def ended(self, text: int) -> Receipt:
        """A text's receipt, after which nothing of it is kept."""
        receipt = self.receipt(text)
        self._texts.pop(text, None)
        return receipt
