"""What a bake will do to a checkpoint, worked out and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.values.edit import Edit
from steer.weights.anatomy import Anatomy, Writer
from steer.weights.arithmetic import as_bytes
from steer.weights.stream import CheckpointFiles, NewTensor


@dataclass(frozen=True)
class Plan:
    """What a bake will do, checked against the source before anything is written."""

    files: CheckpointFiles
    anatomy: Anatomy
    edit: Edit
    """Features that add are directions in it."""
    writers: tuple[Writer, ...]
    """Those whose weight, and bias if they have one, is ablated."""
    shifted: dict[str, int]
    """Biases of the source that an add changes -> its site."""
    new: dict[str, tuple[NewTensor, ...]]
    """Shard -> the tensors it gains: an untied LM head, biases."""
    created: dict[str, int | None]
    """Biases among them -> the site where it adds, None for the zeros that must come with it."""
    config: dict[str, Any]
    """Changes of config.json."""

    @classmethod
    def of(cls, files: CheckpointFiles, edit: Edit) -> Plan:
        """Errors: as `bake`."""
        anatomy = Anatomy.of(files.config, str(files.root))
        anatomy.check_edit(edit)
        edit = _constant(edit)
        anatomy.check_weights(files.config, files.tensors)
        writers = tuple(
            w for w in anatomy.writers if (edit.embedding if w.block is None else edit.edits_block(w.block))
        )
        config: dict[str, Any] = {}
        new: dict[str, list[NewTensor]] = {}
        if edit.embedding and anatomy.tied:
            config["tie_word_embeddings"] = False
            if head := _untied_head(files, anatomy):
                new.setdefault(files.tensors[f"{anatomy.embedding_module}.weight"].file, []).append(head)
        shifts = edit.biases()
        shifted = {anatomy.writer_modules(site)[1] + ".bias": site for site in shifts}
        created: dict[str, int | None] = {}
        if shifts and not anatomy.biased:
            for module in anatomy.bias_carriers():
                weight, name = files.tensors[f"{module}.weight"], f"{module}.bias"
                if name in files.tensors:
                    raise CheckpointError(
                        f"{files.root}: holds {name}, which its config.json turns off "
                        f"({anatomy.layout.bias_key}); expected none, mend the config"
                    )
                created[name] = shifted.pop(name, None)
                site = created[name]
                value = torch.zeros(weight.shape[0]) if site is None else shifts[site]
                bias = NewTensor(name, weight.dtype, weight.shape[:1], as_bytes(value, weight.dtype))
                new.setdefault(weight.file, []).append(bias)
            config[str(anatomy.layout.bias_key)] = True
        for name in shifted:
            if name not in files.tensors:
                raise CheckpointError(f"{files.root}: expected tensor {name}, found none; fetch the model again")
        frozen = {shard: tuple(tensors) for shard, tensors in new.items()}
        return cls(files, anatomy, edit, writers, shifted, frozen, created, config)


def _constant(edit: Edit) -> Edit:
    """The edit without moves. Errors: UnsupportedError when one reads its activation, or acts on some tokens only."""
    edit = edit.with_adds_as_directions()
    for move in edit.moves:
        if move.neutral:
            continue
        found = f"{move.operation} reads the activation" if move.reads else "it acts on some tokens only"
        raise UnsupportedError(
            f"slider {move.name!r}: {found}, and weights cannot; expected add on every token, or ablation of "
            "directions at one strength; keep it as a slider"
        )
    if not edit.ablate and not edit.add:
        raise UsageError("nothing to bake: expected a direction to ablate or an amount to add, found none that moves")
    return replace(edit, moves=())


def _untied_head(files: CheckpointFiles, anatomy: Anatomy) -> NewTensor | None:
    """The LM head that goes on reading with the unedited embedding, None when the source has it already."""
    embedding = files.tensors[f"{anatomy.embedding_module}.weight"]
    head = files.tensors.get(anatomy.head)
    if head is None:
        return NewTensor(anatomy.head, embedding.dtype, embedding.shape, embedding)
    if head.shape != embedding.shape or files.read(head) != files.read(embedding):
        raise CheckpointError(
            f"{files.root}: config.json says that {anatomy.head} is tied to the embedding, but they differ; "
            "set tie_word_embeddings to false there if they are meant to"
        )
    return None
