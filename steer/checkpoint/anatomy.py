"""The residual stream of one model: its blocks, its width, and every tensor that writes into it.

`layouts` declares the names for some architectures; `proof` finds them for others, and proves what it found. Nothing is
guessed. `Anatomy.of` reads a config; `Anatomy.find` then finds and checks the writers among a checkpoint's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from steer.checkpoint.layouts import LAYOUTS, READERS, Addend, Part, Structure, architecture_of, pattern
from steer.checkpoint.quantised import FLOATS, quantisation, refusal
from steer.checkpoint.reader import TensorInfo
from steer.errors import CheckpointError, MismatchError, UnsupportedError, UsageError
from steer.files import one_line

if TYPE_CHECKING:
    from steer.core.direction import Direction
    from steer.core.edit import Edit
    from steer.core.feature import Feature
    from steer.core.method import Kind


@dataclass(frozen=True)
class LiveWriter:
    """A module of the live model that writes into the residual stream. Its output may be a tuple that begins with the
    tensor."""

    kind: Kind
    block: int | None
    """None for the embedding."""
    module: str
    norms: tuple[str, ...] = ()
    """Names of the weights of the norms between the module and the residual stream."""
    axis: int = 1
    """Axis of the module's weight that faces the residual stream, if the module is a matrix."""
    given: bool = False
    """Whether what the module is given is written, not what it puts out."""


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
    norms: tuple[str, ...] = ()
    """Names of the weights of the norms between the writer and the residual stream."""
    live: str = ""
    """Path of the live parameter that holds it, alone or with the other experts."""
    live_stack: bool = False
    """Whether that parameter holds all experts, `[experts, ...]`."""
    adaptable: bool = True
    """See `layouts.Part`."""


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
    """Tensors that transformers does not load into this architecture, such as layers that predict several tokens. They
    write nothing into the model's residual stream and are copied unchanged unless `mtp` holds them and is edited."""
    mtp: tuple[Writer, ...] = ()
    """The writers among them: those of layers for multi-token prediction that hold all writers of a block. Such a layer
    goes on from the last block, whose number they have; what begins its stream has none, as an embedding."""


