"""Which tensors of a checkpoint write into its residual stream: every one found, or a refusal. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from steer.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from steer.values.method import Kind
    from steer.weights.anatomy import Anatomy
    from steer.weights.layouts import Part

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that can hold an edit."""
_MTP = re.compile(r"(?:model\.)?mtp(?:_\w+)?\..+")
"""Blocks for predicting several tokens, where they are stored beside the decoder's own."""
QUANTISED = re.compile(
    r".*(\.(weight|input|output|activation)_scales?|_proj_scales?|_scale_inv|_blocks|_packed|"
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..+))"
)
"""Names of what comes with quantised weights: fp8, MXFP4, GPTQ, AWQ, bitsandbytes. Not every scale is one: an
architecture may have a `logit_scale`."""


class Stored(Protocol):
    """What the checks need to know of a tensor; `stream.TensorInfo` is one."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Writer:
    """One stored weight whose output is added to the residual stream, and its bias where it has one."""

    kind: Kind
    block: int | None
    """None for the embedding."""
    tensor: str
    axis: int
    """The axis that faces the residual stream; see `layouts.Part`. 1 for an embedding `[vocab, d]`."""
    bias: str | None = None
    """`[d]`, or `[experts, d]`."""
    stacked: bool = False
    """Whether it is `[experts, ...]`."""
    norm: str | None = None
    """The weight of the norm between it and the residual stream."""


@dataclass(frozen=True)
class Found:
    """What an anatomy stands for in one checkpoint's files."""

    writers: tuple[Writer, ...]
    """Everything that writes into the residual stream: the embedding, then block by block."""
    embedding: str
    """The weight of the tokens' embedding."""
    head: str
    """The weight of the LM head; a tied checkpoint need not have it."""
    base: str
    """What the names of the decoder begin with in these files."""
    unloaded: tuple[str, ...] = ()
    """Tensors of other models in the same files, as blocks that predict several tokens: transformers does not load
    them into this architecture, so they write nothing here and pass through."""


