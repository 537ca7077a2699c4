"""Plans a bake into a checkpoint: everything it will change, computed and checked before anything is written.

`bake` carries the plan out, and `checkpoint_check` makes the same plan again to verify the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from steer.checkpoint.ablation import DTYPES, Ablation, as_bytes
from steer.checkpoint.anatomy import Anatomy, Writer, WriterMap
from steer.checkpoint.reader import CheckpointFiles, NewTensor
from steer.core.edit import Edit
from steer.core.method import Kind
from steer.errors import CheckpointError, UnsupportedError, UsageError


@dataclass(frozen=True)
class BakePlan:
    """All changes of a bake, checked against the source before anything is written."""

    files: CheckpointFiles
    anatomy: Anatomy
    edit: Edit
    """The edit, with features that add converted to directions."""
    found: WriterMap
    """All writers of the residual stream."""
    writers: tuple[Writer, ...]
    """The writers whose weight, and bias if they have one, is ablated."""
    ablation: Ablation
    shifted: dict[str, int]
    """Biases of the source that an add changes -> site of the add."""
    new: dict[str, tuple[NewTensor, ...]]
    """Shard -> tensors added to it: an untied LM head, biases."""
    created: dict[str, int | None]
    """Added biases -> site of the add, or None for zero biases that the architecture requires with them."""
    config: dict[str, Any]
    """Changed entries of config.json."""
    separate_head: bool
    """Whether the LM head differs from the embedding although the source's config.json ties them."""

    @classmethod
    def of(cls, files: CheckpointFiles, edit: Edit) -> BakePlan:
        """Plan the bake of an edit. Errors: as `bake`."""
        anatomy = Anatomy.of(files.config, str(files.root))
        anatomy.check_edit(edit)
        edit = _constant(edit)
        found = anatomy.find(files.config, files.tensors)
        ablation = Ablation.of(edit, anatomy, files)
        writers = tuple(w for w in found.writers if ablation.strength(w) > 0)
        for writer in writers:
            ablation.subspace(writer)  # raises now if the method leaves nothing of a direction
        config: dict[str, Any] = {}
        new: dict[str, list[NewTensor]] = {}
        if edit.embedding and anatomy.tied:
            config["tie_word_embeddings"] = False
            if head := _untied_head(files, found):
                new.setdefault(files.tensors[found.embedding].file, []).append(head)
        shifts = edit.biases()
        carriers = anatomy.bias_carriers() if shifts else ()
        shifted = {w.bias: w.block for w in found.writers if w.kind == "mlp" and w.bias and w.block in shifts}
        created: dict[str, int | None] = {}
        if not anatomy.biased:
            for module in carriers:
                weight, name = files.tensors[f"{module}.weight"], f"{module}.bias"
                if name in files.tensors:
                    raise CheckpointError(
                        f"{files.root}: holds {name}, which its config.json turns off "
                        f"({anatomy.layout.mlp_bias}); expected none, mend the config"
                    )
                created[name] = shifted.pop(name, None)
                site = created[name]
                value = torch.zeros(weight.shape[0]) if site is None else shifts[site]
                _check_held(value, weight.dtype, f"{files.root}: {name}")
                bias = NewTensor(name, weight.dtype, weight.shape[:1], as_bytes(value, weight.dtype))
                new.setdefault(weight.file, []).append(bias)
            if carriers:
                config[str(anatomy.layout.mlp_bias)] = True
        for name in shifted:
            if name not in files.tensors:
                raise CheckpointError(f"{files.root}: expected tensor {name}, found none; fetch the model again")
        frozen = {shard: tuple(tensors) for shard, tensors in new.items()}
        separate = anatomy.tied and not head_is_embedding(files, anatomy, found)
        return cls(files, anatomy, edit, found, writers, ablation, shifted, frozen, created, config, separate)

    def summary(self) -> str:
        """A description for people before anything is written: the writers found, what is done to them, and
        coverage."""
        a, edited = self.anatomy, len(self.writers)
        lines = [f"{self.files.root}: {a.architecture}, {a.blocks} blocks, residual width {a.width}"]
        lines += [self._line(kind) for kind in get_args(Kind)]
        lines.append(f"  coverage: {edited} of {len(self.found.writers)} writers edited")
        adds = self.shifted | {name: site for name, site in self.created.items() if site is not None}
        lines += [f"  add after block {site}: {name}" for name, site in sorted(adds.items(), key=lambda kv: kv[1])]
        if others := self.found.unloaded:
            lines.append(unloaded_line(others))
        if self.separate_head:
            lines.append(
                f"  {self.found.head}: differs from the embedding, though config.json ties them; kept as it is stored, "
                "which is how transformers 5 loads it"
            )
        lines += [f"  config.json: {key} becomes {value}" for key, value in self.config.items()]
        return "\n".join(lines)

    def _line(self, kind: Kind) -> str:
        writers = [w for w in self.found.writers if w.kind == kind]
        strengths = sorted(self.ablation.strength(w) for w in self.writers if w.kind == kind)
        facts = [
            f"  {kind}: {len(strengths)} of {len(writers)} edited: {', '.join(_shorter(w.tensor for w in writers))}"
        ]
        if any(w.bias in self.files.tensors for w in writers):
            facts.append("with biases")
        if norms := [w.norm for w in writers if w.norm]:
            facts.append(f"through the gain of {', '.join(_shorter(norms))}")
        if strengths:
            low, high = f"{strengths[0]:.3g}", f"{strengths[-1]:.3g}"
            facts.append(f"strength {low}" if low == high else f"strength {low} to {high}")
        return "; ".join(facts)


