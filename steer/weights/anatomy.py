"""The residual stream of one model: its blocks, its width, what writes into it. Declared, never guessed; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer.errors import CheckpointError, MismatchError, UnsupportedError, UsageError
from steer.weights.layouts import LAYOUTS, Layout
from steer.weights.writers import FLOATS, Found, Stored, Writer, find_writers

if TYPE_CHECKING:
    from steer.values.direction import Direction
    from steer.values.edit import Edit
    from steer.values.feature import Feature
    from steer.values.method import Kind

__all__ = ["FLOATS", "LAYOUTS", "Anatomy", "Found", "Layout", "LiveWriter", "Stored", "Writer"]


@dataclass(frozen=True)
class LiveWriter:
    """One live module that writes into the residual stream; its output may be a tuple, the tensor first."""

    kind: Kind
    block: int | None
    """None for the embedding."""
    module: str
    norm: str | None = None
    """The weight of the norm between it and the residual stream."""


@dataclass(frozen=True)
class Anatomy:
    """What a config declares. `find` looks the writers up in a checkpoint's files."""

    architecture: str
    layout: Layout
    blocks: int
    width: int
    vocab: int
    """Logits of the LM head."""
    experts: int
    """In each MLP that has any; 0 where none does."""
    biased: bool
    """Whether the MLPs have biases already."""
    tied: bool
    """Whether the LM head is the embedding."""
    logit_softcap: float | None
    """The bound of the logits, where the model has one."""
    rotary_limit: int | None
    """The position from which the rotary frequencies of a whole batch change with its longest text; None where they
    never do."""
    where: str
    """The model, as the user named it; for messages."""

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
        """Path of the live module that puts out the logits, before a softcap."""
        return self.layout.head_module

    @property
    def embedding_module(self) -> str:
        """Path of the live module that puts out what the embedding writes, positions included where they are added."""
        return self.layout.base + self.layout.embedding_output

    def block_module(self, block: int) -> str:
        """Path of a block in the live model; its output is the residual stream at site `block`."""
        return self.layout.base + self.layout.block.format(block)

    def has_block(self, block: int, names: Iterable[str]) -> bool:
        """Whether a checkpoint's files hold tensors of a block. `names`: of all its tensors."""
        path = f"{self.layout.block.format(block)}."
        starts = (self.layout.base + path, path) if self.layout.bare else (self.layout.base + path,)
        return any(name.startswith(starts) for name in names)

    @property
    def live_writers(self) -> tuple[LiveWriter, ...]:
        """The live modules where hooks do what a bake does to the weights, the embedding first. Where a norm stands
        between a module and the residual stream, both act before the norm: see `weights.ablation`."""
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

    def find(self, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Found:
        """Every writer in a checkpoint's files, each checked to be there and to hold an edit.

        Errors: UnsupportedError for quantised weights and for tensors this layout does not know,
        CheckpointError for tensors that are missing or of another shape.
        """
        return find_writers(self, config, tensors)

    def bias_carriers(self) -> tuple[str, ...]:
        """Paths of every module that must have a bias once one MLP writer has one.

        Errors: UnsupportedError when the architecture has no such biases.
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
        """Raise unless the edit fits: MismatchError on the width, UsageError on a site or block it lacks."""
        moved: list[Direction | Feature] = [*edit.ablate, *(d for d, _ in edit.add)]
        for m in edit.moves:
            moved += [m.target, m.when.gate.on] if m.when.gate else [m.target]
        for what in moved:
            kind = "feature" if hasattr(what, "dictionary") else "direction"
            what.check_width(self.width, self.where)
            if not 0 <= what.site < self.blocks:
                raise UsageError(
                    f"{kind} {what.name!r}: expected a site from 0 to {self.blocks - 1} "
                    f"for {self.where}, found {what.site}; find the {kind} on this checkpoint"
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
    """Where LongRoPE (Phi 3) and dynamic NTK scaling take other frequencies."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su", "dynamic"):
        return None
    key = "original_max_position_embeddings"
    return rope.get(key) or config.get(key) or config.get("max_position_embeddings")


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of the architecture that a config names; None for one that is not listed."""
    return LAYOUTS.get(_architecture(config))


def _architecture(config: Mapping[str, Any]) -> str:
    """The name under `architectures`, else what `model_type` stands for."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    model_type = config.get("model_type")
    return next((a for a, layout in LAYOUTS.items() if layout.model_type == model_type), str(model_type))
