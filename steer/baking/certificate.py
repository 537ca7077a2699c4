"""The certificate of a bake: what was measured on the files it wrote; and the result of one check of it.

The bakes write it, `steer.baking.verify` checks files against it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steer.baking.form import Form
from steer.baking.proofs import BiasProof, SavedDirection, WriterProof
from steer.checkpoint.staging import write_json
from steer.errors import CheckpointError
from steer.files import one_line, read_json_object

CERTIFICATE = "steer_certificate.json"
ADAPTER = "adapter_model.safetensors"
"""File of an adapter's weights, as peft names it."""
_FORMAT = 2


@dataclass(frozen=True)
class Certificate:
    """What a bake did, measured on the files it wrote.

    Example:
        certificate = steer.Certificate.load(Path("baked"))
        print(certificate.writers_edited, certificate.worst_remaining)
    """

    source: str
    """Hub name of the source if its path shows it, else the name of its directory."""
    architecture: str
    edit: dict[str, Any]
    """The result of `Edit.describe()`."""
    strength: float
    """Lowest strength of the ablation at any writer: no writer should keep more than a share of `1 - strength`."""
    neutral: str | None
    """File in the output with the neutral means that the method spared; None if it spared none."""
    writers_found: int
    """Number of weights that write into the residual stream, edited or not."""
    writers: tuple[WriterProof, ...]
    """One proof for each ablated weight, and for its bias if it has one."""
    biases: tuple[BiasProof, ...]
    """One proof for each bias that adds, and for the zero biases that had to be created with them."""
    directions: tuple[SavedDirection, ...]
    """The directions of the edit, with the files in the output that hold them."""
    config: dict[str, Any]
    """Changed entries of config.json, with their new values."""
    tensors: dict[str, list[Any]]
    """Name -> [file, dtype, shape] of every tensor in the output."""
    source_files: dict[str, str]
    """sha256 of the source's weight files, its index and its config."""
    files: dict[str, str]
    """sha256 of every file in the output, except the certificate and hidden files."""
    left_out: tuple[str, ...]
    """Files of the source that are not in the output: weights in other formats, an older certificate."""
    versions: dict[str, str]
    command: str | None
    """The exact command line; None if called from Python."""
    form: Form = "checkpoint"
    """Form of the output."""
    unloaded: tuple[str, ...] = ()
    """Tensors of the source that transformers does not load into its architecture, such as blocks that predict several
    tokens; they are not edited."""
    untie_to_merge: bool = False
    """Adapters: whether the adapter changes an embedding that is also the LM head, which merging would change too."""

    @property
    def writers_edited(self) -> int:
        """Number of ablated weights, not counting biases."""
        return sum(not w.bias for w in self.writers)

    @property
    def worst_remaining(self) -> float:
        """Largest share of the directions that remains in any edited weight; `1 - strength` was asked for."""
        return max((w.remaining for w in self.writers), default=0.0)

    def save(self, folder: Path) -> Path:
        """Write steer_certificate.json, which ends with its own hash."""
        body = {"format": _FORMAT, **asdict(self)}
        write_json(folder / CERTIFICATE, {**body, "sha256": _digest(body)})
        return folder / CERTIFICATE

    @classmethod
    def load(cls, folder: Path) -> Certificate:
        """Read a certificate that `save` wrote.

        Errors: CheckpointError if there is none, or it was changed since it was written.
        """
        path = folder / CERTIFICATE
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a certificate, found none; `steer bake` writes one")
        body = read_json_object(path, what="a certificate", do="was changed since it was written; bake again")
        if body.pop("sha256", None) != _digest(body):
            raise CheckpointError(f"{path}: was changed since it was written; bake again")
        if body.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path}: is of another version of steer, expected format {_FORMAT}; bake again")
        with refusing_other_contents(path):
            body["writers"] = tuple(WriterProof(**w) for w in body["writers"])
            body["biases"] = tuple(BiasProof(**b) for b in body["biases"])
            body["directions"] = tuple(SavedDirection(**d) for d in body["directions"])
            for key in ("left_out", "unloaded"):
                body[key] = tuple(body.get(key, ()))
            return cls(**body)


@dataclass(frozen=True)
class Check:
    """One fact that `verify` found to be as certified."""

    name: str
    detail: str


_WRONG_KINDS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError)


@contextmanager
def refusing_other_contents(path: Path) -> Iterator[None]:
    """Turn any exception that values of the wrong type cause into one CheckpointError that names `path`.

    The certificate's own hash does not prevent such values: anybody can compute it.
    """
    try:
        yield
    except _WRONG_KINDS as e:
        found = f"{type(e).__name__} {one_line(e)}"
        raise CheckpointError(f"{path}: expected what a bake writes, found other contents ({found}); bake again") from e


def visible_files(folder: Path) -> list[str]:
    """Paths of all files below a directory, relative and sorted, without hidden files and directories."""
    out = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        out += [Path(parent, n).relative_to(folder).as_posix() for n in names if not n.startswith(".")]
    return sorted(out)


def inside(path: Path, root: Path) -> bool:
    """Whether a file is in the checkpoint, or in the blobs of the hub cache if the checkpoint is a snapshot there."""
    place, checkpoint = path.resolve(), root.resolve()
    blobs = checkpoint.parent.parent / "blobs" if checkpoint.parent.name == "snapshots" else checkpoint
    return place.is_relative_to(checkpoint) or place.is_relative_to(blobs)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
