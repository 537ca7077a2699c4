"""The checks of `steer verify` that compute: what a checkpoint or a control vector holds, and what its source gives.

`verify` has already compared hashes and names. Each check raises CheckpointError at the first difference from the
certificate. `adapter_check` has those of adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.baking.adapter import hash_sources
from steer.baking.certificate import Certificate, Proofs, rounding, same_set
from steer.baking.checkpoint import CheckpointPlan
from steer.baking.control_vector import FILE, read_control_vector
from steer.checkpoint.ablation import Ablation, as_tensor, projection
from steer.checkpoint.anatomy import Anatomy, WriterMap
from steer.checkpoint.layouts import LAYOUTS
from steer.checkpoint.reader import CheckpointFiles, TensorInfo
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Method, Strengths
from steer.errors import CheckpointError, SteerError


def certified_edit(folder: Path, cert: Certificate) -> Edit:
    """The edit that a certificate describes, with the directions stored in the output."""
    loaded = [(Direction.load(folder / d.file), d.amount) for d in cert.directions]
    certified = [(d.name, d.site, _text(d.provenance)) for d in cert.directions]
    check_claims(folder, {"directions": certified != [(d.name, d.site, _text(d.provenance)) for d, _ in loaded]})
    blocks, strengths = cert.edit.get("blocks"), cert.edit.get("strengths")
    kernels: dict[str, Any] = {k: Kernel(**v) if isinstance(v, dict) else v for k, v in (strengths or {}).items()}
    neutral = load_file(folder / cert.neutral)["neutral"] if cert.neutral else None
    edit = Edit(
        ablate=tuple(d for d, amount in loaded if amount is None),
        strength=cert.edit.get("strength") or 1.0,
        blocks=(blocks[0], blocks[1]) if isinstance(blocks, list) else None,
        add=tuple((d, amount) for d, amount in loaded if amount is not None),
        method=Method(**cert.edit.get("method", {}), neutral=neutral),
        strengths=None if strengths is None else Strengths(**kernels),
    )
    check_claims(folder, {"edit": _text(edit.describe()) != _text(cert.edit)})
    return edit


def _text(value: Any) -> str:
    """A value as JSON, for comparing computed values with values from a file; nan equals nan in it, unlike in
    numbers."""
    return json.dumps(value, sort_keys=True)


def check_claims(folder: Path, wrong: Mapping[str, bool]) -> None:
    """Raise CheckpointError for the first entry of a certificate that is wrong. `wrong`: entry -> whether it differs
    from what the edit and the files give."""
    if key := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise CheckpointError(
            f"{folder}: {key} of the certificate is not what its edit and these files come to; bake again"
        )


def check_sources(folder: Path, cert: Certificate, source: CheckpointFiles) -> None:
    """Check that the output was made from the files of this source."""
    hashes = hash_sources(source)
    for name, sha in hashes.items():
        if cert.source_files.get(name) != sha:
            raise CheckpointError(
                f"{source.root / name}: is not the file that {folder} was made from; give that checkpoint with --source"
            )
    same_set(folder, "source's file", set(cert.source_files), set(hashes))


def check_checkpoint(files: CheckpointFiles, cert: Certificate, edit: Edit) -> None:
    """Measure what the writers of a baked checkpoint still put into the directions, and what its biases add."""
    anatomy = Anatomy.of(files.config, str(files.root))
    found = anatomy.find(files.config, files.tensors)
    ablation, shifts = Ablation.of(edit, anatomy, files), edit.biases()
    _check_claims(files, cert, edit, anatomy, found, ablation)
    writers = {name: w for w in found.writers for name in (w.tensor, w.bias)}
    for proof in cert.writers:
        shift = shifts.get(proof.block) if proof.block is not None and proof.kind == "mlp" else None
        q = ablation.subspace(writers[proof.tensor])
        after, size = projection(_stored(files, proof.tensor), q, proof.axis, bias=proof.bias, shift=shift)
        slack = rounding(proof.dtype) * size
        # If the strength leaves anything, the part measured before the edit follows from the part that is left.
        right = abs(size - proof.norm) <= 1e-3 * size and 0 <= proof.before < math.inf
        right = right and abs(after - (1 - proof.strength) * proof.before) <= slack + 1e-3 * after
        # Both numbers are computed from the same bytes; only the order of summation and the stored direction's rounding
        # differ.
        if not (abs(after - proof.after) <= 1e-3 * proof.after + 1e-6 * size and proof.holds and right):
            raise CheckpointError(
                f"{files.root}: {proof.tensor} puts {after:.3g} into the ablated directions, certified were "
                f"{proof.after:.3g} of {proof.before:.3g} at strength {proof.strength}; bake again"
            )
    for proof in cert.biases:
        bias = _stored(files, proof.tensor).double()
        right = abs(float(bias.norm()) - proof.norm) <= 1e-6 * proof.norm
        if proof.created:
            expected = torch.zeros_like(bias) if proof.site is None else shifts[proof.site]
            slack = rounding(files.tensors[proof.tensor].dtype) * float(expected.norm())
            right = right and float((bias - expected).norm()) <= slack
        if not right:
            raise CheckpointError(f"{files.root}: {proof.tensor} is not the bias certified; bake again")


def _check_claims(
    files: CheckpointFiles, cert: Certificate, edit: Edit, anatomy: Anatomy, found: WriterMap, ablation: Ablation
) -> None:
    """Check all entries that the edit and the files determine: which tensors must have a proof, and what it must
    say."""
    created = {b.tensor for b in cert.biases if b.created}
    proofs = set()
    for w in found.writers:
        strength = ablation.strength(w)
        for name in (w.tensor, w.bias) if strength > 0 else ():
            if name in files.tensors and name not in created:
                t, bias = files.tensors[name], name == w.bias
                axis = len(t.shape) - 1 if bias else w.axis
                proofs.add((name, w.kind, w.block, axis, bias, t.dtype, strength))
    claimed = {(p.tensor, p.kind, p.block, p.axis, p.bias, p.dtype, p.strength) for p in cert.writers}
    sites, added = edit.biases(), str(anatomy.layout.mlp_bias) in cert.config
    adds: dict[str | None, int | None] = {f"{m}.bias": None for m in anatomy.bias_carriers()} if added else {}
    adds |= {w.bias: w.block for w in found.writers if w.kind == "mlp" and w.bias and w.block in sites}
    wrong = {
        "architecture": cert.architecture != anatomy.architecture,
        "writers_found": cert.writers_found != len(found.writers),
        "writers": claimed != proofs or len(cert.writers) != len(proofs),
        "strength": cert.strength != min((p[-1] for p in proofs), default=edit.strength),
        "biases": {b.tensor: b.site for b in cert.biases} != adds
        or len(cert.biases) != len(adds)
        or any(b.created != added for b in cert.biases),
        "unloaded": cert.unloaded != found.unloaded,
        "untie_to_merge": cert.untie_to_merge,
    }
    check_claims(files.root, wrong)


def check_source(files: CheckpointFiles, cert: Certificate, edit: Edit, source: Path) -> str:
    """Bake the source again, one tensor in memory at a time, and compare the result with the files. Returns what was
    compared."""
    plan, proofs = CheckpointPlan(source, edit), Proofs()
    check_sources(files.root, cert, plan.files)
    if cert.config != plan.files.decoded | plan.config or files.config != plan.files.config | plan.config:
        raise CheckpointError(f"{files.root / 'config.json'}: is not what {source} gives; bake again")
    new = {t.name: t for _, t in plan.new}
    same_set(files.root, "tensor", set(files.tensors), set(plan.files.tensors) | set(new))
    changes = plan.functions(plan.files.tensors.values(), proofs)
    for name, stored in files.tensors.items():
        data = plan.files.tensors[name] if name in plan.files.tensors else new[name].data
        expected = bytearray(plan.files.read(data) if isinstance(data, TensorInfo) else data)
        found = files.read(stored)
        if name in changes:
            changes[name](expected)
            rebaked, on_disk = (as_tensor(d, stored.dtype, stored.shape).double() for d in (expected, found))
            # Both are rounded once; sums differ between machines in their last bit.
            right = float((rebaked - on_disk).norm()) <= rounding(stored.dtype) * float(rebaked.norm())
        else:
            right = found == expected
        if not right:
            raise CheckpointError(f"{files.root}: {name} is not what {source} gives; bake again")
    claimed = {p.tensor: p.before for p in cert.writers}
    for proof in proofs.writers:
        if not abs(claimed[proof.tensor] - proof.before) <= 1e-3 * proof.before + 1e-6 * proof.norm:
            raise CheckpointError(f"{files.root}: {proof.tensor} put {proof.before:.3g} into the directions in the "
                                  f"source, certified were {claimed[proof.tensor]:.3g}; bake again")  # fmt: skip
    return f"all {len(files.tensors)} tensors come out of {source} again, whose files are those certified"


def _stored(files: CheckpointFiles, name: str) -> Tensor:
    info = files.tensors[name]
    return as_tensor(files.read(info), info.dtype, info.shape)


def check_control_vector(folder: Path, cert: Certificate, edit: Edit) -> str:
    """Check that the tensors of a control vector are the certified ones and equal the sums of the directions stored
    beside them. Returns the names of the tensors."""
    try:
        vectors, hint = read_control_vector(folder / FILE)
    except SteerError as e:
        raise CheckpointError(str(e)) from e
    shifts = {f"direction.{site}": (site, shift) for site, shift in edit.biases().items() if shift.any()}
    tensors = {f"direction.{site}": vector for site, vector in vectors.items()}
    same_set(folder, "tensor", set(tensors), set(shifts))
    cert.check_tensors(folder, {name: (FILE, "F32", tuple(v.shape)) for name, v in tensors.items()})
    layout, norms = LAYOUTS.get(cert.architecture), {name: float(v.double().norm()) for name, v in tensors.items()}
    wrong = {
        "architecture": layout is None or hint != layout.model_type,
        "writers": bool(cert.writers or cert.writers_found or cert.unloaded or cert.untie_to_merge),
        "strength": cert.strength != edit.strength or bool(edit.ablate),
        "config": cert.config != {},
        "biases": [(b.tensor, b.site, b.created) for b in cert.biases] != [(n, shifts[n][0], True) for n in tensors]
        or not all(abs(b.norm - norms[b.tensor]) <= 1e-6 * norms[b.tensor] for b in cert.biases),
    }
    for name, vector in tensors.items():
        shift = shifts[name][1]
        if not float((vector - shift).norm()) <= 1e-6 * float(shift.norm()):
            raise CheckpointError(f"{folder / FILE}: {name} is not what the directions beside it add up to; bake again")
    check_claims(folder, wrong)
    return ", ".join(tensors)
