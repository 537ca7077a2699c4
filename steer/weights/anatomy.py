"""What each architecture writes into the residual stream, declared and never guessed. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from steer.errors import CheckpointError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from steer.values.direction import Direction
    from steer.values.edit import Edit
    from steer.values.feature import Feature

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that can hold an edit."""


class Stored(Protocol):
    """What the checks need to know of a tensor; `stream.TensorInfo` is one."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Writer:
    """One module whose output is added to the residual stream."""

    kind: Literal["embedding", "attention", "mlp"]
    block: int | None
    """None for the embedding."""
    module: str
    """Its path in the live model."""
    axis: int
    """The axis of the weight that faces the residual stream: 0 for a Linear `[out, in]`, 1 for an embedding
    `[vocab, d]`."""

    @property
    def tensor(self) -> str:
        """Name of its weight."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name of its bias, which few checkpoints have."""
        return f"{self.module}.bias"


@dataclass(frozen=True)
class Layout:
    """The names that an architecture gives to its parts."""

    model_type: str
    block: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    readers: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
    """The modules of a block that write nothing into the residual stream. The two norms stand before the
    attention and the MLP: none stands between a writer and the residual stream."""
    bias_key: str | None = None
    """The config key that gives every MLP of the model biases, if the architecture has one."""
    bias_modules: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    """The modules of a block that `bias_key` gives a bias."""
    blocks_key: str = "num_hidden_layers"
    width_key: str = "hidden_size"


LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": Layout("llama", bias_key="mlp_bias"),
    "MistralForCausalLM": Layout("mistral"),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3", readers=(*Layout.readers, "self_attn.q_norm", "self_attn.k_norm")),
}
"""By the name that config.json has under `architectures`."""


@dataclass(frozen=True)
class Anatomy:
    """The residual stream of one model: its blocks, its width, and everything that writes into it."""

    architecture: str
    layout: Layout
    blocks: int
    width: int
    biased: bool
    """Whether the MLPs have biases already."""
    tied: bool
    """Whether the LM head is the embedding."""
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
        for key in (layout.blocks_key, layout.width_key):
            if type(config.get(key)) is not int or config[key] < 1:
                raise CheckpointError(
                    f"{where}: config.json: expected a positive number under {key}, "
                    f"found {config.get(key)!r}; fetch the model again"
                )
        return cls(
            architecture,
            layout,
            blocks=config[layout.blocks_key],
            width=config[layout.width_key],
            biased=bool(layout.bias_key and config.get(layout.bias_key)),
            tied=bool(config.get("tie_word_embeddings", False)),
            where=where,
        )

    @property
    def embedding_module(self) -> str:
        """Path of the embedding in the live model."""
        return self.layout.embedding

    @property
    def head(self) -> str:
        """Name of the LM head's weight. A tied checkpoint need not have it."""
        return f"{self.layout.head}.weight"

    def block_module(self, block: int) -> str:
        """Path of a block in the live model; its output is the residual stream at site `block`."""
        return self.layout.block.format(block)

    def writer_modules(self, block: int) -> tuple[str, str]:
        """Paths of a block's attention writer and MLP writer in the live model."""
        return (
            f"{self.block_module(block)}.{self.layout.attention}",
            f"{self.block_module(block)}.{self.layout.mlp}",
        )

    @property
    def writers(self) -> tuple[Writer, ...]:
        """Everything that writes into the residual stream: the embedding, then block by block."""
        out = [Writer("embedding", None, self.embedding_module, axis=1)]
        for block in range(self.blocks):
            attention, mlp = self.writer_modules(block)
            out += [Writer("attention", block, attention, axis=0), Writer("mlp", block, mlp, axis=0)]
        return tuple(out)

    def bias_carriers(self) -> tuple[str, ...]:
        """Paths of every module that must have a bias once one MLP writer has one.

        Errors: UnsupportedError when the architecture has no such biases.
        """
        if self.layout.bias_key is None:
            raise UnsupportedError(
                f"{self.where}: {self.architecture} has no biases in its MLPs, so a checkpoint cannot carry "
                "an add; ablate instead, or add with a slider"
            )
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

    def check_weights(self, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        """Raise unless every writer is there and can be edited, and no other tensor might be one.

        Errors: UnsupportedError for quantised weights and for tensors this layout does not know,
        CheckpointError for tensors that are missing or of another shape.
        """
        if config.get("quantization_config") or config.get("compression_config"):
            raise self._quantised("config.json has a quantization_config")
        for name, stored in tensors.items():
            self._check_known(name, stored)
        for writer in self.writers:
            self._check_writer(writer, tensors)
        if not self.tied and self.head not in tensors:
            raise CheckpointError(
                f"{self.where}: expected tensor {self.head}, as the embedding is not tied, found none; "
                "fetch the model again"
            )

    def _check_writer(self, writer: Writer, tensors: Mapping[str, Stored]) -> None:
        if writer.tensor not in tensors:
            raise CheckpointError(f"{self.where}: expected tensor {writer.tensor}, found none; fetch the model again")
        for name in (writer.tensor, writer.bias):
            if name not in tensors:
                continue
            stored, axis = tensors[name], writer.axis if name == writer.tensor else 0
            if stored.dtype not in FLOATS:
                raise self._quantised(f"{name} is stored as {stored.dtype}")
            if len(stored.shape) != 1 + (name == writer.tensor) or stored.shape[axis] != self.width:
                raise CheckpointError(
                    f"{self.where}: {name}: expected axis {axis} to be the residual width {self.width}, "
                    f"found shape {list(stored.shape)}; fetch the model again"
                )

    def _check_known(self, name: str, stored: Stored) -> None:
        module, _, parameter = name.rpartition(".")
        layout = self.layout
        inside = re.fullmatch(re.escape(layout.block).replace(r"\{\}", r"\d+") + r"\.(.+)", module)
        if inside:
            known = (*layout.readers, layout.attention, layout.mlp)
            # Rotary frequencies are a constant that old checkpoints store.
            if (parameter in ("weight", "bias") and inside[1] in known) or parameter == "inv_freq":
                return
        elif not name.startswith("model.") or module == layout.embedding or len(stored.shape) < 2:
            return  # outside the decoder, or nothing that could write vectors: passes through
        if name.endswith(("_scale", "_scale_inv", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax")):
            raise self._quantised(f"it has a tensor {name}")
        raise UnsupportedError(
            f"{self.where}: tensor {name} {list(stored.shape)} is unknown in {self.architecture} and might "
            "write into the residual stream; expected the tensors of the plain architecture"
        )

    def _quantised(self, found: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.where}: expected weights in bf16, fp16, fp32 or fp64, found quantised ones ({found}); "
            "rounding would undo most of the edit, bake the original weights and quantise the result"
        )


def _architecture(config: Mapping[str, Any]) -> str:
    """The name under `architectures`, else what `model_type` stands for."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    model_type = config.get("model_type")
    return next((a for a, layout in LAYOUTS.items() if layout.model_type == model_type), str(model_type))
