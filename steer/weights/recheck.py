"""The proofs of a certificate, computed again from the weights that were written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from steer.errors import CheckpointError
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.method import Kernel, Method, Strengths
from steer.weights.ablation import Ablation
from steer.weights.anatomy import Anatomy, Found
from steer.weights.arithmetic import as_tensor, projection
from steer.weights.certify import Certificate, Check, ablation_check, check_claims
from steer.weights.proofs import rounding
from steer.weights.stream import CheckpointFiles


def certified_edit(folder: Path, cert: Certificate) -> Edit:
    """The edit that a certificate tells, with the directions kept beside it."""
    loaded = [(Direction.load(folder / d.file), d.amount) for d in cert.directions]
    told = [(d.name, d.site, _text(d.provenance)) for d in cert.directions]
    check_claims(folder, {"directions": told != [(d.name, d.site, _text(d.provenance)) for d, _ in loaded]})
    blocks, strengths = cert.edit.get("blocks"), cert.edit.get("strengths")
    kernels: dict[str, Any] = {k: Kernel(**v) if isinstance(v, dict) else v for k, v in (strengths or {}).items()}
    edit = Edit(
        ablate=tuple(d for d, amount in loaded if amount is None),
        strength=cert.edit.get("strength") or 1.0,
        blocks=(blocks[0], blocks[1]) if isinstance(blocks, list) else None,
        add=tuple((d, amount) for d, amount in loaded if amount is not None),
        method=Method(
            **cert.edit.get("method", {}), neutral=_load_neutral(folder / cert.neutral) if cert.neutral else None
        ),
        strengths=None if strengths is None else Strengths(**kernels),
    )
    check_claims(folder, {"edit": _text(edit.describe()) != _text(cert.edit)})
    return edit


def check_weights(files: CheckpointFiles, cert: Certificate, edit: Edit) -> list[Check]:
    """What the writers of a baked checkpoint still put into the directions, and what its biases add.

    Errors: CheckpointError at the first tensor that is not as certified.
    """
    anatomy = Anatomy.of(files.config, str(files.root))
    found = anatomy.find(files.config, files.tensors)
    _check_claims(files, cert, edit, anatomy, found)
    checks = [_check_shares(files, cert, edit, found, Ablation.of(edit, anatomy, files))]
    return [*checks, _check_biases(files, cert, edit)] if cert.biases else checks


def _check_claims(files: CheckpointFiles, cert: Certificate, edit: Edit, anatomy: Anatomy, found: Found) -> None:
    """Everything that the edit and the files decide: which tensors must have a proof, and what it must say."""
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


def _check_shares(files: CheckpointFiles, cert: Certificate, edit: Edit, found: Found, ablation: Ablation) -> Check:
    if not edit.ablate:
        return ablation_check(cert)
    writers, shifts = {name: w for w in found.writers for name in (w.tensor, w.bias)}, edit.biases()
    for proof in cert.writers:
        shift = shifts.get(proof.block) if proof.block is not None and proof.kind == "mlp" else None
        q = ablation.subspace(writers[proof.tensor])
        after, size = projection(_stored(files, proof.tensor), q, proof.axis, bias=proof.bias, shift=shift)
        slack = rounding(proof.dtype) * size
        # What was there before is bound to what is left, where the strength leaves anything.
        right = abs(size - proof.norm) <= 1e-3 * size and 0 <= proof.before < math.inf
        right = right and abs(after - (1 - proof.strength) * proof.before) <= slack + 1e-3 * after
        # Both numbers come from the same bytes: only the order of summation and the stored direction differ.
        if not (abs(after - proof.after) <= 1e-3 * proof.after + 1e-6 * size and proof.holds and right):
            raise CheckpointError(
                f"{files.root}: {proof.tensor} puts {after:.3g} into the ablated directions, certified were "
                f"{proof.after:.3g} of {proof.before:.3g} at strength {proof.strength}; bake again"
            )
    return ablation_check(cert)


def _check_biases(files: CheckpointFiles, cert: Certificate, edit: Edit) -> Check:
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


def _text(value: Any) -> str:
    """A value as JSON, to compare what was computed with what was read; unlike numbers, nan equals nan in it."""
    return json.dumps(value, sort_keys=True)


def _load_neutral(path: Path) -> Float[Tensor, "blocks d"]:
    """The neutral means that a method spared."""
    return load_file(path)["neutral"]


def _stored(files: CheckpointFiles, name: str) -> Tensor:
    info = files.tensors[name]
    return as_tensor(files.read(info), info.dtype, info.shape)
