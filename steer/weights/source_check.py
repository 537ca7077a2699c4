"""A baked checkpoint against its source: every tensor it has no business with byte for byte, every edit done again."""

from __future__ import annotations

from pathlib import Path

from steer.errors import CheckpointError
from steer.values.edit import Edit
from steer.weights.adapter import hash_sources
from steer.weights.arithmetic import as_tensor
from steer.weights.bake import changes_of
from steer.weights.certify import Certificate, Check, same_set
from steer.weights.plan import Plan
from steer.weights.proofs import rounding
from steer.weights.quantised import dequantised
from steer.weights.stream import CheckpointFiles, TensorInfo


def check_source(files: CheckpointFiles, cert: Certificate, edit: Edit, source: Path) -> Check:
    """Compare a bake with the checkpoint that it was made from, one tensor in memory at a time.

    Errors: CheckpointError for a source that is another one, and at the first tensor that it does not give.
    """
    plan = Plan.of(dequantised(CheckpointFiles.open(source)), edit)
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
        of = plan.files.tensors.get(name)
        expected = new[name].data if of is None else plan.files.read(of)
        if isinstance(expected, TensorInfo):
            expected = plan.files.read(expected)
        found = files.read(stored)
        if name not in changes:
            right = found == expected
        else:
            data = bytearray(expected)
            changes[name](data)
            ours, theirs = (as_tensor(d, stored.dtype, stored.shape).double() for d in (data, found))
            # Both round once; sums differ between machines in their last bit.
            right = float((ours - theirs).norm()) <= rounding(stored.dtype) * float(ours.norm())
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
