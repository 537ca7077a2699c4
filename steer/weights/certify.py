"""What was measured on the files that a bake wrote, and the check that they still are those files.

Imports no torch: what is missing or was changed is found before that, which computing the proofs again needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import CheckpointError, UsageError
from steer.files import one_line, read_json_object
from steer.weights.proofs import BiasProof, SavedDirection, WriterProof
from steer.weights.staging import hash_file, write_json
from steer.weights.stream import CheckpointFiles, Shard

if TYPE_CHECKING:
    from steer.weights.bakeable import Form

__all__ = ["CERTIFICATE", "BiasProof", "Certificate", "Check", "SavedDirection", "WriterProof", "inside", "verify",
           "visible_files"]  # fmt: skip

CERTIFICATE = "steer_certificate.json"
ADAPTER = "adapter_model.safetensors"
"""The weights of an adapter, as peft names them."""
_FORMAT = 2


@dataclass(frozen=True)
class Certificate:
    """What a bake did, measured on what it wrote."""

    source: str
    """The hub name of the source where its path tells it, else the name of its directory."""
    architecture: str
    edit: dict[str, Any]
    """`Edit.describe()`."""
    strength: float
    """The least strength of the ablation at any writer: none should keep more than a share of `1 - strength`."""
    neutral: str | None
    """The file in the output that holds the neutral means which the method spared, if it spared any."""
    writers_found: int
    """Weights that write into the residual stream, edited or not."""
    writers: tuple[WriterProof, ...]
    """The ablated ones, and their biases where they have some."""
    biases: tuple[BiasProof, ...]
    directions: tuple[SavedDirection, ...]
    config: dict[str, Any]
    """The entries of config.json that were changed, with their new values."""
    tensors: dict[str, list[Any]]
    """Name -> [file, dtype, shape] of every tensor in the output."""
    source_files: dict[str, str]
    """sha256 of the source's weight files, its index and its config."""
    files: dict[str, str]
    """sha256 of every file in the output but the certificate and hidden files."""
    left_out: tuple[str, ...]
    """Files of the source that the output does not have: weights in other formats, an older certificate."""
    versions: dict[str, str]
    command: str | None
    """The exact command, None when called from Python."""
    form: Form = "checkpoint"
    """What the output is."""
    unloaded: tuple[str, ...] = ()
    """Tensors of the source that transformers does not load into its architecture, as blocks that predict several
    tokens: they are not edited."""
    untie_to_merge: bool = False
    """Of an adapter: whether it changes an embedding that is the LM head too, which merging would change with it."""

    @property
    def writers_edited(self) -> int:
        """Weights that were ablated, their biases not counted."""
        return sum(not w.bias for w in self.writers)

    @property
    def worst_remaining(self) -> float:
        """The largest remaining share of any edited weight; `1 - strength` is what was asked for."""
        return max((w.remaining for w in self.writers), default=0.0)

    def save(self, folder: Path) -> Path:
        """Write steer_certificate.json, its own hash last in it."""
        body = {"format": _FORMAT, **asdict(self)}
        write_json(folder / CERTIFICATE, {**body, "sha256": _digest(body)})
        return folder / CERTIFICATE

    @classmethod
    def load(cls, folder: Path) -> Certificate:
        """Read what `save` wrote.

        Errors: CheckpointError when there is none, or it is not as it was written.
        """
        path = folder / CERTIFICATE
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a certificate, found none; `steer bake` writes one")
        body = read_json_object(path, what="a certificate", do="was changed since it was written; bake again")
        if body.pop("sha256", None) != _digest(body):
            raise CheckpointError(f"{path}: was changed since it was written; bake again")
        if body.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path}: is of another version of steer, expected format {_FORMAT}; bake again")
        with _contents(path):
            body["writers"] = tuple(WriterProof(**w) for w in body["writers"])
            body["biases"] = tuple(BiasProof(**b) for b in body["biases"])
            body["directions"] = tuple(SavedDirection(**d) for d in body["directions"])
            for key in ("left_out", "unloaded"):
                body[key] = tuple(body.get(key, ()))
            return cls(**body)


