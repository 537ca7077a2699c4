"""The certificate of a bake: what was measured on the files it wrote.

The bakes write it, `steer.baking.verify` checks files against it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.chat_templates import FILE as CHAT_TEMPLATE
from steer.checkpoint.layouts import LAYOUTS, Layout, Structure
from steer.checkpoint.staging import write_json
from steer.core.version import __version__
from steer.errors import CheckpointError
from steer.files import one_line, read_json_object

Form = Literal["checkpoint", "adapter", "gguf"]
"""The forms of output: a whole checkpoint, a PEFT LoRA for the source, or files for llama.cpp."""
FORMS: tuple[Form, ...] = get_args(Form)
CERTIFICATE = "steer_certificate.json"
CONTROL_VECTOR = "control_vector.gguf"
DIRECTIONS = "steer_directions"
"""Folder in the output for the directions."""
_FORMAT = 2
_EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


def rounding(dtype: str) -> float:
    """Bound on the error of a projection caused by storing the tensor, as a share of the writer's norm: half a unit in
    the last place of each element would do, and the error of the arithmetic is smaller than the other half.

    fp32 is summed in fp64, narrower dtypes in fp32; directions are stored in fp32.
    """
    return max(_EPSILON[dtype], 1e-6)


def proved_structure(anatomy: Anatomy) -> dict[str, Any] | None:
    """The structure of a proved architecture as JSON holds it; None for a declared one."""
    if anatomy.architecture in LAYOUTS:
        return None
    values = {f.name: getattr(anatomy, f.name) for f in fields(Structure)}
    return TypeAdapter(Structure).dump_python(Structure(**values), mode="json")


@dataclass(frozen=True)
class WriterProof:
    """How much one edited tensor puts into the ablated subspace, measured in the dtype it is stored in."""

    tensor: str
    kind: str
    block: int | None
    """None for the embedding."""
    axis: int
    """The axis that faces the residual stream."""
    bias: bool
    """Whether the tensor is a writer's bias, not its weight."""
    dtype: str
    strength: float
    """Strength of the ablation: a share of `1 - strength` should remain."""
    before: float
    """`||Q^T W||` in the source; `Q` is a basis of the subspace to remove from this writer's output."""
    after: float
    """`||Q^T W'||` in the output, without the vector that `add` put there."""
    norm: float
    """`||W'||`, to which rounding is relative."""
    key: str | None = None
    """Adapters: the tensor that holds `Q^T W`, or the change of a bias. Files for llama.cpp: FILE:TENSOR; there each
    file has its proof of a writer."""

    @property
    def remaining(self) -> float:
        """Share of the directions that remains; 0 if there was nothing to remove."""
        return self.after / self.before if self.before else 0.0

    @property
    def holds(self) -> bool:
        """Whether no more remains than the strength allows, up to rounding; False for nan."""
        return self.after <= (1 - self.strength) * self.before + rounding(self.dtype) * self.norm


@dataclass(frozen=True)
class BiasProof:
    """A tensor that carries an add, or one of the zero biases that have to be created with it."""

    tensor: str
    site: int | None
    """Site of the add; None for a zero bias."""
    created: bool
    """Whether the bake created the tensor."""
    norm: float
    """`||b'||`, the norm of the tensor in the output."""


@dataclass
class Proofs:
    """The proofs of a bake, or of one of its files."""

    writers: list[WriterProof] = field(default_factory=list)
    biases: list[BiasProof] = field(default_factory=list)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Proofs:
        """The proofs in a certificate, or in an entry of the journal."""
        return cls([WriterProof(**w) for w in facts["writers"]], [BiasProof(**b) for b in facts["biases"]])


