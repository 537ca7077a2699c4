"""Bakes an edit as files for llama.cpp: adds as one control vector, each ablation as one LoRA.

A LoRA of llama.cpp is a GGUF file with `general.type` adapter: for the matrix NAME, `NAME.lora_a` `[k, in]` and
`NAME.lora_b` `[out, k]` in fp32, whose product times `adapter.lora.alpha` / k is added to it. Of the token embedding
`lora_a` is `[vocab, k]`, as rows are taken from it. Read from llama.cpp b11549, src/llama-adapter.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.baking.adapter import AdapterPlan, hash_sources
from steer.baking.certificate import CONTROL_VECTOR, BiasProof, Proofs
from steer.baking.control_vector import write_control_vector
from steer.baking.journal import Journal
from steer.baking.plan import Plan
from steer.checkpoint.gguf_file import ARCHITECTURES, read_gguf, write_tensors
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.staging import hash_file
from steer.core.edit import Edit
from steer.errors import CheckpointError, UnsupportedError, UsageError

JOINT = "ablation.gguf"
"""File of all ablations, if their directions are not orthogonal."""
_ORTHOGONAL = 1e-6
"""Largest cosine of directions that get a file each: about the rounding of fp32."""
_ROWS_PER_TOKEN = "token_embd.weight.lora_a"


class LlamaCppPlan(Plan):
    """The bake of a control vector and of LoRAs. Without an ablation only the headers of the source are read."""

    form = "gguf"

    def __init__(self, source: Path | CheckpointFiles, edit: Edit, *, edit_mtp: bool = False) -> None:
        super().__init__(source, edit, edit_mtp=edit_mtp)
        self.left_out = ""
        """Why the embedding is left out, for people; empty if it is not."""
        if self.edit.embedding and self.head_is_embedding:
            self.left_out = "left out, as the LM head is the same tensor and llama.cpp takes no LoRA for it"
            last, e = self.anatomy.blocks - 1, self.edit
            narrower = Edit(e.ablate, e.strength, (0, last), e.add, method=e.method, strengths=e.strengths)
            super().__init__(self.files, narrower, edit_mtp=edit_mtp)
        self.vectors = {site: shift.float() for site, shift in sorted(self.shifts.items()) if shift.any()}
        self.adds = {f"direction.{site}": site for site in self.vectors}
        self.loras = {file: AdapterPlan(self.files, part) for file, part in lora_edits(self.edit).items()}
        """File -> the adapter whose numbers it holds."""
        if not self.loras and not self.vectors:
            raise UsageError(f"{source}: expected an add that moves something, found adds that cancel each other")
        for file, plan in self.loras.items():
            if biased := next((t.path for t in plan.targets if t.bias), None):
                raise self._refusal(f"{biased} has a bias, which no LoRA of llama.cpp changes")
            if len({t.rank for t in plan.targets}) > 1:
                raise self._refusal(f"the number of directions in {file} differs from block to block")
        if wide := next((w.tensor for w in self.writers if self.files.tensors[w.tensor].dtype == "F64"), None):
            raise self._refusal(f"{wide} is in fp64 and a LoRA of llama.cpp in fp32")
        self.total = sum(s.size for s in self.files.shards) if self.loras else 1

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.anatomy.where}: a LoRA for llama.cpp cannot hold this edit, as {why}; bake a checkpoint"
        )

    def notes(self) -> list[str]:
        lines = [f"  embedding: {self.left_out}"] if self.left_out else []
        for file, plan in self.loras.items():
            names = ", ".join(dict.fromkeys(d.name for d in plan.edit.ablate))
            lines.append(f"  {file}: a LoRA of rank {plan.targets[0].rank} for {len(plan.targets)} matrices: {names}")
            if file == JOINT:
                lines.append(
                    f"  {file}: one file and one scale, as the directions are not orthogonal and files of one "
                    "direction each would not add up"
                )
        return lines

    def factors(self, file: str, proofs: Proofs) -> dict[str, Tensor]:
        """Compute the tensors of one LoRA, `NAME.lora_a` `[k, in]` and `NAME.lora_b` `[out, k]`, the embedding's too,
        and add what is measured to `proofs`."""
        plan, out, proven = self.loras[file], {}, Proofs()
        for target in plan.targets:
            factors = dict(plan.tensors([target], proven))
            place = place_of(target.writers[0].tensor, self.anatomy.blocks)
            for name, part in zip(target.names, ("lora_a", "lora_b"), strict=True):
                out[f"{place}.{part}"] = factors[name]
        proofs.writers += [replace(p, key=lora_key(file, p.tensor, self.anatomy.blocks)) for p in proven.writers]
        return out

    def write(self, journal: Journal, advance: Callable[[int], None]) -> dict[str, Any]:
        work, proofs = journal.work, Proofs()
        files: dict[str, str] = {}
        tensors: dict[str, list[Any]] = {}
        if self.vectors:
            write_control_vector(work / CONTROL_VECTOR, self.vectors, self.anatomy.layout.model_type)
            files[CONTROL_VECTOR] = hash_file(work / CONTROL_VECTOR)
            tensors |= {f"direction.{site}": [CONTROL_VECTOR, "F32", [len(v)]] for site, v in self.vectors.items()}
        for file in self.loras:
            stored = file_layout(self.factors(file, proofs))
            write_lora(work / file, stored, ARCHITECTURES[self.anatomy.layout.model_type])
            files[file] = hash_file(work / file)
            tensors |= {f"{file}:{name}": [file, "F32", list(t.shape)] for name, t in stored.items()}
        if self.loras:
            sources = hash_sources(self.files, advance=advance)
        else:
            sources = {"config.json": hash_file(self.files.root / "config.json")}
            advance(1)
        norms = {site: float(vector.double().norm()) for site, vector in self.vectors.items()}
        facts = {
            "writers": proofs.writers,
            "biases": [BiasProof(f"direction.{site}", site, True, norm) for site, norm in norms.items()],
            "tensors": tensors,
            "files": files,
            "source_files": sources,
        }
        # A control vector alone changes no weights.
        return facts if self.loras else facts | {"writers_found": 0, "unloaded": ()}


def lora_edits(edit: Edit) -> dict[str, Edit]:
    """The ablations of an edit as file -> the edit that the LoRA in it holds: a file for each direction, `JOINT` alone
    if the directions are not orthogonal."""

    def part(ablate: tuple[Any, ...]) -> Edit:
        return Edit(ablate, edit.strength, edit.blocks, method=edit.method, strengths=edit.strengths)

    if not edit.ablate:
        return {}
    singles = [part((direction,)) for direction in edit.ablate]
    means = edit.method.neutral if edit.method.by_block else None
    for block in (None, *range(0 if means is None else len(means))):
        cosines = torch.cat([single.basis(block) for single in singles], dim=1)
        if float((cosines.T @ cosines).triu(1).abs().max()) > _ORTHOGONAL:
            return {JOINT: part(edit.ablate)}
    out: dict[str, Edit] = {}
    for direction, single in zip(edit.ablate, singles, strict=True):
        stem = f"ablate-{re.sub(r'[^A-Za-z0-9_-]+', '-', direction.name)}"
        names = (f"{stem}.gguf", *(f"{stem}-{n}.gguf" for n in range(2, len(singles) + 1)))
        out[next(name for name in names if name not in out)] = single
    return out


def place_of(tensor: str, blocks: int) -> str | None:
    """llama.cpp's name for a matrix of a Llama; None if it has none."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks).get_name(tensor, try_suffixes=(".weight",))


