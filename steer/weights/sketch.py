"""A small sample of a checkpoint's weights, by which a direction knows where it belongs.

Two machines that run the same merge differ in the last bit of some weights, so a hash of the bytes would
part what belongs together; a sample compared with a tolerance does not.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open

from steer.errors import CheckpointError, MismatchError
from steer.weights.anatomy import layout_of
from steer.weights.quantised import dequantised, quantisation
from steer.weights.stream import CheckpointFiles, DecodedTensor

_Readable = torch.Tensor | Any
"""A tensor, or a slice as safetensors reads it: it tells its shape, and reads a row."""
_TENSORS, _VALUES = 48, 32
TOLERANCE = 0.0015
"""Relative distance up to which two sketches are of one checkpoint. Where one weight in a hundred rounds the other
way in bf16, the distance is near 0.0005, and an fp32 checkpoint loaded in fp16 is at 0.001; tunes of one model differ
by 0.002 (the default merge and its base) and more."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Values from evenly spaced places of evenly spaced tensors."""

    values: Float[np.ndarray, "tensors values"]
    """Weights rounded to bf16, so that a checkpoint has one sketch whatever dtype it is loaded in; held in fp32."""
    older: Float[np.ndarray, "tensors values"] | None = None
    """The same by the rule before, which took experts too: what it was saved with is still recognised."""

    @classmethod
    def of(cls, names: Sequence[str], read: Callable[[str], _Readable], config: Mapping[str, Any]) -> Sketch:
        """Sample a checkpoint. `read` returns the tensor of a name, or what reads a row of it.

        Errors: CheckpointError when none of the names is one that every form of this architecture has.
        """
        before = sorted(n for n in names if n.endswith("_proj.weight") or n.endswith("embed_tokens.weight"))
        # A tied head may or may not be listed, a bake may add biases, experts may stand in one tensor: only what every
        # form has is sampled.
        taken = [n for n in before if ".experts." not in n] or _writers(names, config)
        if not taken:
            raise CheckpointError(
                f"weights: expected names as {config.get('model_type', 'a listed architecture')} has them, found none "
                "to sample; fetch the model again"
            )
        return cls(_rows(taken, read), _rows(before, read) if before and before != taken else None)

    @classmethod
    def from_header(cls, provenance: Mapping[str, Any]) -> Sketch:
        """The sketch in a direction's provenance; an empty one where there is none."""
        try:
            raw = bytearray(base64.b64decode(provenance.get("sketch", ""), validate=True))
        except (TypeError, ValueError):
            raw = bytearray()
        if len(raw) % (2 * _VALUES):  # of no sketch: it is of no checkpoint
            raw = bytearray()
        values = torch.frombuffer(raw, dtype=torch.bfloat16).float().numpy() if raw else np.zeros(0, np.float32)
        return cls(values.reshape(-1, _VALUES))

    def to_header(self) -> str:
        """For a direction's provenance."""
        return base64.b64encode(self._bytes()).decode()

    @property
    def id(self) -> str:
        """A short name for folders; two machines may give one merge two ids."""
        return hashlib.sha256(self._bytes()).hexdigest()[:12]

    def distance(self, other: Sketch) -> float:
        """Relative distance over tensors of unit norm, infinite for checkpoints of different shapes."""
        ours, theirs = [self.values, self.older], [other.values, other.older]
        pairs = [(a, b) for a in ours for b in theirs if a is not None and b is not None]
        return min((_distance(a, b) for a, b in pairs if a.shape == b.shape and a.size), default=math.inf)

    def _bytes(self) -> bytes:
        return torch.from_numpy(self.values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()

    def same_as(self, other: Sketch) -> bool:
        """Whether both are of one checkpoint."""
        return self.distance(other) <= TOLERANCE

    def check(self, direction_name: str, provenance: Mapping[str, Any], where: str) -> None:
        """Raise MismatchError when a direction says that it was found on another checkpoint."""
        if "sketch" not in provenance:
            return
        theirs = Sketch.from_header(provenance)
        if not self.same_as(theirs):
            raise MismatchError(
                f"direction {direction_name!r} was found on {provenance.get('checkpoint', 'another checkpoint')}, "
                f"whose weights differ from {where} by {self.distance(theirs):.1%}; find it on {where}, or pass "
                "--force"
            )


def _writers(names: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The weights that write into the residual stream, outside of experts, under the names that the layout gives."""
    layout = layout_of(config)
    parts = [] if layout is None else [layout.attention, *(part for form in layout.mlp for part in form)]
    weights = {p.weight for p in parts if not p.stacked and "{}" not in p.weight}
    weights |= set() if layout is None else {f"{e}.weight" for e in layout.embeddings}
    return sorted(n for n in names if any(n == w or n.endswith(f".{w}") for w in weights))


def _rows(names: Sequence[str], read: Callable[[str], _Readable]) -> Float[np.ndarray, "tensors values"]:
    """A row of values of each of at most `_TENSORS` tensors, evenly spaced among these."""
    picks = [names[int(i)] for i in np.linspace(0, len(names) - 1, min(_TENSORS, len(names)))]
    return torch.stack([_sample(read(name)) for name in picks]).numpy()


def _distance(ours: Float[np.ndarray, "tensors values"], theirs: Float[np.ndarray, "tensors values"]) -> float:
    norm = np.maximum(np.linalg.norm(ours, axis=1, keepdims=True), 1e-12)
    return float(np.linalg.norm((ours - theirs) / norm) / len(norm) ** 0.5)


def _sample(tensor: _Readable) -> Float[torch.Tensor, " values"]:
    """Values from evenly spaced places, whatever the shape: of files no more than their rows is read."""
    shape = [int(n) for n in (tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())]
    at = torch.linspace(0, math.prod(shape) - 1, _VALUES, dtype=torch.float64).long().tolist()
    width = math.prod(shape[1:])
    return torch.stack([tensor[n // width].reshape(-1)[n % width].to(torch.bfloat16).float().cpu() for n in at])


def sketch_files(checkpoint: Path) -> Sketch:
    """The sketch of a checkpoint on disk, reading a few rows of some tensors.

    Errors: CheckpointError when the files are not a readable checkpoint, or hold no weights to sample.
    """
    files = CheckpointFiles.open(checkpoint)
    kind = quantisation(files.config, files.tensors)
    if kind is not None and kind.block is not None:
        files = dequantised(files)  # as it is loaded: a direction found on it knows these weights

    with ExitStack() as opened:
        shards: dict[str, Any] = {}

        def read(name: str) -> _Readable:
            info = files.tensors[name]
            if isinstance(info, DecodedTensor):
                return torch.frombuffer(files.read(info), dtype=torch.bfloat16).reshape(info.shape)
            if info.file not in shards:
                shards[info.file] = opened.enter_context(safe_open(str(checkpoint / info.file), framework="pt"))
            return shards[info.file].get_slice(name)

        return Sketch.of(list(files.tensors), read, files.config)
