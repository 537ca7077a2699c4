"""Neutral means: where the residual stream of ordinary replies lies after each block, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steer.errors import MismatchError, SteerError
from steer.files import write_atomic
from steer.weights.fetch import home
from steer.weights.sketch import Sketch

if TYPE_CHECKING:
    from steer.features.contrast import Reply
    from steer.live.model import SteeredModel


def neutral_means(
    model: SteeredModel, *, seed: int = 0, on_tokens: Callable[[int], None] | None = None
) -> Float[Tensor, "blocks d"]:
    """The mean residual stream after each block over the model's own replies to the neutral prompts of the fit split,
    every reply counting alike, fp32: the means that `steer find` makes its directions orthogonal to."""
    from dataclasses import replace

    from steer.features.contrast import SAMPLER, Reply
    from steer.values.trait import NeutralPrompts

    chats = [({"role": "user", "content": prompt},) for prompt in NeutralPrompts.load().fit]
    made = model.replies([list(c) for c in chats], replace(SAMPLER, seed=seed), on_tokens=on_tokens)
    replies = [Reply(c, tuple(ids), model.text(ids)) for c, ids in zip(chats, made, strict=True) if ids]
    return means_of(model, replies)


def means_of(model: SteeredModel, replies: Sequence[Reply]) -> Float[Tensor, "blocks d"]:
    """The mean residual stream after each block over replies, every reply counting alike, fp32."""
    from steer.features.residuals import reply_means

    return reply_means(model, replies).double().mean(0).float()


def neutral_for(
    place: Path,
    sketch: Sketch,
    file: Path | None = None,
    *,
    force: bool = False,
    model: SteeredModel | None = None,
) -> Tensor:
    """The neutral means of the checkpoint at `place`, `[blocks, d]`: those in `file`, by default those kept beside its
    directions. Where there are none yet, or they were measured in another dtype than the model computes in now, they
    are measured, which loads the model if it is not given, and kept there.

    Errors: SteerError for a file without neutral means, MismatchError for those of another checkpoint, unless `force`.
    """
    from steer.live.dtypes import computing_in, dtype_name

    at = file or home() / "directions" / sketch.id / "neutral" / "means.safetensors"
    dtype = dtype_name(model.hf.dtype if model is not None else computing_in(str(place)).dtype)
    if at.is_file():
        means, theirs, computed_in = _read(at)
        if not force and theirs.values.size and not sketch.same_as(theirs):
            raise MismatchError(
                f"{at}: expected neutral means of {place}, found those of a checkpoint whose weights differ by "
                f"{sketch.distance(theirs):.1%}; name another file, which is then measured, or pass --force"
            )
        if force or not theirs.values.size or computed_in == dtype:  # without a sketch they are not of our making
            return means
    from steer.live.model import load
    from steer.progress import bar

    with bar("neutral replies", None, "tokens") as advance:
        means = neutral_means(model or load(place), on_tokens=advance)
    write_atomic(at, save({"neutral": means}, metadata={"sketch": sketch.to_header(), "dtype": dtype}))
    return means


def _read(path: Path) -> tuple[Float[Tensor, "blocks d"], Sketch, str | None]:
    """(the means, the sketch of their checkpoint, what they were computed in: None in files of older versions)."""
    try:
        with safe_open(str(path), framework="pt") as f:
            means: torch.Tensor | None = f.get_tensor("neutral") if "neutral" in f.keys() else None  # noqa: SIM118
            header = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise SteerError(f"{path}: expected neutral means, found something unreadable ({e}); remove it") from e
    if means is None or means.ndim != 2:
        raise SteerError(f"{path}: expected neutral means [blocks, d], found none; remove it, or name another file")
    return means.float(), Sketch.from_header(header), header.get("dtype")
