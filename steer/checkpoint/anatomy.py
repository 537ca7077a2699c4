"""The residual stream of one model: its blocks, its width, and every tensor that writes into it.

`layouts` declares the names for each architecture, and nothing is guessed. `Anatomy.of` reads a config; `find_writers`
then finds and checks the writers among a checkpoint's tensors. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from steer.checkpoint.layouts import LAYOUTS, Layout
from steer.errors import CheckpointError, MismatchError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from steer.checkpoint.layouts import Part
    from steer.core.direction import Direction
    from steer.core.edit import Edit
    from steer.core.feature import Feature
    from steer.core.method import Kind

__all__ = ["FLOATS", "LAYOUTS", "Anatomy", "Layout", "LiveWriter", "Stored", "Writer", "WriterMap"]


@dataclass(frozen=True)
class LiveWriter:
    """A module of the live model that writes into the residual stream. Its output may be a tuple that begins with the
    tensor."""

    kind: Kind
    block: int | None
    """None for the embedding."""
    module: str
    norm: str | None = None
    """Name of the weight of the norm between the module and the residual stream; None without one."""


@dataclass(frozen=True)
class Anatomy:
    """What a config declares of a model. `find` then locates the writers in a checkpoint's files."""

    architecture: str
    layout: Layout
    blocks: int
    width: int
    vocab: int
    """Number of logits of the LM head."""
    experts: int
    """Number of experts in each MLP that has any; 0 if none has."""
    biased: bool
    """Whether the MLPs have biases already."""
    tied: bool
    """Whether LM head and embedding are the same tensor."""
    logit_softcap: float | None
    """Bound on the logits; None without one."""
    rotary_limit: int | None
    """Position from which the rotary frequencies of a whole batch depend on its longest text; None if they never do."""
    where: str
    """The model, as the user named it, for messages."""

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Anatomy:
        """The anatomy that a config.json, or a live model's `config.to_dict()`, declares.

        Errors: UnsupportedError for an unknown architecture, CheckpointError for a config without sizes.
        """
        architecture = _architecture(config)
        if architecture not in LAYOUTS:
            raise UnsupportedError(
                f"{where}: architecture {architecture} is unknown, expected one of {', '.join(LAYOUTS)}; "
                "its writers would have to be guessed"
            )
        layout = LAYOUTS[architecture]

        def size(*keys: str) -> int:
            found = next((config[k] for k in keys if config.get(k) is not None), None)
            if type(found) is not int or found < 1:
                raise CheckpointError(
                    f"{where}: config.json: expected a positive number under {' or '.join(keys)}, "
                    f"found {found!r}; fetch the model again"
                )
            return found

        tied = config.get("tie_word_embeddings")
        softcap = config.get(layout.softcap_key) if layout.softcap_key else None
        return cls(
            architecture,
            layout,
            blocks=size(layout.blocks_key),
            width=size(layout.width_key),
            vocab=size("vocab_size"),
            experts=size(*layout.experts_keys) if layout.experts_keys else 0,
            biased=layout.mlp_bias == "always" or bool(layout.mlp_bias and config.get(layout.mlp_bias)),
            tied=layout.tied if tied is None else bool(tied),
            logit_softcap=softcap,
            rotary_limit=_rotary_limit(config),
            where=where,
        )

    @property
    def decoder_module(self) -> str:
        """Path of the live module that holds the blocks and the final norm."""
        return self.layout.base.removesuffix(".")

    @property
    def final_norm_module(self) -> str:
        """Path of the live norm between the last block and the LM head."""
        return self.layout.base + self.layout.final_norm

    @property
    def head_module(self) -> str:
        """Path of the live module that computes the logits, before a softcap."""
        return self.layout.head_module

    @property
    def embedding_module(self) -> str:
        """Path of the live module whose output is what the embedding writes, with positions where these are added."""
        return self.layout.base + self.layout.embedding_output

    def block_module(self, block: int) -> str:
        """Path of a block in the live model. Its output is the residual stream at site `block`."""
        return self.layout.base + self.layout.block.format(block)

    def has_block(self, block: int, names: Iterable[str]) -> bool:
        """Whether any of `names`, all tensor names in a checkpoint's files, belongs to the block."""
        path = f"{self.layout.block.format(block)}."
        starts = (self.layout.base + path, path) if self.layout.bare else (self.layout.base + path,)
        return any(name.startswith(starts) for name in names)

    @property
    def live_writers(self) -> tuple[LiveWriter, ...]:
        """The live modules at which hooks do what a bake does to the weights, the embedding first. Where a norm lies
        between a module and the residual stream, both act before the norm: see `checkpoint.ablation`."""
        layout = self.layout
        kinds: tuple[tuple[Kind, str, str | None], ...] = (
            ("attention", layout.attention_module, layout.attention_norm),
            ("mlp", layout.mlp_module, layout.mlp_norm),
        )
        out = [LiveWriter("embedding", None, self.embedding_module)]
        for block in range(self.blocks):
            path = self.block_module(block)
            out += [LiveWriter(k, block, f"{path}.{m}", norm and f"{path}.{norm}.weight") for k, m, norm in kinds]
        return tuple(out)

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> WriterMap:
        """Every writer in a checkpoint's files; each is checked to exist and to have a dtype that can hold an edit.

        Errors: UnsupportedError for quantised weights and for tensors that the layout does not know, CheckpointError
        for tensors that are missing or have another shape.
        """
        return find_writers(self, config, tensors)

    def bias_carriers(self) -> tuple[str, ...]:
        """Paths of all modules that must have a bias once one MLP writer has one.

        Errors: UnsupportedError if the architecture has no such biases.
        """
        if self.layout.mlp_bias is None:
            why = (
                f"{self.architecture} has a norm between its MLPs and the residual stream, which no constant passes"
                if self.layout.mlp_norm
                else f"{self.architecture} has no biases in its MLPs"
            )
            raise UnsupportedError(
                f"{self.where}: {why}, so a checkpoint cannot carry an add; ablate instead, or add with a slider"
            )
        if self.layout.mlp_bias == "always":
            return ()
        return tuple(f"{self.block_module(b)}.{m}" for b in range(self.blocks) for m in self.layout.bias_modules)

    def check_edit(self, edit: Edit) -> None:
        """Raise if the edit does not fit the model: MismatchError on the width, UsageError on a site or block that it
        lacks."""
        moved: list[Direction | Feature] = []
        for m in edit.moves:
            moved += [m.target, m.when.gate.on] if m.when.gate else [m.target]
        for target in moved:
            kind = "feature" if hasattr(target, "dictionary") else "direction"
            target.check_width(self.width, self.where)
            if not 0 <= target.site < self.blocks:
                raise UsageError(
                    f"{kind} {target.name!r}: expected a site from 0 to {self.blocks - 1} "
                    f"for {self.where}, found {target.site}; find the {kind} on this checkpoint"
                )
        if edit.blocks is not None and edit.blocks[1] >= self.blocks:
            raise UsageError(
                f"blocks: expected FIRST-LAST within 0-{self.blocks - 1} for {self.where}, "
                f"found {edit.blocks[0]}-{edit.blocks[1]}"
            )
        neutral = edit.method.neutral
        if neutral is not None and tuple(neutral.shape) != (self.blocks, self.width):
            raise MismatchError(
                f"method {edit.method.projection}: expected neutral means of {self.where}, {self.blocks} blocks of "
                f"width {self.width}, found {list(neutral.shape)}; measure them on this checkpoint"
            )
        if edit.ablate and not edit.embedding and not any(edit.edits_block(b) for b in range(self.blocks)):
            raise UsageError(
                f"strengths: expected one above 0 in the {self.blocks} blocks of {self.where}, found 0 in all; "
                "move the peak of the kernel"
            )


