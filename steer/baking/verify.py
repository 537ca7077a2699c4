"""Checks that the files a bake wrote are still what their certificate says.

`verify` checks names and hashes here, then calls the checks for the form of output, which compute the measurements
again. Torch is imported only for the latter: missing and changed files are found without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from steer.baking.certificate import (
    ADAPTER,
    CERTIFICATE,
    Certificate,
    Check,
    inside,
    refusing_other_contents,
    visible_files,
)
from steer.baking.checks import check_tensors, same_set
from steer.baking.form import FORMS
from steer.checkpoint.reader import CheckpointFiles, Shard
from steer.checkpoint.staging import hash_file
from steer.errors import CheckpointError, UsageError


def verify(
    folder: Path, progress: Callable[[int, int], None] | None = None, *, source: Path | None = None
) -> list[Check]:
    """Read a bake's output again and check everything in its certificate. Returns the checks that passed, in order.

    `progress` is called with (bytes hashed, bytes in total). With `source`, the output is computed again from that
    checkpoint and compared; for an adapter this is also done without `source` if its base model is a directory on this
    machine. Who made the certificate is not checked: it has a hash, but no signature.

        for check in steer.verify(Path("baked")):
            print(check.name, check.detail)

    Errors: CheckpointError at the first difference from the certificate; UsageError for `source` with a control vector,
    which contains nothing of its source.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a baked checkpoint, found no directory; check the path")
    with refusing_other_contents(folder / CERTIFICATE):
        return _verified(folder, progress, source)


def _verified(folder: Path, progress: Callable[[int, int], None] | None, source: Path | None) -> list[Check]:
    """All checks of `verify`, cheapest first."""
    cert = Certificate.load(folder)
    if cert.form not in FORMS:
        raise CheckpointError(f"{folder / CERTIFICATE}: is of no form that a bake writes; bake again")
    if cert.form == "gguf" and source is not None:
        raise UsageError(
            "--source: expected none for a control vector, which holds nothing of its source; leave it out"
        )
    direction_files = [*(d.file for d in cert.directions), *([cert.neutral] if cert.neutral else [])]
    same_set(folder, "direction file", set(direction_files) - set(cert.files), set())
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
    # From here on torch is needed: missing and changed files have been found without it.
    from steer.baking.outputs import certified_edit

    edit = certified_edit(folder, cert)
    if files is not None:
        from steer.baking.checkpoint_check import check_source, check_weights

        checks += check_weights(files, cert, edit)
        return checks if source is None else [*checks, check_source(files, cert, edit, source)]
    if cert.form == "gguf":
        from steer.baking.control_vector_check import check_control_vector

        return checks + check_control_vector(folder, cert, edit)
    from steer.baking.adapter_check import check_adapter

    return checks + check_adapter(folder, cert, edit, source)


def _check_folder(folder: Path, cert: Certificate) -> None:
    """Raise CheckpointError for a visible file that is missing or not certified, for a link out of the directory, and
    for a folder without certified files. Hidden files, such as those of git and of the hub's client, are ignored,
    because nothing loads them."""
    same_set(folder, "file", set(visible_files(folder)), set(cert.files) | {CERTIFICATE})
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if not inside(path, folder):
                raise CheckpointError(
                    f"{path}: expected a file in this directory, found a link that leads out of it; "
                    "put a copy in its place"
                )
        for path in (Path(parent, name) for name in folders):
            held = f"{path.relative_to(folder).as_posix()}/"
            if path.is_symlink() or not any(name.startswith(held) for name in cert.files):
                found = "a link to a folder" if path.is_symlink() else "a folder without a certified file"
                raise CheckpointError(f"{path}: expected nothing of this name, found {found}; remove it")


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
