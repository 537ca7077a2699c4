"""Checks that the files a bake wrote are still what their certificate says.

Names and hashes are checked here; `checks` computes the measurements again. Torch is imported only for the latter:
missing and changed files are found without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from steer.baking.certificate import (
    CERTIFICATE,
    FORMS,
    Certificate,
    inside,
    refusing_other_contents,
    same_set,
    visible_files,
)
from steer.checkpoint.reader import ADAPTER, CheckpointFiles, Shard
from steer.checkpoint.staging import hash_file
from steer.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Check:
    """One fact that `verify` found to be as certified."""

    name: str
    detail: str


def verify(
    folder: Path, progress: Callable[[int, int], None] | None = None, *, source: Path | None = None
) -> list[Check]:
    """Read the output of a bake in `folder` again, check everything in its certificate, and return the checks that
    passed, in order.

    `progress` is called with (bytes hashed, bytes in total). With `source`, the output is computed again from that
    checkpoint and compared; for an adapter this is also done without `source` if its base model is a directory on this
    machine. Who made the certificate is not checked: it has a hash, but no signature.

        for check in steer.verify(Path("baked")):
            print(check.name, check.detail)

    Errors: CheckpointError at the first difference from the certificate; UsageError for `source` with a control vector
    alone, which contains nothing of its source.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a baked checkpoint, found no directory; check the path")
    with refusing_other_contents(folder / CERTIFICATE):
        checks = _verified(folder, progress, source)
    return [Check(name, detail) for name, detail in checks.items()]


def _verified(folder: Path, progress: Callable[[int, int], None] | None, source: Path | None) -> dict[str, str]:
    """Name -> detail of all checks of `verify`, cheapest first."""
    cert = Certificate.load(folder)
    if cert.form not in FORMS:
        raise CheckpointError(f"{folder / CERTIFICATE}: is of no form that a bake writes; bake again")
    if cert.form == "gguf" and source is not None and not cert.writers:
        raise UsageError(
            "--source: expected none for a control vector, which holds nothing of its source; leave it out"
        )
    direction_files = [*(d.file for d in cert.directions), *([cert.neutral] if cert.neutral else [])]
    same_set(folder, "direction file", set(direction_files) - set(cert.files), set())
    checks = {"certificate": f"intact, {len(cert.files)} files and {len(cert.tensors)} tensors"}
    _check_folder(folder, cert)
    files = CheckpointFiles.open(folder) if cert.form == "checkpoint" else None
    complete = "no file or tensor missing, none unexpected"
    if cert.form != "gguf":
        shards = files.shards if files else [Shard.open(folder / ADAPTER)]
        cert.check_tensors(folder, {t.name: (t.file, t.dtype, t.shape) for s in shards for t in s.tensors})
        checks["contents"] = complete
    _check_hashes(folder, cert.files, progress)
    checks["sha256"] = f"{len(cert.files)} files as written"
    if files is not None:
        for key, value in cert.config.items():
            if (found := files.config.get(key)) != value:
                raise CheckpointError(
                    f"{folder / 'config.json'}: expected {key} to be {value}, found {found}; bake again"
                )
        checks["config"] = ", ".join(f"{k} = {v}" for k, v in cert.config.items()) or "as in the source"
    if hidden := sorted(path.name for path in folder.iterdir() if path.name.startswith(".")):
        checks["hidden files"] = f"not certified, and loaded by nothing: {', '.join(hidden)}"
    # From here on torch is needed: missing and changed files have been found without it.
    from steer.baking.checks import certified_edit, check_adapter, check_checkpoint, check_llama_cpp

    edit = certified_edit(folder, cert)
    if cert.form == "gguf":
        compared = check_llama_cpp(folder, cert, edit, source)
        checks["contents"] = complete
    else:
        compared = (check_checkpoint if files else check_adapter)(folder, cert, edit, source)
    if cert.writers or cert.form != "gguf":
        checks["ablation"] = (
            f"{cert.writers_edited} of {cert.writers_found} writers, at most {cert.worst_remaining:.2%} remains "
            f"({1 - cert.strength:.0%} asked for)"
            if cert.writers
            else "none asked for"
        )
    if cert.form == "gguf" and cert.biases:
        checks["add"] = f"{', '.join(b.tensor for b in cert.biases)} of a control vector"
    elif edit.add and cert.form != "gguf":
        checks["add"] = f"biases at sites {', '.join(map(str, sorted(edit.biases())))}"
    return checks | ({"source": compared} if compared else {})


def _check_folder(folder: Path, cert: Certificate) -> None:
    """Raise CheckpointError for a visible file that is missing or not certified, for a link out of the directory, and
    for a folder without certified files. Hidden files, such as those of git and of the hub's client, are ignored,
    because nothing loads them."""
    same_set(folder, "file", set(visible_files(folder)), set(cert.files) | {CERTIFICATE})
    for name in (*cert.files, CERTIFICATE):
        if not inside(folder / name, folder):
            raise CheckpointError(
                f"{folder / name}: expected a file in this directory, found a link that leads out of it; "
                "put a copy in its place"
            )
    held = {parent for name in cert.files for parent in Path(folder, name).parents}
    for parent, folders, _ in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink() or path not in held:
                found = "a link to a folder" if path.is_symlink() else "a folder without a certified file"
                raise CheckpointError(f"{path}: expected nothing of this name, found {found}; remove it")


def _check_hashes(folder: Path, files: Mapping[str, str], progress: Callable[[int, int], None] | None) -> None:
    sizes = {name: (folder / name).stat().st_size for name in files}
    done, pool = 0, ThreadPoolExecutor(2)
    try:
        for name, found in zip(files, pool.map(hash_file, [folder / name for name in files]), strict=True):
            if found != files[name]:
                raise CheckpointError(
                    f"{folder / name}: sha256 is not the one certified, the file was changed; "
                    "remove the directory and bake again"
                )
            done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
    finally:
        pool.shutdown(cancel_futures=True)