@dataclass(frozen=True)
class Check:
    """One thing that `verify` found to be as certified."""

    name: str
    detail: str


def verify(
    folder: Path, progress: Callable[[int, int], None] | None = None, *, source: Path | None = None
) -> list[Check]:
    """Re-read what a bake wrote and check everything its certificate says; the checks that passed, in order.

    `progress` is called with (bytes hashed, bytes in all). With `source`, the output is computed again from there; an
    adapter without it from its base model, where that is a directory of this machine. That the certificate is nobody
    else's is not checked: it has a hash, and no signature.

    Errors: CheckpointError at the first thing that is not as certified; UsageError for a source beside a control
    vector, which holds nothing of one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a baked checkpoint, found no directory; check the path")
    with _contents(folder / CERTIFICATE):
        return _verified(folder, progress, source)


def _verified(folder: Path, progress: Callable[[int, int], None] | None, source: Path | None) -> list[Check]:
    cert = Certificate.load(folder)
    if cert.form not in ("checkpoint", "adapter", "gguf"):
        raise CheckpointError(f"{folder / CERTIFICATE}: is of no form that a bake writes; bake again")
    if cert.form == "gguf" and source is not None:
        raise UsageError(
            "--source: expected none for a control vector, which holds nothing of its source; leave it out"
        )
    kept = [*(d.file for d in cert.directions), *([cert.neutral] if cert.neutral else [])]
    same_set(folder, "direction file", set(kept) - set(cert.files), set())
    checks = [Check("certificate", f"intact, {len(cert.files)} files and {len(cert.tensors)} tensors")]
    _check_folder(folder, cert)
    files = CheckpointFiles.open(folder) if cert.form == "checkpoint" else None
    if cert.form != "gguf":
        shards = files.shards if files else [Shard.open(folder / ADAPTER)]
        check_tensors(folder, cert, {t.name: (t.file, t.dtype, t.shape) for s in shards for t in s.tensors})
        checks.append(Check("contents", "no file or tensor missing, none unexpected"))
    _check_hashes(folder, cert.files, progress)
    checks.append(Check("sha256", f"{len(cert.files)} files as written"))
    if files is not None:
        checks.append(_check_config(folder, files, cert))
    if hidden := sorted(path.name for path in folder.iterdir() if path.name.startswith(".")):
        checks.append(Check("hidden files", f"not certified, and loaded by nothing: {', '.join(hidden)}"))
    from steer.weights.recheck import certified_edit, check_weights

    edit = certified_edit(folder, cert)
    if files is not None:
        checks += check_weights(files, cert, edit)
        if source is None:
            return checks
        from steer.weights.source_check import check_source

        return [*checks, check_source(files, cert, edit, source)]
    if cert.form == "gguf":
        from steer.weights.control_vector import check_control_vector

        return checks + check_control_vector(folder, cert, edit)
    from steer.weights.adapter_check import check_adapter

    return checks + check_adapter(folder, cert, edit, source)


@contextmanager
def _contents(path: Path) -> Iterator[None]:
    """What values of the wrong kind raise, as one line: anybody can compute the certificate's own hash."""
    try:
        yield
    except _WRONG_KINDS as e:
        found = f"{type(e).__name__} {one_line(e)}"
        raise CheckpointError(f"{path}: expected what a bake writes, found other contents ({found}); bake again") from e


_WRONG_KINDS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError)


