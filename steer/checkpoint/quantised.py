"""Quantised checkpoints: fp8 weights with one scale per block are read as bf16; every other kind is refused.

Rounding an edited weight to few bits again would undo most of the edit, so the dequantised weights are edited. A block
of fp8 and its scale stand for `weight * weight_scale_inv`, whichever program made them; four-bit kinds each have their
own packing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from steer.checkpoint.reader import Buffer, CheckpointFiles, DecodedTensor, TensorInfo
from steer.errors import CheckpointError, UnsupportedError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that can hold an edit."""
_SUFFIX = "_scale_inv"
"""Suffix that turns the name of an fp8 weight into the name of its scales."""
_FP8, _SCALES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
_KEYS = ("quantization_config", "compression_config")
_NAMES = re.compile(
    r".*(\.(weight|input|output|activation)_scales?|_proj_scales?|_scale_inv|_blocks|_packed|"
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..+))"
)
"""Names of the tensors that come with quantised weights: fp8, MXFP4, GPTQ, AWQ, bitsandbytes. Not every name with
`scale` is one of them: an architecture may have a `logit_scale`."""


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint is quantised."""

    found: str
    """What shows that the checkpoint is quantised, for messages."""
    block: tuple[int, int] | None = None
    """Rows and columns of a weight that share a scale, for fp8 weights that can be read; else None."""


def refusal(where: str, found: str) -> UnsupportedError:
    """The error for weights that cannot be read, with what shows that they are quantised."""
    return UnsupportedError(
        f"{where}: expected weights in bf16, fp16, fp32 or fp64, or fp8 with a scale a block, found quantised ones "
        f"({found}); rounding again would undo most of the edit: bake the original weights and quantise the "
        "result, or put an adapter for the original weights on this checkpoint"
    )


def quantisation(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    """How a checkpoint is quantised, according to its config.json or else its tensors; None if it is not."""
    for key in _KEYS:
        if entry := config.get(key):
            method = str(entry.get("quant_method", "of no name")) if isinstance(entry, dict) else str(entry)
            block = _block(entry.get("weight_block_size")) if method == "fp8" else None
            without = ", without weight_block_size" if method == "fp8" and block is None else ""
            return Quantisation(f"config.json has a {key}, quant_method {method}{without}", block)
    for name, stored in tensors.items():
        if _NAMES.fullmatch(name):
            return Quantisation(f"it has a tensor {name}")
        if name.endswith(".weight") and stored.dtype not in FLOATS:
            return Quantisation(f"{name} is stored as {stored.dtype}")
    return None


def undeclared(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """What shows that weights are quantised though config.json does not say so, in which case transformers would take
    the stored numbers for weights and leave out their scales; None if nothing does.

    Weights in fp8 without scales are numbers as they stand.
    """
    text = config.get("text_config")
    if any(part.get(key) for part in (config, text) if isinstance(part, Mapping) for key in _KEYS):
        return None
    kind = quantisation({}, {name: t for name, t in tensors.items() if not t.dtype.startswith("F8")})
    return None if kind is None else kind.found


def dequantised(files: CheckpointFiles) -> CheckpointFiles:
    """The same checkpoint, with fp8 weights read as bf16 tensors and without their scales; config and index go along.
    A checkpoint that is not quantised is returned unchanged.

    Errors: UnsupportedError for every other kind of quantisation, CheckpointError for scales that are missing or do not
    fit.
    """
    kind = quantisation(files.config, files.tensors)
    if kind is None:
        return files
    if kind.block is None:
        raise refusal(str(files.root), kind.found)
    scaled = {name for name, t in files.tensors.items() if t.dtype == _FP8}
    scales = {name + _SUFFIX for name in scaled}
    for name, t in files.tensors.items():
        if name.endswith(".weight") and t.dtype not in (*FLOATS, _FP8):
            raise refusal(str(files.root), f"{name} is stored as {t.dtype}")
    shards = []
    for shard in files.shards:
        weights = (t for t in shard.tensors if t.name not in scales)
        tensors = tuple(_decoded(files, t, kind.block) if t.name in scaled else t for t in weights)
        shards.append(replace(shard, tensors=tensors))
    plain = replace(
        files,
        config={k: v for k, v in files.config.items() if k not in _KEYS},
        shards=tuple(shards),
        decoded={k: None for k in _KEYS if k in files.config},
    )
    return plain if files.index is None else replace(plain, index=_index(files.index, plain))


def _block(size: object) -> tuple[int, int] | None:
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _decoded(files: CheckpointFiles, t: TensorInfo, block: tuple[int, int]) -> DecodedTensor:
    scale = files.tensors.get(t.name + _SUFFIX)
    grid = (*t.shape[:-2], *(-(-n // b) for n, b in zip(t.shape[-2:], block, strict=False)))
    if scale is None or scale.dtype not in _SCALES or scale.shape != grid:
        found = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise CheckpointError(
            f"{files.root / t.file}: expected scales of {t.name} {list(t.shape)} in blocks of {block[0]} x {block[1]}, "
            f"{list(grid)} floats, found {found}; fetch the model again"
        )
    decode = partial(_decode, files, t, scale, block)
    return DecodedTensor(t.name, "BF16", t.shape, t.file, t.start, t, decode)


def _decode(
    files: CheckpointFiles, stored: TensorInfo, scale: TensorInfo, block: tuple[int, int], data: Buffer, out: Buffer
) -> None:
    """Convert fp8 bytes to bf16 in `out`: each block is multiplied by its scale in fp32 and rounded once."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}
    scales = torch.frombuffer(files.read(scale), dtype=dtypes[scale.dtype]).float()
    narrow = torch.frombuffer(data, dtype=torch.float8_e4m3fn).view(-1, *stored.shape[-2:])
    wide = torch.frombuffer(out, dtype=torch.bfloat16).view(narrow.shape)
    rows, columns = block
    for matrix, of_matrix, result in zip(narrow, scales.view(-1, *scale.shape[-2:]), wide, strict=True):
        for n, row in enumerate(of_matrix.repeat_interleave(columns, dim=1)[:, : stored.shape[-1]]):
            at = slice(n * rows, (n + 1) * rows)
            result[at] = matrix[at].float().mul_(row)


def _index(index: Mapping[str, Any], plain: CheckpointFiles) -> dict[str, Any]:
    """The index without the scales, with totals for the decoded tensors."""
    tensors = plain.tensors.values()
    totals = {
        "total_size": sum(t.nbytes for t in tensors),
        "total_parameters": sum(math.prod(t.shape) for t in tensors),
    }
    counts = {key: totals.get(key, value) for key, value in (index.get("metadata") or {}).items()}
    weight_map = {name: file for name, file in index["weight_map"].items() if name in plain.tensors}
    return {**index, "metadata": counts, "weight_map": weight_map}
