"""A sketch: a small sample of a checkpoint's weights, which identifies the checkpoint that a direction belongs to.

Two machines that run the same merge differ in the last bit of some weights, so hashes of the bytes would differ;
samples compared with a tolerance do not. Directions and dictionaries store the sketch of their checkpoint, and
`library` compares it.
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

from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.quantised import dequantised, quantisation
from steer.checkpoint.reader import CheckpointFiles, DecodedTensor
from steer.errors import CheckpointError, MismatchError

_Readable = torch.Tensor | Any
"""A tensor, or a slice from safetensors, which has a shape and reads single rows."""
_TENSORS, _VALUES = 48, 32
TOLERANCE = 0.0015
"""Largest relative distance between two sketches of one checkpoint. If one weight in a hundred rounds the other way in
bf16, the distance is near 0.0005; for an fp32 checkpoint loaded in fp16 it is 0.001. Fine-tunes of one model differ by
0.002 (the default merge and its base) or more."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Values at evenly spaced places in evenly spaced tensors."""

    values: Float[np.ndarray, "tensors values"]
    """Weights rounded to bf16, so that the sketch does not depend on the dtype a checkpoint is loaded in; held in
    fp32."""

    @classmethod
    def of(cls, names: Sequence[str], read: Callable[[str], _Readable], config: Mapping[str, Any]) -> Sketch:
        """Sample a checkpoint. `read(name)` returns a tensor, or an object that reads rows of it.

        Errors: CheckpointError if none of the names exists in every form of this architecture.
        """
        projections = (n for n in names if n.endswith(("_proj.weight", "embed_tokens.weight")))
        # A tied head may be listed or not, a bake may add biases, and experts may be in one tensor, so only tensors
        # that every form of the checkpoint has are sampled.
        sampled = sorted(n for n in projections if ".experts." not in n) or _writers(names, config)
        if not sampled:
            raise CheckpointError(
                f"weights: expected names as {config.get('model_type', 'a listed architecture')} has them, found none "
                "to sample; fetch the model again"
            )
        picks = np.linspace(0, len(sampled) - 1, min(_TENSORS, len(sampled))).astype(int)
        return cls(torch.stack([_sample(read(sampled[i])) for i in picks]).numpy())

    @classmethod
    def from_header(cls, provenance: Mapping[str, Any]) -> Sketch:
        """The sketch in a direction's provenance; an empty one if there is none."""
        try:
            raw = bytearray(base64.b64decode(provenance.get("sketch", ""), validate=True))
        except (TypeError, ValueError):
            raw = bytearray()
        if len(raw) % (2 * _VALUES):  # an empty sketch matches no checkpoint
            raw = bytearray()
        values = torch.frombuffer(raw, dtype=torch.bfloat16).float().numpy() if raw else np.zeros(0, np.float32)
        return cls(values.reshape(-1, _VALUES))

    def to_header(self) -> str:
        """The sketch as base64, for a direction's provenance."""
        return base64.b64encode(self._bytes()).decode()

    @property
    def id(self) -> str:
        """A short id for folder names. Two machines may compute different ids for one merge."""
        return hashlib.sha256(self._bytes()).hexdigest()[:12]

    def distance(self, other: Sketch) -> float:
        """Relative distance, over tensors scaled to unit norm; infinite for sketches of different shapes."""
        if self.values.shape != other.values.shape or not self.values.size:
            return math.inf
        norm = np.maximum(np.linalg.norm(self.values, axis=1, keepdims=True), 1e-12)
        return float(np.linalg.norm((self.values - other.values) / norm) / len(norm) ** 0.5)

    def _bytes(self) -> bytes:
        return torch.from_numpy(self.values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()

    def same_as(self, other: Sketch) -> bool:
        """Whether both sketches are of the same checkpoint."""
        return self.distance(other) <= TOLERANCE

    def check(self, direction_name: str, provenance: Mapping[str, Any], where: str) -> None:
        """Raise MismatchError if a direction's provenance names another checkpoint than this one, which errors call
        `where`."""
        if "sketch" not in provenance:
            return
        found_on = Sketch.from_header(provenance)
        if not self.same_as(found_on):
            raise MismatchError(
                f"direction {direction_name!r} was found on {provenance.get('checkpoint', 'another checkpoint')}, "
                f"whose weights differ from {where} by {self.distance(found_on):.1%}; find it on {where}, or pass "
                "--force"
            )


def _writers(names: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Names of the weights that write into the residual stream, experts left out, according to the layout."""
    layout = Anatomy.of(config, "weights").layout
    weights = [p.weight for a in layout.addends for p in a.parts if not p.stacked and "{}" not in p.weight]
    ends = tuple(f".{w}" for w in (*weights, *(f"{e}.weight" for e in layout.embeddings)))
    return sorted(n for n in names if f".{n}".endswith(ends))


def _sample(tensor: _Readable) -> Float[torch.Tensor, " values"]:
    """Values at evenly spaced places in the flattened tensor; only their rows are read from a file."""
    shape = [int(n) for n in (tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())]
    if not shape or 0 in shape:
        raise CheckpointError(
            f"weights: expected rows of numbers, found a tensor of shape {shape}; fetch the model again"
        )
    at = torch.linspace(0, math.prod(shape) - 1, _VALUES, dtype=torch.float64).long().tolist()
    width = math.prod(shape[1:])
    return torch.stack([tensor[n // width].reshape(-1)[n % width].to(torch.bfloat16).float().cpu() for n in at])


def sketch_files(checkpoint: Path) -> Sketch:
    """The sketch of a checkpoint on disk. Reads a few rows of some tensors.

    Errors: CheckpointError if the files are not a readable checkpoint, or hold no weights to sample.
    """
    files = CheckpointFiles.open(checkpoint)
    kind = quantisation(files.config, files.tensors)
    if kind is not None and kind.block is not None:
        files = dequantised(files)  # a model is loaded with these weights, and directions are found on them

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
