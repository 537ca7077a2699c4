"""The checks of `steer verify` on a control vector, from its files alone: it contains nothing of its source."""

from __future__ import annotations

from pathlib import Path

from steer.baking.certificate import Certificate, Check
from steer.baking.checks import check_claims, check_tensors, same_set
from steer.baking.control_vector import FILE, read_control_vector
from steer.checkpoint.layouts import LAYOUTS
from steer.core.edit import Edit
from steer.errors import CheckpointError, SteerError


def check_control_vector(folder: Path, cert: Certificate, edit: Edit) -> list[Check]:
    """Check that the tensors are the certified ones and equal the sums of the directions stored beside them. Returns
    the checks that passed.

    Errors: CheckpointError at the first difference from the certificate.
    """
    try:
        vectors, facts = read_control_vector(folder / FILE)
    except SteerError as e:
        raise CheckpointError(str(e)) from e
    shifts = {site: shift for site, shift in edit.biases().items() if shift.any()}
    same_set(folder, "tensor", {f"direction.{s}" for s in vectors}, {f"direction.{s}" for s in shifts})
    check_tensors(folder, cert, {f"direction.{s}": (FILE, "F32", tuple(v.shape)) for s, v in vectors.items()})
    layout = LAYOUTS.get(cert.architecture)
    norms = {b.tensor: b.norm for b in cert.biases}
    wrong = {
        "architecture": layout is None or facts.get("model_hint") != layout.model_type,
        "writers": bool(cert.writers or cert.writers_found or cert.unloaded or cert.untie_to_merge),
        "strength": cert.strength != edit.strength or bool(edit.ablate),
        "config": cert.config != {},
        "biases": [(b.tensor, b.site, b.created) for b in cert.biases] != [(f"direction.{s}", s, True) for s in vectors]
        or not all(abs(norms[f"direction.{s}"] - float(v.double().norm())) <= 1e-6 * float(v.norm())
                   for s, v in vectors.items()),
    }  # fmt: skip
    for site, vector in vectors.items():
        shift = shifts[site]
        if not float((vector - shift).norm()) <= 1e-6 * float(shift.norm()):
            raise CheckpointError(
                f"{folder / FILE}: direction.{site} is not what the directions beside it add up to; bake again"
            )
    check_claims(folder, wrong)
    contents = Check("contents", "no file or tensor missing, none unexpected")
    return [contents, Check("add", f"{', '.join(f'direction.{s}' for s in vectors)} of a control vector")]