def _rotary_limit(config: Mapping[str, Any]) -> int | None:
    """The position at which LongRoPE (Phi 3) and dynamic NTK scaling switch to other frequencies."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su", "dynamic"):
        return None
    key = "original_max_position_embeddings"
    return rope.get(key) or config.get(key) or config.get("max_position_embeddings")


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of the architecture that a config names; None if it is not in `LAYOUTS`."""
    return LAYOUTS.get(_architecture(config))


def _architecture(config: Mapping[str, Any]) -> str:
    """The name under `architectures`, else the architecture of the config's `model_type`."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    model_type = config.get("model_type")
    return next((a for a, layout in LAYOUTS.items() if layout.model_type == model_type), str(model_type))


FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that can hold an edit."""
_MTP = re.compile(r"(?:model\.)?mtp(?:_\w+)?\..+")
"""Blocks that predict several tokens, which some checkpoints store beside the decoder's blocks."""
QUANTISED = re.compile(
    r".*(\.(weight|input|output|activation)_scales?|_proj_scales?|_scale_inv|_blocks|_packed|"
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..+))"
)
"""Names of the tensors that come with quantised weights: fp8, MXFP4, GPTQ, AWQ, bitsandbytes. Not every name with
`scale` is one of them: an architecture may have a `logit_scale`."""


