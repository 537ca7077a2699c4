"""The checks of `steer verify` on an adapter: from its files alone, and against the weights it was made from.

`verify` has already compared hashes and names when it calls `check_adapter`. The first four checks need only the
adapter; `_check_source` computes the adapter again from its source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.baking.adapter import CONFIG, CONFIG_KEYS, PREFIX, AdapterPlan
from steer.baking.certificate import ADAPTER, Certificate, Proofs, WriterProof, same_set
from steer.baking.checks import check_claims, check_sources
from steer.checkpoint.layouts import LAYOUTS, Layout, Part
from steer.core.edit import Edit
from steer.core.method import Kind
from steer.errors import CheckpointError

_SLACK = 1e-5  # relative difference between two orders of summing in fp32, with fp32 directions


def check_adapter(folder: Path, cert: Certificate, edit: Edit, source: Path | None) -> str:
    """Run all checks. `source` is the checkpoint the adapter was made from; by default its base model, if that is a
    directory on this machine. Returns what was compared with the source.

    Errors: CheckpointError at the first difference from the certificate, also if `source` is another checkpoint.
    """
    stored, config = load_file(folder / ADAPTER), json.loads((folder / CONFIG).read_bytes())
    _check_claims(folder, cert, edit, stored)
    _check_config(folder, cert, config, stored)
    _check_factors(folder, cert, edit, stored)
    _check_adds(folder, cert, edit, stored)
    base = config["base_model_name_or_path"]
    if source is None and not Path(base).is_dir():
        return f"{base} is not on this disk, so that it was not compared; give --source"
    return _check_source(folder, cert, edit, config, stored, source or Path(base))


def _check_claims(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Check what the edit and the adapter determine without the source: which writers must have a proof and what it
    must say, and that no tensor changes anything without a proof.

    The source's number of blocks is not known here, so missing proofs and tensors of its last blocks would not be
    noticed.
    """
    layout = LAYOUTS.get(cert.architecture)
    if layout is None:
        raise CheckpointError(f"{folder}: architecture {cert.architecture} of the certificate is unknown; bake again")
    neutral, shifts = edit.method.neutral, edit.biases()
    known = [*(p.block for p in cert.writers if p.block is not None), *shifts, *(edit.blocks or ())]
    blocks = range(max(known, default=-1) + 1) if neutral is None else range(len(neutral))
    writers: list[tuple[Kind, int | None]] = [("embedding", None), *(("attention", b) for b in blocks)]
    writers += [("mlp", b) for b in blocks]
    ablated, strengths, misstated = set(), [], False
    for proof in cert.writers:
        kind, block, axis, bias = _place(layout, proof.tensor)
        strengths.append(edit.strength_at(block, kind))
        code = "F64" if stored[str(proof.key)].dtype == torch.float64 else "F32"
        decided = replace(proof, kind=kind, block=block, axis=axis, bias=bias, dtype=code, strength=strengths[-1])
        misstated |= decided != proof
        ablated |= {(kind, block)} if strengths[-1] > 0 and not bias else set()
    proved = {p.key for p in cert.writers} | {b.tensor for b in cert.biases}
    loose = [n for n in stored if n not in proved and not re.search(r"lora(_embedding)?_B(\.weight)?$", n)]
    wrong = {
        "writers": misstated
        or len({p.tensor for p in cert.writers}) != len(cert.writers)
        or ablated != {(kind, block) for kind, block in writers if edit.strength_at(block, kind) > 0}
        or sum(p.kind == "embedding" for p in cert.writers) != len(layout.embeddings) * edit.embedding,
        "strength": cert.strength != min(strengths, default=edit.strength),
        "biases": sorted(str(b.site) for b in cert.biases) != sorted(map(str, shifts))
        or not all(b.created and b.tensor in stored for b in cert.biases),
        "config": cert.config != {},
        "tensors": any(bool(stored[name].any()) for name in loose),  # the A of a part that only adds is zero
        "untie_to_merge": cert.untie_to_merge and ("embedding", None) not in ablated,
        "writers_found": cert.writers_found < cert.writers_edited,
    }
    check_claims(folder, wrong)