def lora_key(file: str, tensor: str, blocks: int) -> str:
    """The certificate's name for the tensor that holds `Q^T W` of a matrix."""
    return f"{file}:{place_of(tensor, blocks)}.lora_a"


def file_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LoRA as the file holds them, or back again: `lora_a` of the embedding is transposed."""
    return {name: (t.T if name == _ROWS_PER_TOKEN else t).contiguous() for name, t in tensors.items()}


def write_lora(path: Path, tensors: Mapping[str, Tensor], architecture: str) -> None:
    """Write the tensors of a LoRA, all of one rank k, as a new GGUF file for models of llama.cpp's `architecture`."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = next(t.shape[1] for name, t in tensors.items() if name.endswith(".lora_b"))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # times 1, as B contains the strength
    write_tensors(writer, tensors)


def read_lora(path: Path, architecture: str) -> dict[str, Tensor]:
    """The tensors of a LoRA in a GGUF file, as the file holds them.

    Errors: CheckpointError for a file that `write_lora` did not write for this architecture.
    """

    def wrong(found: str) -> CheckpointError:
        return CheckpointError(f"{path}: expected a LoRA for llama.cpp in a GGUF file, found {found}; bake again")

    fields, tensors = read_gguf(path, architecture, 2, wrong)
    ranks = {float(t.shape[1]) for name, t in tensors.items() if name.endswith(".lora_b")}
    expected = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    if len(ranks) != 1 or fields != expected | {"adapter.lora.alpha": ranks.pop()}:
        raise wrong(f"the entries {fields}")
    return tensors
