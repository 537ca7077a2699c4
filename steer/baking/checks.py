"""Checks that all forms of output share; the `*_check` modules use them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from steer.baking.certificate import Certificate, Check
from steer.errors import CheckpointError


def same_set(folder: Path, what: str, found: set[str], expected: set[str]) -> None:
    """Raise CheckpointError that names one thing that is missing or unexpected, if the two sets differ."""
    for names, problem in ((expected - found, "is missing"), (found - expected, "was not expected")):
        if names:
            raise CheckpointError(f"{folder}: {what} {min(names)} {problem}; remove it all and bake again")


def check_tensors(folder: Path, cert: Certificate, found: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> None:
    """Raise CheckpointError unless the tensors, name -> (file, dtype, shape), are the certified ones."""
    same_set(folder, "tensor", set(found), set(cert.tensors))
    for name, (file, dtype, shape) in found.items():
        if [file, dtype, list(shape)] != cert.tensors[name]:
            raise CheckpointError(
                f"{folder / file}: tensor {name} is {dtype} {list(shape)}, expected {cert.tensors[name]}; bake again"
            )


def check_claims(folder: Path, wrong: Mapping[str, bool]) -> None:
    """Raise CheckpointError for the first entry of a certificate that is wrong. `wrong`: entry -> whether it differs
    from what the edit and the files give."""
    if key := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise CheckpointError(
            f"{folder}: {key} of the certificate is not what its edit and these files come to; bake again"
        )


def ablation_check(cert: Certificate) -> Check:
    """The result of the ablation's check, to be reported once it has passed."""
    if not cert.writers:
        return Check("ablation", "none asked for")
    return Check(
        "ablation",
        f"{cert.writers_edited} of {cert.writers_found} writers, at most {cert.worst_remaining:.2%} remains "
        f"({1 - cert.strength:.0%} asked for)",
    )