def check_tensors(folder: Path, cert: Certificate, found: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> None:
    """Raise CheckpointError unless the tensors, name -> (file, dtype, shape), are those certified."""
    same_set(folder, "tensor", set(found), set(cert.tensors))
    for name, (file, dtype, shape) in found.items():
        if [file, dtype, list(shape)] != cert.tensors[name]:
            raise CheckpointError(
                f"{folder / file}: tensor {name} is {dtype} {list(shape)}, expected {cert.tensors[name]}; bake again"
            )


def visible_files(folder: Path) -> list[str]:
    """Paths of all files below a directory, relative and sorted; hidden files and directories left out."""
    out = []
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        out += [Path(here, n).relative_to(folder).as_posix() for n in names if not n.startswith(".")]
    return sorted(out)


def inside(path: Path, root: Path) -> bool:
    """Whether a file lies in the checkpoint, or in the blobs of the hub cache that the checkpoint is a snapshot of."""
    place, whole = path.resolve(), root.resolve()
    blobs = whole.parent.parent / "blobs" if whole.parent.name == "snapshots" else whole
    return place.is_relative_to(whole) or place.is_relative_to(blobs)


def _check_folder(folder: Path, cert: Certificate) -> None:
    """Raise CheckpointError for a visible file that is missing or not certified, a link out of the directory, a folder
    that holds nothing certified. Hidden ones, as of git and the hub's client, are nobody's business: nothing loads
    them."""
    same_set(folder, "file", set(visible_files(folder)), set(cert.files) | {CERTIFICATE})
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (Path(here, name) for name in names if not name.startswith(".")):
            if not inside(path, folder):
                raise CheckpointError(
                    f"{path}: expected a file in this directory, found a link that leads out of it; "
                    "put a copy in its place"
                )
        for path in (Path(here, name) for name in folders):
            held = f"{path.relative_to(folder).as_posix()}/"
            if path.is_symlink() or not any(name.startswith(held) for name in cert.files):
                found = "a link to a folder" if path.is_symlink() else "a folder without a certified file"
                raise CheckpointError(f"{path}: expected nothing of this name, found {found}; remove it")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def same_set(folder: Path, what: str, found: set[str], expected: set[str]) -> None:
    """Raise CheckpointError naming what is missing or was not expected."""
    for names, problem in ((expected - found, "is missing"), (found - expected, "was not expected")):
        if names:
            raise CheckpointError(f"{folder}: {what} {min(names)} {problem}; remove it all and bake again")


def _check_hashes(folder: Path, files: Mapping[str, str], progress: Callable[[int, int], None] | None) -> None:
    total, done = sum((folder / name).stat().st_size for name in files), 0
    pool = ThreadPoolExecutor(2)
    try:
        for name, found in zip(files, pool.map(hash_file, [folder / name for name in files]), strict=True):
            if found != files[name]:
                raise CheckpointError(
                    f"{folder / name}: sha256 is not the one certified, the file was changed; "
                    "remove the directory and bake again"
                )
            done += (folder / name).stat().st_size
            if progress:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_config(folder: Path, files: CheckpointFiles, cert: Certificate) -> Check:
    for key, value in cert.config.items():
        if files.config.get(key) != value:
            raise CheckpointError(
                f"{folder / 'config.json'}: expected {key} to be {value}, found {files.config.get(key)}; bake again"
            )
    return Check("config", ", ".join(f"{k} = {v}" for k, v in cert.config.items()) or "as in the source")


def check_claims(folder: Path, wrong: Mapping[str, bool]) -> None:
    """Raise CheckpointError for the first entry of a certificate that is not what its edit and the files come to."""
    if key := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise CheckpointError(
            f"{folder}: {key} of the certificate is not what its edit and these files come to; bake again"
        )


def ablation_check(cert: Certificate) -> Check:
    """What a certificate says of the ablation, once that is found to be so."""
    if not cert.writers:
        return Check("ablation", "none asked for")
    return Check(
        "ablation",
        f"{cert.writers_edited} of {cert.writers_found} writers, at most {cert.worst_remaining:.2%} remains "
        f"({1 - cert.strength:.0%} asked for)",
    )
