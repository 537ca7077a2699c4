"""Numbers by row, of which each token of a pass takes those of its own row."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.live.frame import TextPass


class Table:
    """Numbers `[rows, 1, n]` by row, fp64 here, copied once to each device and dtype that asks."""

    def __init__(self, data: Float[Tensor, "rows 1 n"]) -> None:
        self.data = data
        self._ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._last: tuple[Any, Tensor, Tensor] | None = None

    def at(self, text: TextPass, like: Tensor, dtype: torch.dtype) -> Float[Tensor, "batch new n"]:
        """The rows of a pass, in a dtype, on the device of `like`."""
        ready = self.ready(like.device, dtype)
        if text.row is None or ready.shape[0] == 1:
            return ready
        # The rows of a batch stay the same from token to token.
        if self._last is None or self._last[0] is not text.row or self._last[1] is not ready:
            self._last = (text.row, ready, text.of_rows(ready))
        return self._last[2]

    def ready(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """All rows, on a device and in a dtype."""
        ready = self._ready.get((device, dtype))
        if ready is None:
            # No inference tensor: a pass outside of inference mode, which may want gradients, uses it too.
            with torch.inference_mode(False):
                ready = self._ready[device, dtype] = self.data.to(device, dtype)
        return ready


class Window:
    """On which tokens of the reply columns act, and with what share: `When.window` by row and column."""

    def __init__(self, data: Float[Tensor, "3 rows 1 n"]) -> None:
        self.start, self.end, self.ramp = (Table(part) for part in data)
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for windows of equal numbers."""
        return tuple((tuple(t.data.shape), *t.data.flatten().tolist()) for t in (self.start, self.end, self.ramp))

    def share(self, text: TextPass, like: Tensor) -> Float[Tensor, "batch new n"]:
        """The share of each column that acts on each token, in the dtype of `like` and on its device.

        Worked out once a pass for all the modules that have this window: it costs more than what it is wanted for.
        """
        assert text.index is not None
        if self._last is not None:
            index, row, share = self._last
            if index is text.index and row is text.row and (share.dtype, share.device) == (like.dtype, like.device):
                return share
        i = text.index.to(like.device, like.dtype)[..., None]
        start, end, ramp = (t.at(text, like, like.dtype) for t in (self.start, self.end, self.ramp))
        share = ((i - start + 1) / ramp).clamp(0, 1) * (i < end)
        self._last = (text.index, text.row, share)
        return share
