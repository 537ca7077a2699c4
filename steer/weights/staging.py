"""A directory that is complete or absent: written beside its place, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from steer.errors import OutputExistsError, SteerError

CHUNK = 8 << 20
"""Bytes moved at a time."""


def check_output(out: Path) -> None:
    """Raise OutputExistsError unless `out` is absent or an empty directory."""
    if out.is_dir():
        try:
            if not any(out.iterdir()):
                return
            found = "a directory with files in it"
        except PermissionError:
            found = "a directory that may not be read"
    elif os.path.lexists(out):
        found = "a file"
    else:
        return
    raise OutputExistsError(
        f"{out}: expected a new or empty directory, found {found}; remove it or name another output"
    )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out`, which takes its place when the block ends without an exception.

    Everything is synced before the rename, so that `out` is complete or absent after a crash too. On any
    exception, Ctrl-C included, the temporary directory goes. What a killed process left is removed by the
    next run on the same machine.

    Errors: OutputExistsError when `out` holds something, SteerError when the disk is full or read-only.
    """
    check_output(out)
    place = Path(os.path.realpath(out))  # a rename follows no symlink to an empty directory
    work = place.parent / f"{_prefix(place)}{os.getpid()}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(place)
        work.mkdir()
    except FileExistsError as e:
        if work.exists():
            raise OutputExistsError(f"{out}: is being written; wait, or name another output") from e
        raise SteerError(f"{out}: could not be written, {_REASONS[errno.ENOTDIR]}") from e
    except OSError as e:
        _explain(e, out)
        raise
    _ACTIVE.add(work)
    try:
        yield work
        _sync_tree(work)
        os.rename(work, place)
        _sync(place.parent)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
            check_output(out)
        _explain(e, out)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _ACTIVE.discard(work)


class HashingFile:
    """A new file that knows the sha256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        self._sha = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(data)
        self._sha.update(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._sha.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_text(path: Path, text: str) -> str:
    """Write a new file, return its sha256."""
    with HashingFile(path) as f:
        f.write(text.encode())
    return f.sha256


def write_json(path: Path, value: Any) -> str:
    """Write a new JSON file the way transformers does (indent 2, newline at the end), return its sha256."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def copy_file(source: Path, target: Path) -> str:
    """Copy the contents of a file (of what a symlink points to), return their sha256."""
    with open(source, "rb") as src, HashingFile(target) as dst:
        while chunk := src.read(CHUNK):
            dst.write(chunk)
    return dst.sha256


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


_ACTIVE: set[Path] = set()
"""What this process is writing, to tell it from what a dead process of the same pid left."""


def _prefix(place: Path) -> str:
    # The host, because a directory may be shared between machines and containers whose pids overlap.
    return f".{place.name}.steer-{socket.gethostname()}-"


def _remove_stale(place: Path) -> None:
    prefix = _prefix(place)
    for path in place.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and path not in _ACTIVE and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether another process has this pid."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or name an output on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or name an output on another disk",
    errno.EFBIG: "the file system or a limit allows no file this large; name an output on another disk",
    errno.EACCES: "permission denied; name an output where you may write, or change the permissions",
    errno.EPERM: "permission denied; name an output where you may write, or change the permissions",
    errno.EROFS: "the file system is read-only; name an output on another disk",
    errno.EBUSY: "the directory is in use as a mount point; name a directory below it",
    errno.EIO: "the disk reports an error; name an output on another disk",
    errno.ENAMETOOLONG: "the name is too long; name another output",
    errno.ENOTDIR: "a part of the path is a file; name another output",
}


def _explain(e: OSError, out: Path) -> None:
    """Raise the sentence a user needs where the error is one that a user can mend."""
    if e.errno not in _REASONS:
        return
    where = Path(os.path.realpath(os.fsdecode(e.filename))) if e.filename is not None else None
    place = Path(os.path.realpath(out))
    if where is None or place.is_relative_to(where) or _prefix(place) in str(where):
        raise SteerError(f"{out}: could not be written, {_REASONS[e.errno]}") from e
    raise SteerError(f"{where}: could not be used, {e.strerror}; check its permissions and its disk") from e
