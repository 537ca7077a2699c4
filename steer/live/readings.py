"""What directions and features read off residual streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.values.dictionary import Dictionary, EncoderRows
from steer.values.direction import Direction
from steer.values.feature import Feature

_KEPT = 16
"""Sets of rows of one dictionary that are kept."""


def amounts(target: Direction | Feature, h: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens"]:
    """What a direction or a feature reads off residual streams, in amounts; of several latents the mean, those that
    count the other way with a minus."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    if isinstance(target, Direction):
        return (x @ target.vector.to(x.device, x.dtype) - target.without_mean) / target.gap
    acts = encoder_rows(target.dictionary, target.indices, x.device, x.dtype)(x)
    return (acts / torch.tensor(target.units, device=x.device, dtype=x.dtype)).mean(-1)


def encoder_rows(
    dictionary: Dictionary, taken: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> EncoderRows:
    """The rows of a dictionary that are read, on a device and in a dtype, made once: sessions that take turns on a
    model apply and withdraw their sliders at every token, which must not copy anything anew.

    A topk dictionary goes there as a whole, since all latents compete. Both are kept with the dictionary, so that they
    go when it does.
    """

    def made(key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in dictionary.placed:
            # No inference tensors: what is kept here serves passes with gradients too.
            with torch.inference_mode(False):
                dictionary.placed[key] = make()
            while len(dictionary.placed) > _KEPT:
                dictionary.placed.pop(next(iter(dictionary.placed)))
        return dictionary.placed[key]

    if dictionary.architecture != "topk":
        return made((taken, device, dtype), lambda: dictionary.rows(taken).to(device, dtype))
    whole = made((device, dtype), lambda: dictionary.to(device, dtype))
    return made((taken, device, dtype), lambda: whole.rows(taken))