def find_writers(anatomy: Anatomy, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Found:
    """Every writer of a checkpoint, each checked to be there and to hold an edit.

    Errors: UnsupportedError for quantised weights, and for a tensor this anatomy does not know, which might be a
    writer; CheckpointError for tensors that are missing or of another shape.
    """
    return _Search(anatomy, config, tensors).found()


class _Search:
    def __init__(self, anatomy: Anatomy, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        self.anatomy, self.layout, self.where = anatomy, anatomy.layout, anatomy.where
        self.config, self.tensors = config, tensors
        layout = self.layout
        bare = layout.bare and not any(name.startswith(layout.base) for name in tensors)
        self.base = "" if bare else layout.base

    def found(self) -> Found:
        for key in ("quantization_config", "compression_config"):
            if self.config.get(key):
                raise self._quantised(f"config.json has a {key}")
        for name in self.tensors:
            if QUANTISED.fullmatch(name) and self._inside(name):
                raise self._quantised(f"it has a tensor {name}")
        embeddings = [f"{self.base}{e}.weight" for e in self.layout.embeddings]
        writers = [Writer("embedding", None, name, axis=1) for name in embeddings]
        for writer in writers:
            self._check_writer(writer)
        for block in range(self.anatomy.blocks):
            for writer in self._block(block):  # checked one by one: a config may claim any number of blocks
                self._check_writer(writer)
                writers.append(writer)
        unloaded = self._check_rest({name for w in writers for name in (w.tensor, w.bias)})
        heads = [f"{head}.weight" for head in self.layout.heads]
        head = next((h for h in heads if h in self.tensors), heads[0])
        if not self.anatomy.tied and head not in self.tensors:
            raise CheckpointError(
                f"{self.where}: expected tensor {head}, as the embedding is not tied, found none; fetch the model again"
            )
        if self.anatomy.tied and head in self.tensors:
            found, wanted = (list(self.tensors[n].shape) for n in (head, embeddings[0]))
            if found != wanted:
                raise CheckpointError(
                    f"{self.where}: {head}: expected the shape {wanted} of the embedding, to which config.json ties "
                    f"it, found {found}; fetch the model again"
                )
        return Found(tuple(writers), embeddings[0], head, self.base, unloaded)

    def _block(self, block: int) -> Iterator[Writer]:
        layout, path = self.layout, f"{self.base}{self.layout.block.format(block)}."
        yield from self._writers(path, block, "attention", layout.attention, layout.attention_norm)
        forms = [f for f in layout.mlp if any(name in self.tensors for name in self._names(path, f[0]))]
        if len(forms) > 1:
            raise UnsupportedError(
                f"{self.where}: holds the MLP of block {block} twice, as {forms[0][0].weight} and as "
                f"{forms[1][0].weight}; expected one of them, fetch the model again"
            )
        for part in forms[0] if forms else layout.mlp[0]:
            yield from self._writers(path, block, "mlp", part, layout.mlp_norm)

    def _writers(self, path: str, block: int, kind: Kind, part: Part, norm: str | None) -> Iterator[Writer]:
        bias = None if part.bias is None else path + part.bias
        between = None if norm is None else f"{path}{norm}.weight"
        for name in self._names(path, part):
            yield Writer(kind, block, name, part.axis, bias, part.stacked, between)

    def _names(self, path: str, part: Part) -> Iterator[str]:
        for expert in range(self.anatomy.experts if "{}" in part.weight else 1):
            yield path + part.weight.format(expert)

    def _check_writer(self, writer: Writer) -> None:
        rank = 2 + writer.stacked
        self._check(writer.tensor, rank, writer.axis, writer.stacked)
        if writer.bias is not None and writer.bias in self.tensors:
            self._check(writer.bias, rank - 1, rank - 2, writer.stacked)
        if writer.norm is not None:
            self._check(writer.norm, 1, 0, False)

    def _check(self, name: str, rank: int, axis: int, stacked: bool) -> None:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: expected tensor {name}, found none; fetch the model again")
        stored, width, experts = self.tensors[name], self.anatomy.width, self.anatomy.experts
        if stored.dtype not in FLOATS:
            raise self._quantised(f"{name} is stored as {stored.dtype}")
        if len(stored.shape) != rank or stored.shape[axis] != width:
            raise CheckpointError(
                f"{self.where}: {name}: expected axis {axis} to be the residual width {width}, "
                f"found shape {list(stored.shape)}; fetch the model again"
            )
        if stacked and stored.shape[0] != experts:
            raise CheckpointError(
                f"{self.where}: {name}: expected {experts} experts, found shape {list(stored.shape)}; "
                "fetch the model again"
            )

    def _check_rest(self, writers: set[str | None]) -> tuple[str, ...]:
        """Raise for a tensor that is no writer found, and not known to be none; return those that are not loaded."""
        layout = self.layout
        norms = [n for n in (layout.attention_norm, layout.mlp_norm) if n]
        readers = _any_of([r + p for r in (*layout.readers, *norms) for p in ("", ".weight", ".bias")])
        outer = {f"{self.base}{e}.weight" for e in layout.embeddings}
        unloaded = []
        for name, stored in self.tensors.items():
            inside = self._inside(name)
            if (inside and int(inside[1]) >= self.anatomy.blocks) or _MTP.fullmatch(name):
                unloaded.append(name)
                continue
            if inside:
                rest = inside[2]
                if name in writers or rest in layout.constants or readers.fullmatch(rest):
                    continue
            elif not name.startswith(self.base) or name in outer or len(stored.shape) < 2:
                continue  # outside the decoder, or nothing that could write vectors: passes through
            elif not self.base and name in {f"{h}.weight" for h in layout.heads}:
                continue
            raise UnsupportedError(
                f"{self.where}: tensor {name} {list(stored.shape)} is unknown in {self.anatomy.architecture} and might "
                "write into the residual stream; expected the tensors of the plain architecture"
            )
        return tuple(unloaded)

    def _inside(self, name: str) -> re.Match[str] | None:
        """(block, name below it) of a tensor in a block."""
        pattern = re.escape(self.base + self.layout.block).replace(r"\{\}", r"(\d+)") + r"\.(.+)"
        return re.fullmatch(pattern, name)

    def _quantised(self, found: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.where}: expected weights in bf16, fp16, fp32 or fp64, found quantised ones ({found}); "
            "rounding would undo most of the edit, bake the original weights and quantise the result"
        )


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """What matches any of the names, `{}` in them standing for a number."""
    return re.compile("|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in names))