class Stored(Protocol):
    """The facts about a tensor that the checks need; `reader.TensorInfo` provides them."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Writer:
    """One stored weight whose output is added to the residual stream, with its bias if it has one."""

    kind: Kind
    block: int | None
    """None for the embedding."""
    tensor: str
    axis: int
    """Axis of the weight that faces the residual stream; see `layouts.Part`. 1 for an embedding `[vocab, d]`."""
    bias: str | None = None
    """Name of the bias, `[d]` or `[experts, d]`; the checkpoint need not have it."""
    stacked: bool = False
    """Whether the tensor holds all experts, `[experts, ...]`."""
    norm: str | None = None
    """Name of the weight of the norm between the writer and the residual stream; None without one."""


@dataclass(frozen=True)
class WriterMap:
    """The writers of a model, by the tensor names in one checkpoint's files."""

    writers: tuple[Writer, ...]
    """All writers of the residual stream: the embedding, then block by block."""
    embedding: str
    """Name of the weight of the token embedding."""
    head: str
    """Name of the weight of the LM head; a tied checkpoint may lack it."""
    base: str
    """Prefix of the decoder's tensor names in these files."""
    unloaded: tuple[str, ...] = ()
    """Tensors that transformers does not load into this architecture, such as blocks that predict several tokens. They
    write nothing into the residual stream and are copied unchanged."""


def find_writers(anatomy: Anatomy, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> WriterMap:
    """Every writer of a checkpoint; each is checked to exist and to have a dtype that can hold an edit.

    Errors: UnsupportedError for quantised weights, and for a tensor unknown to this anatomy, which might be a writer;
    CheckpointError for tensors that are missing or have another shape.
    """
    return _Search(anatomy, config, tensors).found()


class _Search:
    """One search for the writers among a checkpoint's tensors."""

    def __init__(self, anatomy: Anatomy, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        self.anatomy, self.layout, self.where = anatomy, anatomy.layout, anatomy.where
        self.config, self.tensors = config, tensors
        layout = self.layout
        bare = layout.bare and not any(name.startswith(layout.base) for name in tensors)
        self.base = "" if bare else layout.base

    def found(self) -> WriterMap:
        """All writers, after every check."""
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
            for writer in self._block(block):  # checked at once, because a config may claim any number of blocks
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
        return WriterMap(tuple(writers), embeddings[0], head, self.base, unloaded)

    def _block(self, block: int) -> Iterator[Writer]:
        """The writers of one block: the attention's, then the MLP's in the form that the files hold."""
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
        """Raise for a tensor that is neither a writer nor known to be something else. Returns the tensors that
        transformers does not load."""
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
                continue  # outside the decoder, or a vector, which cannot write vectors: it is copied unchanged
            elif not self.base and name in {f"{h}.weight" for h in layout.heads}:
                continue
            raise UnsupportedError(
                f"{self.where}: tensor {name} {list(stored.shape)} is unknown in {self.anatomy.architecture} and might "
                "write into the residual stream; expected the tensors of the plain architecture"
            )
        return tuple(unloaded)

    def _inside(self, name: str) -> re.Match[str] | None:
        """A match with the groups (block, name below the block) for a tensor in a block, else None."""
        pattern = re.escape(self.base + self.layout.block).replace(r"\{\}", r"(\d+)") + r"\.(.+)"
        return re.fullmatch(pattern, name)

    def _quantised(self, found: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.where}: expected weights in bf16, fp16, fp32 or fp64, found quantised ones ({found}); "
            "rounding would undo most of the edit, bake the original weights and quantise the result"
        )


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of the names; `{}` in a name stands for a number."""
    return re.compile("|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in names))
