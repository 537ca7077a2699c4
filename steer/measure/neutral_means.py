"""Neutral means: the mean residual stream of ordinary replies after each block.

`steer bake` needs them for the methods that leave the neutral mean unchanged. They are measured once per checkpoint
and stored in $STEER_HOME beside the checkpoint's directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steer.checkpoint.fetch import home
from steer.checkpoint.sketch import Sketch
from steer.errors import MismatchError, SteerError
from steer.files import write_atomic

if TYPE_CHECKING:
    from steer.measure.contrast import Reply
    from steer.model.steered import SteeredModel


def neutral_means(
    model: SteeredModel, *, seed: int = 0, on_tokens: Callable[[int], None] | None = None
) -> Float[Tensor, "blocks d"]:
    """The mean residual stream after each block over the model's replies to the neutral prompts of the fit split,
    each reply with equal weight, fp32. `steer find` makes its directions orthogonal to these means.

    `seed` is that of sampling. `on_tokens` is called with the number of tokens written since its last call."""
    from dataclasses import replace

    from steer.core.trait import NeutralPrompts
    from steer.measure.contrast import SAMPLER, Reply

    chats = [({"role": "user", "content": prompt},) for prompt in NeutralPrompts.load().fit]
    made = model.replies([list(c) for c in chats], replace(SAMPLER, seed=seed), on_tokens=on_tokens)
    replies = [Reply(c, tuple(ids), model.text(ids)) for c, ids in zip(chats, made, strict=True) if ids]
    return means_of(model, replies)


def means_of(model: SteeredModel, replies: Sequence[Reply]) -> Float[Tensor, "blocks d"]:
    """The mean residual stream after each block over replies, each reply with equal weight, fp32."""
    from steer.measure.residuals import reply_means

    return reply_means(model, replies).double().mean(0).float()


def neutral_for(
    place: Path,
    sketch: Sketch,
    file: Path | None = None,
    *,
    force: bool = False,
    model: SteeredModel | None = None,
) -> Tensor:
    """The neutral means `[blocks, d]` of the checkpoint at `place`, read from `file`.

    Without `file` they are read from the place beside the checkpoint's directions in $STEER_HOME. If the file does not
    exist, or its means were measured in a dtype other than the one the model computes in now, they are measured and
    written to it; this loads the model unless `model` is given. `force` uses the file's means whatever checkpoint and
    dtype they come from.

    Errors: SteerError for a file without neutral means, MismatchError for those of another checkpoint, unless `force`.
    """
    from steer.checkpoint.dtypes import computing_in, dtype_name

    path = file or home() / "directions" / sketch.id / "neutral" / "means.safetensors"
    dtype = dtype_name(model.hf.dtype if model is not None else computing_in(str(place)).dtype)
    if path.is_file():
        means, stored_sketch, stored_dtype = _read(path)
        if not force and stored_sketch.values.size and not sketch.same_as(stored_sketch):
            raise MismatchError(
                f"{path}: expected neutral means of {place}, found those of a checkpoint whose weights differ by "
                f"{sketch.distance(stored_sketch):.1%}; name another file, which is then measured, or pass --force"
            )
        # A file without a sketch was not written by steer and is used as it is.
        if force or not stored_sketch.values.size or stored_dtype == dtype:
            return means
    from steer.model.steered import load
    from steer.progress import bar

    with bar("neutral replies", None, "tokens") as advance:
        means = neutral_means(model or load(place), on_tokens=advance)
    write_atomic(path, save({"neutral": means}, metadata={"sketch": sketch.to_header(), "dtype": dtype}))
    return means


def _read(path: Path) -> tuple[Float[Tensor, "blocks d"], Sketch, str | None]:
    """(means, sketch of their checkpoint, dtype they were computed in; files of older versions have no dtype: None)."""
    try:
        with safe_open(str(path), framework="pt") as f:
            means: torch.Tensor | None = f.get_tensor("neutral") if "neutral" in f.keys() else None  # noqa: SIM118
            header = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise SteerError(f"{path}: expected neutral means, found something unreadable ({e}); remove it") from e
    if means is None or means.ndim != 2:
        raise SteerError(f"{path}: expected neutral means [blocks, d], found none; remove it, or name another file")
    return means.float(), Sketch.from_header(header), header.get("dtype")
