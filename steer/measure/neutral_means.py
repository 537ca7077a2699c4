"""Neutral means: the mean residual stream of ordinary replies after each block.

`steer bake` needs them for the methods that leave the neutral mean unchanged. They are measured once per checkpoint
and stored in $STEER_HOME beside the checkpoint's directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steer.checkpoint.dtypes import computing_in, dtype_name
from steer.checkpoint.fetch import home
from steer.checkpoint.sketch import Sketch
from steer.core.trait import NeutralPrompts
from steer.errors import MismatchError, SteerError
from steer.files import write_atomic
from steer.measure.contrast import SAMPLER, Reply, reply_means
from steer.measure.harness import neutral_replies
from steer.model import steered
from steer.model.steered import SteeredModel
from steer.progress import Advance, bar


def neutral_means(model: SteeredModel, *, on_tokens: Advance | None = None) -> Float[Tensor, "blocks d"]:
    """The mean residual stream after each block over the model's replies to the neutral prompts of the fit split,
    each reply with equal weight, fp32. `steer find` makes its directions orthogonal to these means."""
    prompts = NeutralPrompts.load().fit
    return means_of(model, neutral_replies(model, prompts, tokens=SAMPLER.max_new_tokens, on_tokens=on_tokens))


def means_of(model: SteeredModel, replies: Sequence[Reply]) -> Float[Tensor, "blocks d"]:
    """The mean residual stream after each block over replies, each reply with equal weight, fp32."""
    return reply_means(model, replies).double().mean(0).float()


def neutral_for(
    place: Path,
    sketch: Sketch,
    file: Path | None = None,
    *,
    force: bool = False,
    model: SteeredModel | None = None,
) -> Float[Tensor, "blocks d"]:
    """The neutral means of the checkpoint at `place`, read from `file`.

    Without `file` they are read from the place beside the checkpoint's directions in $STEER_HOME. If the file does not
    exist, or its means were measured in a dtype other than the one the model computes in now, they are measured and
    written to it; this loads the model unless `model` is given. `force` uses the file's means whatever checkpoint and
    dtype they come from.

    Errors: SteerError for a file without neutral means, MismatchError for those of another checkpoint, unless `force`.
    """
    path = file or home() / "directions" / sketch.id / "neutral" / "means.safetensors"
    dtype = dtype_name(model.hf.dtype if model is not None else computing_in(str(place)).dtype)
    if path.is_file():
        means, header = _read(path)
        found = Sketch.from_header(header)
        if not force and found.values.size and not sketch.same_as(found):
            raise MismatchError(
                f"{path}: expected neutral means of {place}, found those of a checkpoint whose weights differ by "
                f"{sketch.distance(found):.1%}; name another file, which is then measured, or pass --force"
            )
        # A file without a sketch was not written by steer and is used as it is; older versions wrote no dtype.
        if force or not found.values.size or header.get("dtype") == dtype:
            return means
    with bar("neutral replies", None, "tokens") as advance:
        means = neutral_means(model or steered.load(place), on_tokens=advance)
    write_atomic(path, save({"neutral": means}, metadata={"sketch": sketch.to_header(), "dtype": dtype}))
    return means


def _read(path: Path) -> tuple[Float[Tensor, "blocks d"], dict[str, str]]:
    """(means, header) of a file."""
    try:
        with safe_open(str(path), framework="pt") as f:
            means: Tensor | None = f.get_tensor("neutral") if "neutral" in f.keys() else None  # noqa: SIM118
            header = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise SteerError(f"{path}: expected neutral means, found something unreadable ({e}); remove it") from e
    if means is None or means.ndim != 2:
        raise SteerError(f"{path}: expected neutral means [blocks, d], found none; remove it, or name another file")
    return means.float(), header
