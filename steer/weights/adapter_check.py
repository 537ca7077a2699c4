"""The checks of `steer verify` on an adapter: from its files alone, and against the weights it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.errors import CheckpointError
from steer.values.edit import Edit
from steer.weights.adapter import CONFIG, AdapterPlan, hash_sources
from steer.weights.adapter_factors import Proofs, adapter_tensors
from steer.weights.anatomy import LAYOUTS
from steer.weights.certify import ADAPTER, Certificate, Check, ablation_check, same_set
from steer.weights.proofs import WriterProof

_SLACK = 1e-5  # of what two ways to sum in fp32 differ by, and fp32 directions


def check_adapter(folder: Path, cert: Certificate, edit: Edit, source: Path | None) -> list[Check]:
    """The checks that passed; `source` is the checkpoint it was made from, by default its base model if that is here.

    Errors: CheckpointError at the first thing that is not as certified, a source that is another one included.
    """
    stored = load_file(folder / ADAPTER)
    _check_factors(folder, cert, edit, stored)
    checks = [ablation_check(cert)]
    if cert.biases:
        _check_adds(folder, cert, edit, stored)
        checks.append(Check("add", f"biases at sites {', '.join(str(s) for s in sorted(edit.biases()))}"))
    base = json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"]
    if source is None and not Path(base).is_dir():
        return [*checks, Check("source", f"{base} is not on this disk, so that it was not compared; give --source")]
    checks.append(_check_source(folder, cert, edit, stored, source or Path(base)))
    return checks


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
            if not (float(gram) <= _SLACK and outside <= _SLACK and off <= _SLACK * proof.norm and proof.holds):
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
    for name, sha in hash_sources(plan.files).items():
        if cert.source_files.get(name) != sha:
            raise CheckpointError(
                f"{source / name}: is not the file that {folder} was made from; give that checkpoint with --source"
            )
    again = dict(adapter_tensors(plan, plan.parts, Proofs()))
    same_set(folder, "tensor", set(stored), set(again))
    for part in plan.parts:
        names = sorted(n for n in again if n.startswith(f"{part.key}.lora_"))  # A, B, and the bias of B if it has one
        a, *bias, b = names
        off, size = _distance([(t[a].double(), t[b].double()) for t in (stored, again)], part.rank)
        wrong = [] if off <= _SLACK * size else [a]
        wrong += [n for n in bias if not float((stored[n] - again[n]).norm()) <= _SLACK * float(again[n].norm())]
        if wrong:
            raise CheckpointError(f"{folder / ADAPTER}: {wrong[0]} is not what {source} gives; bake again")
    return Check("source", f"all {len(again)} tensors come out of {source} again, whose files are those certified")


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
