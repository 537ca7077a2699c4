"""Plans a bake before anything is written: whether the form of output can hold each slider, and what will change.

`Plan` holds what all forms share. Its subclasses plan and write one form each: `checkpoint`, `adapter` and
`llama_cpp`. The checks of `steer verify` make the same plan again.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from steer.baking.certificate import Form, WriterProof
from steer.baking.journal import Journal
from steer.checkpoint.ablation import Ablation
from steer.checkpoint.anatomy import Anatomy, Writer, WriterMap
from steer.checkpoint.gguf_file import ARCHITECTURES
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import CheckpointFiles
from steer.core.direction import Direction
from steer.core.edit import Edit, check_set
from steer.core.method import Kind
from steer.core.slider import Slider
from steer.errors import CheckpointError, UnsupportedError, UsageError


class Plan(ABC):
    """What a bake will do, checked against the source before anything is written."""

    form: ClassVar[Form]
    adds: dict[str, int]
    """Tensors of the output that carry an add -> its site."""
    total: int
    """The work of `write`, in the units of its `advance`: bytes of weights."""

    def __init__(self, source: Path | CheckpointFiles, edit: Edit, *, edit_mtp: bool = False) -> None:
        """Plan the bake of `edit` into the checkpoint in `source`; pass its files to open them once for many plans.

        `edit_mtp`: whether the writers of layers for multi-token prediction are ablated too.

        Errors: as `steer.baking.bake.bake`.
        """
        self.files = source if isinstance(source, CheckpointFiles) else dequantised(CheckpointFiles.open(source))
        source = self.files.root
        check_set(edit.moves)
        self.anatomy = Anatomy.of(self.files.config, str(source))
        self.anatomy.check_edit(edit)
        even = Edit(edit.ablate, edit.strength, edit.blocks, edit.add, edit.others)  # an uneven ablation has no sliders
        check_bakeable(bakeable(even.as_moves(), self.form, self.anatomy), str(source))
        plain = edit.with_adds_as_directions()
        self.edit = Edit(plain.ablate, plain.strength, plain.blocks, plain.add, (), plain.method, plain.strengths)
        self.found = self.anatomy.find(self.files.config, self.files.tensors)
        self.edit_mtp = edit_mtp
        self.all_writers = (*self.found.writers, *(self.found.mtp if edit_mtp else ()))
        """The writers that an ablation edits where its strength is above 0."""
        self.ablation = Ablation.of(self.edit, self.anatomy, self.files)
        self.shifts = self.edit.biases()
        self.writers = [w for w in self.all_writers if self.ablation.strength(w) > 0]
        for writer in self.writers:
            self.ablation.subspace(writer)  # raises now if the method leaves nothing of a direction
        edited = {name for w in self.writers for name in (w.tensor, w.bias)}
        self.passed_through = tuple(name for name in self.found.unloaded if name not in edited)
        """Tensors that transformers does not load and the bake does not edit."""

    def changes(self, writers: Sequence[Writer]) -> str:
        """What is done to the writers of one kind, for people."""
        return ""

    def notes(self) -> list[str]:
        """Lines for people about changes beside those of the writers."""
        return []

    @abstractmethod
    def write(self, journal: Journal, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write the form's files into the directory of the journal, and return the entries of the certificate that the
        form decides. `advance` is called with the work done since its last call."""

    def summary(self) -> str:
        """A description for people before anything is written: writers found, what is done to them, and coverage."""
        a, edited, found, mtp = self.anatomy, self.writers, self.all_writers, self.found.mtp
        lines = [f"{self.files.root}: {a.architecture}, {a.blocks} blocks, residual width {a.width}"]
        for kind in get_args(Kind):
            writers = [w for w in self.found.writers if w.kind == kind]
            lines.append(f"  {kind}: {self._count(writers)}")
        if self.edit_mtp:
            lines.append(f"  multi-token prediction: {self._count(mtp)}")
            if self.adds:
                lines.append("  multi-token prediction: no add, as each acts after one block of the model")
        lines += [f"  coverage: {len(edited)} of {len(found)} writers edited", *self.notes()]
        lines += [f"  add after block {site}: {name}" for name, site in sorted(self.adds.items(), key=lambda a: a[1])]
        if others := self.passed_through:
            shown = ", ".join(shorter(others)[:8])
            lines.append(f"  not loaded by transformers, not edited: {len(others)} tensors ({shown})")
            if mtp and self.form == "checkpoint" and self.edit.ablate and not self.edit_mtp:
                lines.append(f"  --edit-mtp would edit the {len(mtp)} writers of multi-token prediction among them")
        return "\n".join(lines)

    def _count(self, writers: Sequence[Writer]) -> str:
        edited = sum(w in self.writers for w in writers)
        return f"{edited} of {len(writers)} edited{self.changes(writers)}"

    def proof(
        self, writer: Writer, tensor: str, dtype: str, before: float, after: float, norm: float, key: str | None = None
    ) -> WriterProof:
        """The proof of a writer's weight or bias. The arguments are the fields of `WriterProof`.

        Errors: CheckpointError if more remains than the strength of the ablation allows.
        """
        bias, strength = tensor == writer.bias, self.ablation.strength(writer)
        axis = len(self.files.tensors[tensor].shape) - 1 if bias else writer.axis
        proof = WriterProof(tensor, writer.kind, writer.block, axis, bias, dtype, strength, before, after, norm, key)
        if not math.isfinite(norm) or not proof.holds:
            raise CheckpointError(
                f"{self.files.root}: {tensor} puts {after:.3g} of {before:.3g} into the ablated directions after the "
                "edit; expected finite weights, check the source"
            )
        return proof

    @property
    def head_is_embedding(self) -> bool:
        """Whether the LM head that transformers loads is the embedding: config.json ties them, and the files hold no
        head or an equal one. A stored head that differs is loaded, even if config.json ties the two."""
        files, head = self.files, self.files.tensors.get(self.found.head)
        if not self.anatomy.tied or head is None:
            return self.anatomy.tied
        return files.read(head) == files.read(files.tensors[self.found.embedding])