@dataclass(frozen=True)
class Anatomy(Structure):
    """What a config declares of a model. `find` then locates the writers in a checkpoint's files."""

    rotary_limit: int | None
    """Position from which the rotary frequencies of a whole batch depend on its longest text; None if they never do."""
    where: str
    """The model, as the user named it, for messages."""

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Anatomy:
        """The anatomy that a config.json, or a live model's `config.to_dict()`, declares.

        Errors: UnsupportedError for an architecture that transformers does not have or whose anatomy cannot be proved,
        CheckpointError for a config without sizes.
        """
        architecture = architecture_of(config)
        layout = LAYOUTS.get(architecture)
        if layout is None:
            from steer.checkpoint import proof  # torch and transformers are not loaded for an architecture in the table

            return cls(**vars(proof.structure(config, where)), rotary_limit=_rotary_limit(config, where), where=where)

        def size(*keys: str) -> int:
            found = next((config[k] for k in keys if config.get(k) is not None), None)
            if type(found) is not int or found < 1:
                raise CheckpointError(
                    f"{where}: config.json: expected a positive number under {' or '.join(keys)}, "
                    f"found {found!r}; fetch the model again"
                )
            return found

        tied = config.get("tie_word_embeddings")
        return cls(
            architecture,
            layout,
            blocks=size("num_hidden_layers", "n_layer"),
            kinds=(),
            width=size("hidden_size", "n_embd"),
            vocab=size("vocab_size"),
            experts=size(*layout.experts_keys) if layout.experts_keys else 0,
            biased=layout.mlp_bias == "always" or bool(layout.mlp_bias and config.get(layout.mlp_bias)),
            tied=layout.tied if tied is None else bool(tied),
            logit_softcap=config.get("final_logit_softcapping"),
            logit_scale=1.0,
            rotary_limit=_rotary_limit(config, where),
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

    def block_module(self, block: int) -> str:
        """Path of a block in the live model. Its output is the residual stream at site `block`."""
        return self.layout.base + self.layout.block.format(block)

    def has_block(self, block: int, names: Iterable[str]) -> bool:
        """Whether any of `names`, all tensor names in a checkpoint's files, belongs to the block."""
        path = re.compile(rf"(?:.*\.)?{re.escape(self.layout.block.format(block))}\.")
        return any(path.match(name) for name in names)

    @property
    def embedding_modules(self) -> tuple[str, ...]:
        """Paths of the live modules whose outputs begin the residual stream: one that puts out their sum, or each."""
        output = self.layout.embedding_output
        names = self.layout.embeddings if output is None else (output,)
        return tuple(self.layout.base + name for name in names)

    @cached_property
    def live_writers(self) -> tuple[LiveWriter, ...]:
        """The live modules at which hooks do what a bake does to the weights, the embedding first. Where a norm lies
        between a module and the residual stream, both act before the norm: see `checkpoint.ablation`."""
        out = [LiveWriter("embedding", None, module) for module in self.embedding_modules]
        for block in range(self.blocks):
            path = self.block_module(block)
            out += [
                LiveWriter(
                    a.kind,
                    block,
                    f"{path}.{a.module}",
                    tuple(f"{path}.{norm}.weight" for norm in a.norms),
                    a.forms[-1][0].axis,
                    a.given,
                )
                for a in self.addends(block)
            ]
        return tuple(out)

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> WriterMap:
        """Every writer in a checkpoint's files; each is checked to exist and to have a dtype that can hold an edit.

        Errors: UnsupportedError for quantised weights, and for a tensor that the layout does not know, which might be a
        writer; CheckpointError for tensors that are missing or have another shape.
        """
        if kind := quantisation(config, tensors):
            raise refusal(self.where, kind.found)
        return _Search(self, tensors).found()

    def bias_carriers(self) -> tuple[str, ...]:
        """Paths of all modules that must have a bias once one MLP writer has one.

        Errors: UnsupportedError if the architecture has no such biases.
        """
        if self.layout.mlp_bias is None:
            why = (
                f"{self.architecture} has a norm between its MLPs and the residual stream, which no constant passes"
                if any(a.norms for a in self.layout.addends if a.kind == "mlp")
                else f"{self.architecture} has no biases in its MLPs"
            )
            raise UnsupportedError(
                f"{self.where}: {why}, so a checkpoint cannot carry an add; ablate instead, or add with a slider"
            )
        if self.layout.mlp_bias == "always":
            return ()
        linears = ("gate_proj", "up_proj", "down_proj")
        return tuple(f"{self.block_module(b)}.mlp.{linear}" for b in range(self.blocks) for linear in linears)

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


def _rotary_limit(config: Mapping[str, Any], where: str) -> int | None:
    """The position at which LongRoPE (Phi 3) and dynamic NTK scaling switch to other frequencies."""
    config = _object(config, "text_config", where) or config
    rope = _object(config, "rope_parameters", where) or _object(config, "rope_scaling", where)
    limits = []
    for part in rope_parts(rope):
        kind, most = part.get("rope_type") or part.get("type"), config.get("max_position_embeddings")
        if kind in ("longrope", "su"):
            key = "original_max_position_embeddings"
            limits.append(part.get(key) or config.get(key) or most)
        elif kind == "dynamic":
            limits.append(most)
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def rope_parts(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of rotary embeddings in a config: one set, or one per type of block, as in Gemma 3."""
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    return [rope] if {"rope_type", "type"} & rope.keys() or not nested else nested


def _object(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object within a config; an empty one where it is absent."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{where}: config.json: expected an object under {key}, found {one_line(repr(found))}; fetch it again"
        )
    return found


_MTP = re.compile(r"(?:model\.)?mtp(?:_\w+)?\..+")
"""Blocks that predict several tokens, which some checkpoints store beside the decoder's blocks."""


class _Search:
    """One search for the writers among a checkpoint's tensors."""

    def __init__(self, anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> None:
        self.anatomy, self.layout, self.tensors = anatomy, anatomy.layout, tensors
        self.base = self._base()

    def _base(self) -> str:
        """The prefix of the decoder's tensors: a known one, else the one that the files have before the writers of
        block 0. Some checkpoints leave out the name of the decoder, and wrappers put theirs before it."""
        first = [part.weight.format(0) for addend in self.anatomy.addends(0) for part in addend.parts]
        ends = tuple(f"{self.layout.block.format(0)}.{name}" for name in first)
        found = {name.removesuffix(end) for name in self.tensors for end in ends if name.endswith(end)}
        known = [base for base in (self.layout.base, *self.layout.bases) if base in found]
        return (known or [b for b in sorted(found) if not b or b.endswith(".")] or [self.layout.base])[0]

    def found(self) -> WriterMap:
        """All writers, after every check."""
        where, tied = self.anatomy.where, self.anatomy.tied
        embeddings = [f"{self.base}{e}.weight" for e in self.layout.embeddings]
        live = [f"{self.layout.base}{e}.weight" for e in self.layout.embeddings]
        writers = [Writer("embedding", None, n, axis=1, live=path) for n, path in zip(embeddings, live, strict=True)]
        for writer in writers:
            self._check_writer(writer)
        for block in range(self.anatomy.blocks):
            for writer in self._block(block):  # checked at once, because a config may claim any number of blocks
                self._check_writer(writer)
                writers.append(writer)
        heads = [f"{head}.weight" for head in self.layout.heads]
        head = next((h for h in heads if h in self.tensors), heads[0])
        known = {name for w in writers for name in (w.tensor, w.bias, *w.norms)} | {*heads}
        unloaded = tuple(name for name in self.tensors if not self._is_loaded(name, known))
        if not tied and head not in self.tensors:
            raise CheckpointError(
                f"{where}: expected tensor {head}, as the embedding is not tied, found none; fetch the model again"
            )
        if tied and head in self.tensors:
            found, wanted = (list(self.tensors[n].shape) for n in (head, embeddings[0]))
            if found != wanted:
                raise CheckpointError(
                    f"{where}: {head}: expected the shape {wanted} of the embedding, to which config.json ties "
                    f"it, found {found}; fetch the model again"
                )
        mtp = tuple(self._mtp(unloaded, self.tensors[embeddings[0]].shape))
        return WriterMap(tuple(writers), embeddings[0], head, self.base, unloaded, mtp)

    def _mtp(self, unloaded: Sequence[str], embedding: tuple[int, ...]) -> Iterator[Writer]:
        """The writers of the layers for multi-token prediction that hold what a block of some kind holds.

        `embedding`: shape of the model's embedding, of which such a layer may hold a copy.
        """
        writing = "|".join({re.escape(p.weight).replace(r"\{\}", r"\d+") for a in self.layout.addends for p in a.parts})
        weight = re.compile(rf"((?:.*\.)?\d+\.)({writing})")
        paths = dict.fromkeys(m[1] for name in unloaded if (m := weight.fullmatch(name)))
        layers = {path: self._mtp_layer(path, unloaded, weight) for path in paths}
        others = tuple(path for path, writers in layers.items() if not writers)
        for writers in layers.values():
            yield from writers
        if len(others) == len(layers):
            return
        known = {writer.tensor for writers in layers.values() for writer in writers}
        for name in unloaded:
            shape, begins = self.tensors[name].shape, self._begins_mtp(name)
            copied = shape == embedding and name.endswith(f".{self.layout.embeddings[0]}.weight")
            if name not in known and not name.startswith(others) and (begins or copied):
                yield Writer("embedding", None, name, int(copied), None if copied else f"{name[:-6]}bias")

    def _mtp_layer(self, path: str, unloaded: Sequence[str], weight: re.Pattern[str]) -> list[Writer]:
        """The writers of a layer for multi-token prediction; none if it is not like a block."""
        found: list[Writer] = []
        for addends in self.layout.blocks:
            try:
                writers = list(self._writers(path, path, self.anatomy.blocks - 1, addends))
                for writer in writers:
                    self._check_writer(writer)
            except (CheckpointError, UnsupportedError):  # it is no block of this kind
                continue
            found = max(found, writers, key=len)
        known = {writer.tensor for writer in found}
        for name in unloaded:
            if not name.startswith(path) or name in known or len(self.tensors[name].shape) < 2:
                continue
            vocab = self.tensors[name].shape[0] == self.anatomy.vocab  # a copy of the embedding or of the LM head
            known_name = vocab or self._begins_mtp(name) or self._reads(name.removeprefix(path))
            if weight.fullmatch(name) or not known_name:
                return []
        return found

    def _begins_mtp(self, name: str) -> bool:
        """Whether a tensor maps a token's embedding and the last block's output to the stream of a layer for
        multi-token prediction: a matrix from twice the residual width to the residual width that no block has."""
        tensor, width = self.tensors[name], self.anatomy.width
        shaped = name.endswith(".weight") and tensor.shape == (width, 2 * width) and tensor.dtype in FLOATS
        return shaped and not self._reads(re.split(r"\.\d+\.", name, maxsplit=1)[-1])

    def _reads(self, below: str) -> bool:
        """Whether a tensor with this name below a block is known to the architecture."""
        return bool(READERS.fullmatch(below)) or pattern(below) in self.layout.names

    def _block(self, block: int) -> Iterator[Writer]:
        """The writers of one block, in the form that the files hold."""
        path = f"{self.base}{self.layout.block.format(block)}."
        return self._writers(path, f"{self.anatomy.block_module(block)}.", block, self.anatomy.addends(block))

    def _writers(self, path: str, module: str, block: int, addends: Sequence[Addend]) -> Iterator[Writer]:
        """The writers of a block whose tensors have the prefix `path`, and whose live modules the prefix `module`."""

        def names(part: Part) -> list[str]:
            experts = range(self.anatomy.experts if "{}" in part.weight else 1)
            return [path + part.weight.format(expert) for expert in experts]

        for addend in addends:
            forms = [form for form in addend.forms if any(name in self.tensors for name in names(form[0]))]
            if len(forms) > 1:
                raise UnsupportedError(
                    f"{self.anatomy.where}: holds the MLP of block {block} twice, as {forms[0][0].weight} and as "
                    f"{forms[1][0].weight}; expected one of them, fetch the model again"
                )
            norms = tuple(f"{path}{norm}.weight" for norm in addend.stored_norms or addend.norms)
            for part in (forms or addend.forms)[0]:
                bias = part.bias and path + part.bias
                stack = part.stacked or ("{}" in part.weight and part.live is not None)
                for expert, name in enumerate(names(part)):
                    live = module + (part.live or part.weight).format(expert)
                    more = (norms, live, stack, part.adaptable)
                    yield Writer(addend.kind, block, name, part.axis, bias, part.stacked, *more)

    def _check_writer(self, writer: Writer) -> None:
        rank = 2 + writer.stacked
        self._check(writer.tensor, rank, writer.axis, writer.stacked)
        if writer.bias is not None and writer.bias in self.tensors:
            self._check(writer.bias, rank - 1, rank - 2, writer.stacked)
        for norm in writer.norms:
            self._check(norm, 1, 0, False)

    def _check(self, name: str, rank: int, axis: int, stacked: bool) -> None:
        where, width, experts = self.anatomy.where, self.anatomy.width, self.anatomy.experts
        if name not in self.tensors:
            raise CheckpointError(f"{where}: expected tensor {name}, found none; fetch the model again")
        stored = self.tensors[name]
        if stored.dtype not in FLOATS:
            raise refusal(where, f"{name} is stored as {stored.dtype}")
        if len(stored.shape) != rank or stored.shape[axis] != width or 0 in stored.shape:
            raise CheckpointError(
                f"{where}: {name}: expected axis {axis} to be the residual width {width}, "
                f"found shape {list(stored.shape)}; fetch the model again"
            )
        if stacked and stored.shape[0] != experts:
            raise CheckpointError(
                f"{where}: {name}: expected {experts} experts, found shape {list(stored.shape)}; fetch the model again"
            )

    def _is_loaded(self, name: str, known: set[str | None]) -> bool:
        """Whether transformers loads the tensor into this architecture. Raises UnsupportedError for a tensor that is
        neither a writer nor known to be something else."""
        block = re.escape(self.base + self.layout.block).replace(r"\{\}", r"(\d+)")
        inside = re.fullmatch(rf"{block}\.(.+)", name)
        if _MTP.fullmatch(name) or (inside and int(inside[1]) >= self.anatomy.blocks):
            return False
        shape = list(self.tensors[name].shape)
        if name in known or (inside and self._reads(inside[2])):
            return True
        # A vector cannot write vectors, and what lies outside the decoder is copied unchanged.
        below = pattern(name.removeprefix(self.base))
        if not inside and (len(shape) < 2 or not name.startswith(self.base) or below in self.layout.names):
            return True
        raise UnsupportedError(
            f"{self.anatomy.where}: tensor {name} {shape} is unknown in {self.anatomy.architecture} and might "
            "write into the residual stream; expected the tensors of the plain architecture"
        )