def _place(layout: Layout, tensor: str) -> tuple[Kind, int | None, int, bool]:
    """(kind, block, axis that faces the residual stream, whether it is a bias) of a writer, from its name on disk.

    Errors: LookupError for a name that is not a writer's.
    """
    name = tensor.removeprefix(layout.base)
    if name in (f"{e}.weight" for e in layout.embeddings):
        return "embedding", None, 1, False
    inside = re.fullmatch(re.escape(layout.block).replace(r"\{\}", r"(\d+)") + r"\.(.+)", name)
    parts: list[tuple[Kind, Part]] = [("attention", layout.attention)]
    parts += [("mlp", part) for form in layout.mlp for part in form]
    for kind, part in parts if inside else ():
        if re.fullmatch(re.escape(part.weight).replace(r"\{\}", r"\d+"), inside[2]):
            return kind, int(inside[1]), part.axis, False
        if inside[2] == part.bias:
            return kind, int(inside[1]), int(part.stacked), True
    raise LookupError(f"{tensor} is no writer")


def _check_config(folder: Path, cert: Certificate, config: dict[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Check all entries of adapter_config.json that the tensors determine: which modules change, and that the scale is
    1."""
    found = [re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora(?:_embedding)?_A(?:\.weight)?", name) for name in stored]
    parameters = config["target_parameters"] or []
    changed = [*config["target_modules"], *(path.rpartition(".")[0] for path in parameters)]
    expected = {
        "peft_type": "LORA",
        "lora_alpha": config["r"],
        "alpha_pattern": config["rank_pattern"],
        "bias": "none",
        "lora_bias": any(n.endswith(".lora_B.bias") for n in stored),
        "fan_in_fan_out": LAYOUTS[cert.architecture].attention.axis == 1,
    }
    wrong = {key for key, value in expected.items() if config[key] != value} | config.keys() ^ CONFIG_KEYS
    if sorted(changed) != sorted(m[1].removesuffix(".base_layer") for m in found if m):
        wrong.add("target_modules")
    if wrong:
        raise CheckpointError(f"{folder / CONFIG}: {min(wrong)} is not what its tensors come to; bake again")


def _check_factors(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Check that each A puts out as much as certified, and that its B removes the strength's share of that, along the
    directions alone.

    Where a norm follows the writer, the directions depend on the norm's gain, which only the source has.
    """
    layout = LAYOUTS[cert.architecture]
    norms = {"attention": layout.attention_norm, "mlp": layout.mlp_norm}
    proofs: dict[str, list[WriterProof]] = {}
    for proof in cert.writers:
        if not proof.bias and proof.key is not None:
            proofs.setdefault(proof.key, []).append(proof)
    for key, group in proofs.items():
        first, a, b = group[0], stored[key].double(), stored[re.sub(r"(lora(_embedding)?)_A", r"\1_B", key)].double()
        q = edit.basis(first.block) if norms.get(first.kind) is None else None
        rank = len(a) if q is None else q.shape[1]
        per_expert = b.view(len(b), rank, -1).permute(2, 0, 1)  # B's columns: the direction outside, the expert inside
        gram = (per_expert.mT @ per_expert - first.strength**2 * torch.eye(rank, dtype=b.dtype)).abs().max()
        outside = 0.0 if q is None else float((b - q @ (q.T @ b)).norm()) / b.shape[1]
        for part, proof in zip(a.chunk(len(group)), group, strict=True):
            before = float(part.norm())
            right = (
                abs(before - proof.before) <= _SLACK * before
                and abs((1 - proof.strength) * before - proof.after) <= _SLACK * before
                and proof.after <= proof.norm + _SLACK * before < math.inf
            )
            if not (float(gram) <= _SLACK and outside <= _SLACK and right and proof.holds):
                raise CheckpointError(
                    f"{folder / ADAPTER}: {key} does not take {proof.strength} of the directions out of "
                    f"{proof.tensor}, which is certified; bake again"
                )


def _check_adds(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Check that, outside the ablated directions, each bias changes by exactly what the edit adds."""
    shifts = edit.biases()
    for proof in cert.biases:
        assert proof.site is not None
        tensor = stored[proof.tensor].double()
        # For the biases of experts, the last row of A holds what all of them gain.
        rest = (tensor[-1] if tensor.ndim == 2 else tensor) - shifts[proof.site]
        if any(w.key == proof.tensor and w.bias for w in cert.writers) and tensor.ndim == 1:
            q = edit.basis(proof.site)
            rest = rest - q @ (q.T @ rest)
        slack = _SLACK * proof.norm
        if not (abs(float(tensor.norm()) - proof.norm) <= slack and float(rest.norm()) <= slack):
            raise CheckpointError(f"{folder / ADAPTER}: {proof.tensor} is not the bias certified; bake again")


def _check_source(
    folder: Path, cert: Certificate, edit: Edit, config: dict[str, Any], stored: Mapping[str, Tensor], source: Path
) -> str:
    """Compute the adapter from its source again and compare."""
    plan, proofs = AdapterPlan(source, edit), Proofs()
    check_sources(folder, cert, plan.files)
    again = dict(plan.tensors(plan.parts, proofs))
    same_set(folder, "tensor", set(stored), set(again))
    for part in plan.parts:
        distance = _distance([(t[part.a].double(), t[part.b].double()) for t in (stored, again)], part.rank)
        differences = {part.a: distance}
        if (name := part.b_bias) in again:
            differences[name] = float((stored[name] - again[name]).norm()), float(again[name].norm())
        for name, (off, size) in differences.items():
            if not off <= _SLACK * size:
                raise CheckpointError(f"{folder / ADAPTER}: {name} is not what {source} gives; bake again")
    recomputed, certified = ({p.tensor: p for p in proven} for proven in (proofs.writers, cert.writers))
    claims = {
        CONFIG: config != json.loads(json.dumps(plan.config(config["base_model_name_or_path"]))),
        "architecture": cert.architecture != plan.anatomy.architecture,
        "writers_found": cert.writers_found != len(plan.found.writers),
        "writers": recomputed.keys() != certified.keys()
        or not all(_same_proof(recomputed[n], certified[n]) for n in recomputed),
        "biases": {(b.tensor, b.site) for b in cert.biases} != {(b.tensor, b.site) for b in proofs.biases},
        "unloaded": cert.unloaded != plan.found.unloaded,
        "untie_to_merge": cert.untie_to_merge != plan.untie_to_merge,
    }
    check_claims(folder, claims)
    return f"all {len(again)} tensors come out of {source} again, whose files are those certified"


def _same_proof(ours: WriterProof, theirs: WriterProof) -> bool:
    """Whether two proofs of a writer are equal, numbers up to the rounding of fp32."""
    numbers = [(ours.before, theirs.before), (ours.after, theirs.after), (ours.norm, theirs.norm)]
    near = all(abs(a - b) <= _SLACK * ours.norm for a, b in numbers)
    return near and ours == replace(theirs, before=ours.before, after=ours.after, norm=ours.norm)


def _distance(pairs: list[tuple[Tensor, Tensor]], rank: int) -> tuple[float, float]:
    """(`||B A - B' A'||`, `||B' A'||`) of two pairs (A, B), summed over all experts, without computing the products.

    Only the products are the same on every machine: the basis of a subspace depends on a machine's libraries.
    """
    stacks = [(a.view(-1, rank, a.shape[-1]), b.view(len(b), rank, -1).permute(2, 0, 1)) for a, b in pairs]

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        return float(((one[1].mT @ other[1]) * (one[0] @ other[0].mT)).sum())

    got, wanted = stacks
    size = inner(wanted, wanted)
    square = inner(got, got) - 2 * inner(got, wanted) + size
    return 0.0 if square < 0 else square**0.5, size**0.5
