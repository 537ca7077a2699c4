"""Which modules and parameters of a live model an adapter has to change, and how peft holds that change.

peft 0.21 gives LoRAs to Linear and Conv1D modules, to embeddings, and to parameters of two or three axes such as
stacked experts (`target_parameters`). A bias of a module changes only through `lora_bias`, which goes for every Linear
of an adapter at once, and which peft refuses where the same adapter changes embeddings or parameters. (An embedding
could be kept whole, in `modules_to_save`; but `unload` then leaves the changed one in the model.) What keeps the norm
of columns scales them, which has no low rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from steer.errors import UnsupportedError
from steer.weights.ablation import Ablation
from steer.weights.anatomy import Anatomy, Found, Stored, Writer

PREFIX = "base_model.model."
"""What the names of an adapter's tensors begin with."""
PartKind = Literal["linear", "parameter", "embedding", "experts", "expert biases"]
"""`parameter` is a Linear by its weight alone: peft takes the name of one beside experts for that of the experts."""


CONFIG_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "lora_dropout", "bias", "lora_bias", "fan_in_fan_out", "target_modules", "target_parameters"),
}
"""All that adapter_config.json holds: with another key, as `use_rslora`, peft would compute something else."""


@dataclass(frozen=True)
class Part:
    """One thing that the adapter changes."""

    kind: PartKind
    path: str
    """The live module or parameter."""
    key: str
    """What the names of its tensors begin with."""
    writers: tuple[Writer, ...]
    """Those on disk that it stands for: one, or one for each expert."""
    rank: int
    """Directions that leave it; 1 where it only adds, which is the least that peft knows."""
    site: int | None = None
    """Where an add is carried by it."""
    bias: bool = False
    """Whether it changes a bias of a Linear."""


def find_parts(tensors: Mapping[str, Stored], anatomy: Anatomy, found: Found, ablation: Ablation) -> tuple[Part, ...]:
    """The parts of an adapter, in the order of the writers.

    Errors: UnsupportedError for an edit that no adapter can hold.
    """
    edit = ablation.edit
    if edit.ablate and edit.method.norm_preserving:
        raise _refusal(anatomy, "keeping the norms scales every column of a weight, which has no low rank")
    shifts, parts = set(edit.biases()), dict[tuple[str, PartKind], Part]()
    for writer in found.writers:
        site = writer.block if writer.kind == "mlp" and writer.block in shifts else None
        rank = ablation.subspace(writer).shape[1] if ablation.strength(writer) > 0 else 0
        if not rank and site is None:
            continue
        for part in _parts(tensors, anatomy, found, writer, rank, site):
            past = parts.get((part.path, part.kind))
            parts[part.path, part.kind] = replace(part, writers=(*past.writers, writer)) if past else part
    one = next((p for p in parts.values() if p.bias), None)
    other = next((p for p in parts.values() if p.kind != "linear"), None)
    if one is not None and other is not None:
        what, do = f"{other.kind} {other.path}", ""
        if all(p.kind in ("linear", "embedding") for p in parts.values()):
            do = f"leave the embedding out with blocks 0-{anatomy.blocks - 1}, or "
        raise _refusal(anatomy, f"peft changes the bias of {one.path} in no adapter that changes the {what}", do)
    return tuple(parts.values())


def adapter_config(base: str, anatomy: Anatomy, parts: Sequence[Part], biases: bool) -> dict[str, Any]:
    """adapter_config.json, for a base model by hub name or directory."""
    (rank, _), *_ = Counter(p.rank for p in parts).most_common(1)
    ranks = {p.path: p.rank for p in parts if p.rank != rank}
    parameters = [p.path for p in parts if p.kind not in ("linear", "embedding")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scale of 1: all strength is in B
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biases,
        "fan_in_fan_out": anatomy.layout.attention.axis == 1,
        "target_modules": [p.path for p in parts if p.kind in ("linear", "embedding")],
        "target_parameters": parameters or None,
    }


def _parts(
    tensors: Mapping[str, Stored], anatomy: Anatomy, found: Found, writer: Writer, rank: int, site: int | None
) -> list[Part]:
    path = anatomy.layout.base + writer.tensor.removeprefix(found.base)
    biased = writer.bias in tensors
    if parameter := _stack(anatomy, found, writer, path):
        module = parameter.rpartition(".")[0]
        out = []
        if biased and (rank or site is not None):
            path = f"{module}.{str(writer.bias).rpartition('.')[2]}"
            count = rank + (site is not None)
            out.append(Part("expert biases", path, PREFIX + module, (writer,), count, site))
        # Two parameters of one module: peft wraps the first in the second.
        key = f"{PREFIX}{module}.base_layer" if biased and rank else PREFIX + module
        return [Part("experts", parameter, key, (writer,), rank), *out] if rank else out
    path = path.removesuffix(".weight")
    if writer.kind == "embedding":
        return [Part("embedding", path, PREFIX + path, (writer,), rank)]
    if writer.kind == "mlp" and anatomy.layout.experts_keys:
        return [Part("parameter", f"{path}.weight", PREFIX + path, (writer,), rank)]
    bias = site is not None or (biased and rank > 0)
    return [Part("linear", path, PREFIX + path, (writer,), max(rank, 1), site, bias)]


def _stack(anatomy: Anatomy, found: Found, writer: Writer, path: str) -> str | None:
    """The live parameter that holds all experts, for a writer that is one of them or all; None for any other."""
    if writer.stacked:
        return path
    layout = anatomy.layout
    if writer.block is None or not layout.experts_keys:
        return None
    block = layout.block.format(writer.block)
    below = writer.tensor.removeprefix(f"{found.base}{block}.")
    parts = [part for form in layout.mlp for part in form]
    one_each = [re.escape(p.weight).replace(r"\{\}", r"\d+") for p in parts if "{}" in p.weight]
    if not any(re.fullmatch(pattern, below) for pattern in one_each):
        return None
    return f"{anatomy.block_module(writer.block)}.{next(p.weight for p in parts if p.stacked)}"


def _refusal(anatomy: Anatomy, why: str, do: str = "") -> UnsupportedError:
    return UnsupportedError(f"{anatomy.where}: an adapter cannot hold this edit, as {why}; {do}bake a checkpoint")
