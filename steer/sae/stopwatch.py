"""A stopwatch for the parts of a training step; their shares go to the training log and the manifest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the seconds spent in named parts: `with watch("gradients"): ...`.

    Given a CUDA `device`, it waits for the GPU before it reads the clock.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device is not None and device.type == "cuda"

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - start

    def shares(self) -> dict[str, float]:
        """Each part's share of the time that was measured, the largest first."""
        total = sum(self.seconds.values()) or 1.0
        return {p: s / total for p, s in sorted(self.seconds.items(), key=lambda x: -x[1])}

    def _now(self) -> float:
        if self._cuda:  # kernels run on after the call that launched them returned
            torch.cuda.synchronize()
        return time.perf_counter()
