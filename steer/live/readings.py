"""What directions and features read off residual streams."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from steer.values.dictionary import Dictionary, EncoderRows
from steer.values.direction import Direction
from steer.values.feature import Feature


def amounts(target: Direction | Feature, h: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens"]:
    """What a direction or a feature reads off residual streams, in amounts; of several latents the mean, those that
    count the other way with a minus."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    if isinstance(target, Direction):
        return (x @ target.vector.to(x.device, x.dtype) - target.without_mean) / target.gap
    acts = encoder_rows(target.dictionary, target.indices, x.device, x.dtype)(x)
    return (acts / torch.tensor(target.units, device=x.device, dtype=x.dtype)).mean(-1)


@lru_cache(maxsize=16)
def encoder_rows(
    dictionary: Dictionary, taken: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> EncoderRows:
    """The rows of a dictionary that are read, on a device and in a dtype, made once: sessions that take turns on a
    model apply and withdraw their sliders at every token, which must not copy anything anew.

    A topk dictionary goes there as a whole, since all latents compete.
    """
    # No inference tensors: what is kept here serves passes with gradients too.
    with torch.inference_mode(False):
        if dictionary.architecture != "topk":
            return dictionary.rows(taken).to(device, dtype)
        return _whole(dictionary, device, dtype).rows(taken)


@lru_cache(maxsize=2)
def _whole(dictionary: Dictionary, device: torch.device, dtype: torch.dtype) -> Dictionary:
    return dictionary.to(device, dtype)
