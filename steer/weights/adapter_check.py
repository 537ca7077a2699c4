"""The checks of `steer verify` on an adapter: from its files alone, and against the weights it was made from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.errors import CheckpointError
from steer.values.edit import Edit
from steer.values.method import Kind
from steer.weights.adapter import CONFIG, AdapterPlan, hash_sources
from steer.weights.adapter_factors import Proofs, adapter_tensors
from steer.weights.adapter_parts import CONFIG_KEYS, PREFIX, adapter_config
from steer.weights.certify import ADAPTER, Certificate, Check, ablation_check, check_claims, same_set
from steer.weights.layouts import LAYOUTS, Layout, Part
from steer.weights.proofs import WriterProof

_SLACK = 1e-5  # of what two ways to sum in fp32 differ by, and fp32 directions


def check_adapter(folder: Path, cert: Certificate, edit: Edit, source: Path | None) -> list[Check]:
    """The checks that passed; `source` is the checkpoint it was made from, by default its base model if that is here.

    Errors: CheckpointError at the first thing that is not as certified, a source that is another one included.
    """
    stored = load_file(folder / ADAPTER)
    _check_claims(folder, cert, edit, stored)
    _check_config(folder, cert, stored)
    _check_factors(folder, cert, edit, stored)
    checks = [ablation_check(cert)]
    if edit.add:
        _check_adds(folder, cert, edit, stored)
        checks.append(Check("add", f"biases at sites {', '.join(str(s) for s in sorted(edit.biases()))}"))
    base = json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"]
    if source is None and not Path(base).is_dir():
        return [*checks, Check("source", f"{base} is not on this disk, so that it was not compared; give --source")]
    checks.append(_check_source(folder, cert, edit, stored, source or Path(base)))
    return checks


def _check_claims(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """What the edit and the adapter decide without the source: which writers must have a proof, and what it must say;
    and that no tensor changes anything unproved.

    How many blocks the source has is not known here: proofs and tensors of its last ones would not be missed.
    """
    layout = LAYOUTS.get(cert.architecture)
    if layout is None:
        raise CheckpointError(f"{folder}: architecture {cert.architecture} of the certificate is unknown; bake again")
    told = {p.tensor: (p.kind, p.block, p.axis, p.bias, p.dtype, p.strength) for p in cert.writers}
    neutral, shifts = edit.method.neutral, edit.biases()
    known = [*(p.block for p in cert.writers if p.block is not None), *shifts, *(edit.blocks or ())]
    blocks = range(max(known, default=-1) + 1) if neutral is None else range(len(neutral))
    decided, ablated = {}, set()
    for proof in cert.writers:
        kind, block, axis, bias = _place(layout, proof.tensor)
        strength = edit.strength_at(block, kind)
        code = "F64" if stored[str(proof.key)].dtype == torch.float64 else "F32"
        decided[proof.tensor] = (kind, block, axis, bias, code, strength)
        ablated |= {(kind, block)} if strength > 0 and not bias else set()
    kinds: tuple[Kind, ...] = ("attention", "mlp")
    places: list[tuple[Kind, int | None]] = [
        ("embedding", None),
        *((kind, block) for block in blocks for kind in kinds),
    ]
    added = {b.tensor for b in cert.biases}
    proved = {p.key for p in cert.writers} | added
    loose = [n for n in stored if n not in proved and not re.search(r"lora(_embedding)?_B(\.weight)?$", n)]
    wrong = {
        "writers": told != decided
        or len(told) != len(cert.writers)
        or ablated != {(kind, block) for kind, block in places if edit.strength_at(block, kind) > 0}
        or sum(p.kind == "embedding" for p in cert.writers) != len(layout.embeddings) * edit.embedding,
        "strength": cert.strength != min((p[-1] for p in decided.values()), default=edit.strength),
        "biases": sorted(str(b.site) for b in cert.biases) != sorted(map(str, shifts))
        or not all(b.created and b.tensor in stored for b in cert.biases),
        "config": cert.config != {},
        "tensors": any(bool(stored[name].any()) for name in loose),  # what only adds has an A of zeros
        "untie_to_merge": cert.untie_to_merge and ("embedding", None) not in ablated,
        "writers_found": cert.writers_found < cert.writers_edited,
    }
    check_claims(folder, wrong)


def _place(layout: Layout, tensor: str) -> tuple[Kind, int | None, int, bool]:
    """(kind, block, axis that faces the residual stream, whether it is a bias) of a writer by its name on disk.

    Errors: LookupError for a name that is none.
    """
    name = tensor.removeprefix(layout.base)
    if name in (f"{e}.weight" for e in layout.embeddings):
        return "embedding", None, 1, False
    inside = re.fullmatch(re.escape(layout.block).replace(r"\{\}", r"(\d+)") + r"\.(.+)", name)
    parts: list[tuple[Kind, Part]] = [
        ("attention", layout.attention),
        *(("mlp", part) for form in layout.mlp for part in form),
    ]
    if inside is None:
        raise LookupError(f"{tensor} is no writer")
    for kind, part in parts:
        if re.fullmatch(re.escape(part.weight).replace(r"\{\}", r"\d+"), inside[2]):
            return kind, int(inside[1]), part.axis, False
        if inside[2] == part.bias:
            return kind, int(inside[1]), int(part.stacked), True
    raise LookupError(f"{tensor} is no writer")


def _check_config(folder: Path, cert: Certificate, stored: Mapping[str, Tensor]) -> None:
    """Everything in adapter_config.json that its tensors decide: which modules change, and that the scale is one."""
    config = json.loads((folder / CONFIG).read_bytes())
    keys = [
        m[1] for n in stored if (m := re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora(?:_embedding)?_A(?:\.weight)?", n))
    ]
    modules, parameters = config["target_modules"], config["target_parameters"] or []
    changed = [*modules, *(path.rpartition(".")[0] for path in parameters)]
    expected = {
        "peft_type": "LORA",
        "lora_alpha": config["r"],
        "alpha_pattern": config["rank_pattern"],
        "bias": "none",
        "lora_bias": any(n.endswith(".lora_B.bias") for n in stored),
        "fan_in_fan_out": LAYOUTS[cert.architecture].attention.axis == 1,
    }
    wrong = {key for key, value in expected.items() if config[key] != value} | config.keys() ^ CONFIG_KEYS
    if sorted(changed) != sorted(key.removesuffix(".base_layer") for key in keys):
        wrong.add("target_modules")
    if wrong:
        raise CheckpointError(f"{folder / CONFIG}: {min(wrong)} is not what its tensors come to; bake again")


def _check_factors(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Each A puts out as much as was certified, and its B takes the strength of that away, along the directions alone.

    Where a norm follows the writer, what leaves it depends on the norm's gain, which only the source has.
    """
    proofs: dict[str, list[WriterProof]] = {}
    for proof in cert.writers:
        if not proof.bias and proof.key is not None:
            proofs.setdefault(proof.key, []).append(proof)
    for key, of in proofs.items():
        first, a, b = of[0], stored[key].double(), stored[re.sub(r"(lora(_embedding)?)_A", r"\1_B", key)].double()
        q = None if _normed(cert, first) else edit.basis(first.block)
        rank = len(a) if q is None else q.shape[1]
        each = b.view(len(b), rank, -1).permute(2, 0, 1)  # B's columns are told apart by the direction, then the expert
        gram = (each.mT @ each - first.strength**2 * torch.eye(rank, dtype=b.dtype)).abs().max()
        outside = 0.0 if q is None else float((b - q @ (q.T @ b)).norm()) / b.shape[1]
        for part, proof in zip(a.chunk(len(of)), of, strict=True):
            before = float(part.norm())
            off = float(np.max([abs(before - proof.before), abs((1 - proof.strength) * before - proof.after)]))
            right = off <= _SLACK * before and proof.after <= proof.norm + _SLACK * before < math.inf
            if not (float(gram) <= _SLACK and outside <= _SLACK and right and proof.holds):
                raise CheckpointError(
                    f"{folder / ADAPTER}: {key} does not take {proof.strength} of the directions out of "
                    f"{proof.tensor}, which is certified; bake again"
                )