def unloaded_line(names: Sequence[str]) -> str:
    """The summary's line about tensors that transformers does not load."""
    return f"  not loaded by transformers, not edited: {len(names)} tensors ({', '.join(_shorter(names)[:8])})"


def _check_held(value: Tensor, dtype: str, what: str) -> None:
    """Raise UsageError for a value that is not finite in the stored dtype."""
    if not torch.isfinite(value.to(DTYPES[dtype])).all():
        raise UsageError(f"{what}: expected finite numbers in {dtype}, found some that it cannot hold; add less")


def _shorter(names: Iterable[str]) -> list[str]:
    """The names with `*` in place of numbers, without duplicates."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _constant(edit: Edit) -> Edit:
    """The edit without `moves`. Errors: UnsupportedError if one of them reads the activation, or acts on some tokens
    only."""
    edit = edit.with_adds_as_directions()
    for move in edit.others:
        if not move.acts:
            continue
        found = f"{move.operation} reads the activation" if move.reads else "it acts on some tokens only"
        raise UnsupportedError(
            f"slider {move.name!r}: {found}, and weights cannot; expected add on every token, or ablation of "
            "directions at one strength; keep it as a slider"
        )
    if not edit.ablate and not edit.add:
        raise UsageError("nothing to bake: expected a direction to ablate or an amount to add, found none that moves")
    return edit


def head_is_embedding(files: CheckpointFiles, anatomy: Anatomy, found: WriterMap) -> bool:
    """Whether the LM head that transformers loads is the embedding: config.json ties them, and the files hold no head
    or an equal one. A stored head that differs is loaded, even if config.json ties the two."""
    head = files.tensors.get(found.head)
    return anatomy.tied and (head is None or files.read(head) == files.read(files.tensors[found.embedding]))


def _untied_head(files: CheckpointFiles, found: WriterMap) -> NewTensor | None:
    """A copy of the unedited embedding as LM head; None if the source stores a head already."""
    embedding, head = files.tensors[found.embedding], files.tensors.get(found.head)
    return NewTensor(found.head, embedding.dtype, embedding.shape, embedding) if head is None else None