def check_mtp(found: WriterMap, form: Form, anatomy: Anatomy, *, ablates: bool = True) -> None:
    """Raise UsageError or UnsupportedError unless a bake of this form can edit the model's layers for multi-token
    prediction."""
    where, why = anatomy.where, None
    if form != "checkpoint":
        raise UsageError(f"--edit-mtp: expected the form checkpoint, found {form}; no {form} reaches these layers")
    if not ablates:
        raise UsageError(
            "--edit-mtp: expected a direction to ablate, found none; an add acts after one block of the model, which "
            "changes no layer for multi-token prediction"
        )
    if not found.unloaded:
        why = "no tensor of such layers"
    elif not found.mtp:
        names = ", ".join(shorter(found.unloaded)[:4])
        why = f"{len(found.unloaded)} tensors that are not those of a block of {anatomy.architecture} ({names})"
    if why:
        raise UnsupportedError(
            f"{where}: --edit-mtp: expected layers for multi-token prediction with a block's writers, found {why}; "
            "leave it out"
        )


def shorter(names: Iterable[str]) -> list[str]:
    """The names with `*` in place of numbers, without duplicates."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


_CARRIERS: dict[Form, str] = {
    "checkpoint": "a bias in block {site}",
    "adapter": "a bias of the adapter in block {site}",
    "gguf": "direction.{site} of the control vector",
}
"""What an add becomes in each form."""


@dataclass(frozen=True)
class Verdict:
    """Whether one slider can be baked."""

    slider: str
    operation: str
    ok: bool
    reason: str
    """What the slider becomes, or why it cannot be baked."""

    def __str__(self) -> str:
        return f"{self.slider} ({self.operation}): {'' if self.ok else 'no, '}{self.reason}"


def bakeable(moves: Iterable[Slider], form: Form, anatomy: Anatomy) -> list[Verdict]:
    """One verdict for each intervention that has an effect, in their order."""
    moves = [m for m in moves if m.acts]
    ablations = [m for m in moves if m.operation == "ablate" and isinstance(m.target, Direction) and m.when.always]
    strengths = sorted({m.amount for m in ablations})
    out = []
    for move in moves:
        why = _obstacle(move, form, anatomy, strengths)
        outcome = "removed from every writer" if move.operation == "ablate" else _CARRIERS[form].format(site=move.site)
        out.append(Verdict(move.name, move.operation, why is None, why or outcome))
    return out


def check_bakeable(verdicts: Sequence[Verdict], where: str) -> None:
    """Raise UnsupportedError that names every slider that cannot be baked, if there is any."""
    wrong = [v for v in verdicts if not v.ok]
    if wrong:
        why = "; ".join(f"{v.slider!r} ({v.operation}): {v.reason}" for v in wrong)
        raise UnsupportedError(
            f"{where}: {len(wrong)} of {len(verdicts)} sliders cannot be baked: {why}; leave them out and move them "
            "live, or change them"
        )


def _obstacle(move: Slider, form: Form, anatomy: Anatomy, strengths: Sequence[float]) -> str | None:
    """Why an intervention cannot be baked; None if it can. `strengths`: of all ablations of directions in the edit."""
    if not move.when.always:
        return "it acts on some tokens only, and weights act on all of them"
    if move.operation in ("clamp", "cap", "scale"):
        return f"{move.operation} depends on what it reads on each token, which no weight of a linear map can do"
    if move.operation == "ablate":
        if not isinstance(move.target, Direction):
            return "what a latent's activation is depends on the token; add it, or ablate a direction"
        if form == "gguf" and (kind := anatomy.layout.model_type) not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            return f"LoRAs for llama.cpp are made for models of type {known} alone, not {kind}; bake an adapter"
        if len(strengths) > 1:
            found = ", ".join(f"{s:g}" for s in strengths)
            return f"directions are ablated at one strength, found {found}; give all of them one amount"
        return None
    if form == "gguf":
        return "llama.cpp adds control vectors after layers 1 and on, and it acts at site 0" if move.site == 0 else None
    return no_constant(anatomy, form)


def no_constant(anatomy: Anatomy, form: Form) -> str | None:
    """Why a bake of this form cannot add a constant after a block of this architecture; None if it can."""
    layout, name = anatomy.layout, anatomy.architecture
    mlps = [a for a in layout.addends if a.kind == "mlp"]
    if any(a.norms for a in mlps):
        return f"{name} has a norm between its MLPs and the residual stream, which no constant passes"
    if layout.mlp_bias is not None:
        return None
    if len(mlps) != len(layout.blocks):
        return f"{name} has blocks without an MLP, or with two, which no one bias stands for"
    if any(a.scale != 1.0 for a in mlps):
        return f"{name} multiplies what its MLPs write by {mlps[0].scale:.3g}, and a bias with it"
    if layout.has_experts:
        return f"{name} has experts without biases in its MLPs, and no adapter can give them any"
    return f"{name} has no biases in its MLPs; bake an adapter" if form == "checkpoint" else None