def _check_adds(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Outside the ablated directions, a bias changes by what is added and by nothing else."""
    shifts = edit.biases()
    for proof in cert.biases:
        assert proof.site is not None
        whole = stored[proof.tensor].double()
        # Of the biases of experts: what all of them gain is A's last row.
        got, shift = (whole[-1] if whole.ndim == 2 else whole), shifts[proof.site]
        rest = got - shift
        if any(w.key == proof.tensor and w.bias for w in cert.writers) and whole.ndim == 1:
            q = edit.basis(proof.site)
            rest = rest - q @ (q.T @ rest)
        slack = _SLACK * proof.norm
        if not (abs(float(whole.norm()) - proof.norm) <= slack and float(rest.norm()) <= slack):
            raise CheckpointError(f"{folder / ADAPTER}: {proof.tensor} is not the bias certified; bake again")


def _check_source(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor], source: Path) -> Check:
    """The adapter, computed from the source again."""
    plan = AdapterPlan.of(source, edit)
    hashes = hash_sources(plan.files)
    for name, sha in hashes.items():
        if cert.source_files.get(name) != sha:
            raise CheckpointError(
                f"{source / name}: is not the file that {folder} was made from; give that checkpoint with --source"
            )
    same_set(folder, "source's file", set(cert.source_files), set(hashes))
    proofs = Proofs()
    again = dict(adapter_tensors(plan, plan.parts, proofs))
    same_set(folder, "tensor", set(stored), set(again))
    for part in plan.parts:
        names = sorted(n for n in again if n.startswith(f"{part.key}.lora_"))  # A, B, and the bias of B if it has one
        a, *bias, b = names
        off, size = _distance([(t[a].double(), t[b].double()) for t in (stored, again)], part.rank)
        wrong = [] if off <= _SLACK * size else [a]
        wrong += [n for n in bias if not float((stored[n] - again[n]).norm()) <= _SLACK * float(again[n].norm())]
        if wrong:
            raise CheckpointError(f"{folder / ADAPTER}: {wrong[0]} is not what {source} gives; bake again")
    config = adapter_config("", plan.anatomy, plan.parts, plan.biases)
    told = json.loads((folder / CONFIG).read_bytes()) | {"base_model_name_or_path": ""}
    ours, theirs = ({p.tensor: p for p in of} for of in (proofs.writers, cert.writers))
    wrong = {
        CONFIG: told != json.loads(json.dumps(config)),
        "architecture": cert.architecture != plan.anatomy.architecture,
        "writers_found": cert.writers_found != len(plan.found.writers),
        "writers": ours.keys() != theirs.keys() or not all(_same_proof(ours[n], theirs[n]) for n in ours),
        "biases": {(b.tensor, b.site) for b in cert.biases} != {(b.tensor, b.site) for b in proofs.biases},
        "unloaded": cert.unloaded != plan.found.unloaded,
        "untie_to_merge": cert.untie_to_merge != plan.untie_to_merge,
    }
    check_claims(folder, wrong)
    return Check("source", f"all {len(again)} tensors come out of {source} again, whose files are those certified")


def _same_proof(ours: WriterProof, theirs: WriterProof) -> bool:
    """Whether two proofs of a writer say the same, numbers to the rounding of fp32."""
    plain = {"before": 0.0, "after": 0.0, "norm": 0.0}
    numbers = [(getattr(ours, name), getattr(theirs, name)) for name in plain]
    near = all(abs(a - b) <= _SLACK * ours.norm for a, b in numbers)
    return near and replace(ours, **plain) == replace(theirs, **plain)


def _distance(pairs: list[tuple[Tensor, Tensor]], rank: int) -> tuple[float, float]:
    """(`||B A - B' A'||`, `||B' A'||`) of two pairs (A, B), over all experts, without writing out the products.

    Only the products are the same on every machine: which basis of a subspace comes out depends on its libraries.
    """
    stacks = [(a.view(-1, rank, a.shape[-1]), b.view(len(b), rank, -1).permute(2, 0, 1)) for a, b in pairs]

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        return float(((one[1].mT @ other[1]) * (one[0] @ other[0].mT)).sum())

    got, wanted = stacks
    size = inner(wanted, wanted)
    square = inner(got, got) - 2 * inner(got, wanted) + size
    return 0.0 if square < 0 else square**0.5, size**0.5


def _normed(cert: Certificate, proof: WriterProof) -> bool:
    """Whether a norm stands between the writer and the residual stream."""
    layout = LAYOUTS[cert.architecture]
    norms = {"attention": layout.attention_norm, "mlp": layout.mlp_norm}
    return norms.get(proof.kind) is not None