@dataclass(frozen=True)
class SavedDirection:
    """A direction of the edit, stored in the output so that the proof can be repeated."""

    file: str
    name: str
    site: int
    amount: float | None
    """Amount of an add, in gaps; None for an ablated direction."""
    provenance: dict[str, Any]
    """How the direction was made, from its file."""


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
    """Number of weights that write into the residual stream, edited or not; 0 in a control vector
    alone, which changes none."""
    writers: tuple[WriterProof, ...]
    """One proof for each ablated weight, and for its bias if it has one; in files for llama.cpp, of each file."""
    biases: tuple[BiasProof, ...]
    """One proof for each bias that adds, and for the zero biases that had to be created with them."""
    directions: tuple[SavedDirection, ...]
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
    structure: dict[str, Any] | None = None
    """Adapters and files for llama.cpp: the `Structure` of a source whose anatomy was proved, so that they can be
    checked without it; None where the layout is declared."""
    edit_mtp: bool = False
    """Whether layers for multi-token prediction with the shape of a block are edited too; their writers are then among
    `writers` and `writers_found`, those that go on from the last block with its number."""
    unloaded: tuple[str, ...] = ()
    """Tensors of the source that transformers does not load into its architecture and that are not edited."""
    untie_to_merge: bool = False
    """Adapters: whether the adapter changes an embedding that is also the LM head, which merging would change too."""

    def proved(self, folder: Path) -> Structure | None:
        """The structure of the source, None where it is declared. Errors: CheckpointError for one that is missing or
        broken."""
        if self.architecture in LAYOUTS and self.structure is None:
            return None
        try:
            return TypeAdapter(Structure).validate_python(self.structure)
        except ValidationError as e:
            raise CheckpointError(
                f"{folder}: architecture {self.architecture} of the certificate is unknown; bake again"
            ) from e

    def layout(self, folder: Path) -> Layout:
        """The names of the architecture's parts. Errors: as `proved`."""
        found = self.proved(folder)
        return LAYOUTS[self.architecture] if found is None else found.layout

    @property
    def writers_edited(self) -> int:
        """Number of ablated weights, not counting biases."""
        return len({w.tensor for w in self.writers if not w.bias})

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
            proofs = Proofs.of(body)
            body["writers"], body["biases"] = tuple(proofs.writers), tuple(proofs.biases)
            body["directions"] = tuple(SavedDirection(**d) for d in body["directions"])
            for key in ("left_out", "unloaded"):
                body[key] = tuple(body.get(key, ()))
            return cls(**body)

    def check_tensors(self, folder: Path, found: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> None:
        """Raise CheckpointError unless the tensors, name -> (file, dtype, shape), are the certified ones."""
        same_set(folder, "tensor", set(found), set(self.tensors))
        for name, (file, dtype, shape) in found.items():
            if [file, dtype, list(shape)] != self.tensors[name]:
                raise CheckpointError(
                    f"{folder / file}: tensor {name} is {dtype} {list(shape)}, expected {self.tensors[name]}; "
                    "bake again"
                )


def same_set(folder: Path, what: str, found: set[str], expected: set[str]) -> None:
    """Raise CheckpointError that names one thing that is missing or unexpected, if the two sets differ."""
    for names, problem in ((expected - found, "is missing"), (found - expected, "was not expected")):
        if names:
            raise CheckpointError(f"{folder}: {what} {min(names)} {problem}; remove it all and bake again")


@contextmanager
def refusing_other_contents(path: Path) -> Iterator[None]:
    """Turn any exception that values of the wrong type cause into one CheckpointError that names `path`.

    The certificate's own hash does not prevent such values: anybody can compute it.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as e:
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


def source_name(root: Path) -> str:
    """The hub name of a checkpoint if its path shows it, else the name of its directory."""
    return hub_name(root) or utf8(root.resolve().name)


def hub_name(root: Path) -> str | None:
    """The hub name of a checkpoint in the hub's cache, `models--org--name/snapshots/<commit>`; None elsewhere."""
    parts = (part for part in root.resolve().parts if part.startswith("models--"))
    return next(("/".join(part.split("--", 2)[1:]) for part in parts), None)


def utf8(name: str) -> str:
    """A name or a command for people. Bytes that are not UTF-8 become `?`, because JSON cannot hold them."""
    return name.encode(errors="replace").decode()


def lora_files(cert: Certificate) -> list[str]:
    """The LoRAs for llama.cpp in an output, in the order of its ids."""
    return list(dict.fromkeys(str(w.key).partition(":")[0] for w in cert.writers)) if cert.form == "gguf" else []


def server_command(cert: Certificate, folder: str = "") -> str:
    """The command that starts llama-server with the files of an output in `folder`, by default in the current one."""
    words = ["llama-server", "-m", "MODEL.gguf"]

    def row(files: Sequence[str]) -> str:
        """Both options take a row of CSV; of an option that is repeated llama.cpp b11549 uses the last one."""
        paths = [os.path.join(folder, file) for file in files]
        return ",".join(f'"{path}"' if "," in path else path for path in paths)

    if loras := lora_files(cert):
        # Its cache in RAM keeps prompts by their tokens alone (b11549), and a request at one scale would go on from
        # what was read at another.
        words += ["--lora", row(loras), "--cache-ram", "0"]
    if cert.biases:
        words += ["--control-vector", row([CONTROL_VECTOR])]
    if CHAT_TEMPLATE in cert.files:
        words += ["--jinja", "--chat-template-file", os.path.join(folder, CHAT_TEMPLATE)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Versions of the programs that an output depends on."""
    import torch

    return {"steer": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
