"""The checks of `steer verify` on a baked checkpoint: from its files alone, and against its source.

`verify` has already compared hashes and names when it calls `check_weights` and, with a source, `check_source`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from steer.baking.adapter import hash_sources
from steer.baking.bake import changes_of
from steer.baking.certificate import Certificate, Check
from steer.baking.checks import ablation_check, check_claims, same_set
from steer.baking.plan import BakePlan
from steer.baking.proofs import rounding
from steer.checkpoint.ablation import Ablation, as_tensor, projection
from steer.checkpoint.anatomy import Anatomy, WriterMap
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import CheckpointFiles, TensorInfo
from steer.core.edit import Edit
from steer.errors import CheckpointError


def check_weights(files: CheckpointFiles, cert: Certificate, edit: Edit) -> list[Check]:
    """Measure what the writers of a baked checkpoint still put into the directions, and what its biases add. Returns
    the checks that passed.

    Errors: CheckpointError at the first tensor that is not as certified.
    """
    anatomy = Anatomy.of(files.config, str(files.root))
    found = anatomy.find(files.config, files.tensors)
    _check_claims(files, cert, edit, anatomy, found)
    checks = [_check_shares(files, cert, edit, found, Ablation.of(edit, anatomy, files))]
    return [*checks, _check_biases(files, cert, edit)] if cert.biases else checks


def _check_claims(files: CheckpointFiles, cert: Certificate, edit: Edit, anatomy: Anatomy, found: WriterMap) -> None:
    """Check all entries that the edit and the files determine: which tensors must have a proof, and what it must
    say."""
    ablation = Ablation.of(edit, anatomy, files)
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
    sites = edit.biases()
    adds: set[tuple[str | None, int | None]] = {
        (w.bias, w.block) for w in found.writers if w.kind == "mlp" and w.bias and w.block in sites
    }
    added = str(anatomy.layout.mlp_bias) in cert.config
    adds |= {(f"{m}.bias", None) for m in anatomy.bias_carriers()} - {(b, None) for b, _ in adds} if added else set()
    wrong = {
        "architecture": cert.architecture != anatomy.architecture,
        "writers_found": cert.writers_found != len(found.writers),
        "writers": claimed != proofs or len(cert.writers) != len(proofs),
        "strength": cert.strength != min((p[-1] for p in proofs), default=edit.strength),
        "biases": {(b.tensor, b.site) for b in cert.biases} != adds
        or len(cert.biases) != len(adds)
        or any(b.created != added for b in cert.biases),
        "unloaded": cert.unloaded != found.unloaded,
        "untie_to_merge": cert.untie_to_merge,
    }
    check_claims(files.root, wrong)


def _check_shares(files: CheckpointFiles, cert: Certificate, edit: Edit, found: WriterMap, ablation: Ablation) -> Check:
    """Measure each ablated tensor again and compare it with its proof."""
    if not edit.ablate:
        return ablation_check(cert)
    writers, shifts = {name: w for w in found.writers for name in (w.tensor, w.bias)}, edit.biases()
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
    return ablation_check(cert)


def _check_biases(files: CheckpointFiles, cert: Certificate, edit: Edit) -> Check:
    """Compare the biases that carry an add with their proofs."""
    shifts = edit.biases()
    for proof in cert.biases:
        bias = _stored(files, proof.tensor).double()
        right = abs(float(bias.norm()) - proof.norm) <= 1e-6 * proof.norm
        if proof.created:
            expected = torch.zeros_like(bias) if proof.site is None else shifts[proof.site]
            slack = rounding(files.tensors[proof.tensor].dtype) * float(expected.norm())
            right = right and float((bias - expected).norm()) <= slack
        if not right:
            raise CheckpointError(f"{files.root}: {proof.tensor} is not the bias certified; bake again")
    return Check("add", f"biases at sites {', '.join(str(s) for s in sorted(shifts))}")


def check_source(files: CheckpointFiles, cert: Certificate, edit: Edit, source: Path) -> Check:
    """Bake the source again, one tensor in memory at a time, and compare the result with the files.

    Errors: CheckpointError if `source` is another checkpoint, and at the first tensor that differs.
    """
    plan = BakePlan.of(dequantised(CheckpointFiles.open(source)), edit)
    hashes = hash_sources(plan.files)
    for name, sha in hashes.items():
        if cert.source_files.get(name) != sha:
            raise CheckpointError(f"{source / name}: is not the file that {files.root} was made from; give that source")
    same_set(files.root, "source's file", set(cert.source_files), set(hashes))
    if cert.config != plan.files.decoded | plan.config or files.config != plan.files.config | plan.config:
        raise CheckpointError(f"{files.root / 'config.json'}: is not what {source} gives; bake again")
    new = {t.name: t for tensors in plan.new.values() for t in tensors}
    same_set(files.root, "tensor", set(files.tensors), set(plan.files.tensors) | set(new))
    editor, changes = changes_of(plan)
    for name, stored in files.tensors.items():
        source_tensor = plan.files.tensors.get(name)
        expected = new[name].data if source_tensor is None else plan.files.read(source_tensor)
        if isinstance(expected, TensorInfo):
            expected = plan.files.read(expected)
        found = files.read(stored)
        if name not in changes:
            right = found == expected
        else:
            data = bytearray(expected)
            changes[name](data)
            rebaked, on_disk = (as_tensor(d, stored.dtype, stored.shape).double() for d in (data, found))
            # Both are rounded once; sums differ between machines in their last bit.
            right = float((rebaked - on_disk).norm()) <= rounding(stored.dtype) * float(rebaked.norm())
        if not right:
            raise CheckpointError(f"{files.root}: {name} is not what {source} gives; bake again")
    claimed = {p.tensor: p.before for p in cert.writers}
    for proof in editor.writers:
        if not abs(claimed[proof.tensor] - proof.before) <= 1e-3 * proof.before + 1e-6 * proof.norm:
            raise CheckpointError(f"{files.root}: {proof.tensor} put {proof.before:.3g} into the directions in the "
                                  f"source, certified were {claimed[proof.tensor]:.3g}; bake again")  # fmt: skip
    return Check(
        "source", f"all {len(files.tensors)} tensors come out of {source} again, whose files are those certified"
    )


def _stored(files: CheckpointFiles, name: str) -> Tensor:
    info = files.tensors[name]
    return as_tensor(files.read(info), info.dtype, info.shape)
