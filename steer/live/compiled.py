"""Decoding through torch.compile: one token a step over a cache of fixed size, with hooks that were there before.

What compiled code reads it reads in place: sliders that move change numbers and compile nothing anew, and those that
had a place when the code was made can come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache

from steer.errors import UsageError
from steer.values.move import Move

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


class CompiledStep:
    """The forward pass over one new token, compiled. Prompts are read by the plain model."""

    def __init__(self, model: SteeredModel, moves: Sequence[Move], context: int, **options: Any) -> None:
        """`moves`: what may be moved without another compilation, at any amounts. `context`: tokens of a text at
        most. `options` go to torch.compile."""
        self.model, self.context = model, context
        model.steering.hold(moves)
        self._step = torch.compile(model.hf.forward, dynamic=False, **options)

    def cache(self) -> Cache:
        """A cache for one text."""
        return StaticCache(config=self.model.hf.config, max_cache_len=self.context)

    def __call__(
        self, fed: Int[Tensor, "1 new"], positions: Int[Tensor, "1 new"], cache: Cache
    ) -> Float[Tensor, "1 vocab"]:
        """Logits after the last of the new tokens. A prompt goes through the plain model.

        Errors: UsageError where the context is full.
        """
        if int(positions[0, -1]) >= self.context:
            raise UsageError(
                f"{self.model.name}: expected a text of at most {self.context} tokens, found one more; "
                "compile it with a longer context"
            )
        forward = self._step if fed.shape[1] == 1 else self.model.hf
        out = forward(input_ids=fed, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def close(self) -> None:
        """Let the plain model do all of it again."""
        self.model.steering.hold(())
