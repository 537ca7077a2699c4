"""Writes an output directory so that it is complete or absent: in a staging directory beside it, synced, then renamed.

Merges, downloads and bakes write their outputs inside of `staged`. The writers of small files below it return hashes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from steer.errors import OutputExistsError, SteerError
from steer.files import sync

CHUNK = 8 << 20
"""Bytes read or written at a time."""


def check_output(out: Path) -> None:
    """Raise OutputExistsError unless `out` is absent or an empty directory."""
    try:
        if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
            return
        found = "a directory with files in it" if out.is_dir() else "a file"
    except PermissionError:
        found = "a directory that may not be read"
    raise OutputExistsError(
        f"{out}: expected a new or empty directory, found {found}; remove it or name another output"
    )


@contextmanager
def staged(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `out`, which is renamed to `out` when the block ends without an exception.

    Everything is synced before the rename, so that `out` is complete or absent even after a crash. An exception deletes
    the temporary directory. A killed process leaves it, and with `resume` Ctrl-C too; the next run into `out` on the
    same machine empties it, or with `resume` continues with it. A lock, released when its process dies, shows whether
    the directory is in use.

    Errors: OutputExistsError if `out` has contents or is being written; SteerError if the disk is full or read-only, or
    if the temporary directory is a link or belongs to another user.
    """
    check_output(out)
    place = Path(os.path.realpath(out))  # rename does not follow a symlink to an empty directory
    work = _staging(place)
    with _explained(out):
        if place.parent.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
        place.parent.mkdir(parents=True, exist_ok=True)
        lock, keep = _locked(work, out), False
        try:
            check_output(out)  # another process may have finished before this one got the lock
            if not resume:
                empty(work)
            yield work
            for path in (*work.rglob("*"), work):
                sync(path)
            os.rename(work, place)
            keep = True
            mask = os.umask(0o077)
            os.umask(mask)
            os.chmod(place, 0o777 & ~mask)
            sync(place.parent)
        except KeyboardInterrupt:
            keep = resume
            raise
        finally:
            if not keep:
                shutil.rmtree(work, ignore_errors=True)
            os.close(lock)


def empty(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a directory except the files with the names in `keep`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def sweep(out: Path) -> None:
    """Remove what a killed process left of writing `out` with `staged`. What another process is writing stays."""
    work = _staging(Path(os.path.realpath(out)))
    with suppress(OutputExistsError):
        if work.is_dir():
            lock = _locked(work, out)
            shutil.rmtree(work)
            os.close(lock)


class DirectFile:
    """A new file of gigabytes, written past the page cache (O_DIRECT) if the file system supports that.

    Finding cache pages for so much data takes longer than hashing it, and evicts data that other programs read.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._block = memoryview(mmap.mmap(-1, CHUNK))  # aligned to a page, as direct writing requires
        self._filled = self._size = 0
        self._direct = self._switch(hasattr(os, "O_DIRECT"))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self._size += len(view)
        while view:
            part = view[: CHUNK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled, view = self._filled + len(part), view[len(part) :]
            if self._filled == CHUNK:
                self._flush(CHUNK)
                self._filled = 0

    def sync(self) -> None:
        """Wait until everything written is on the disk. Nothing may be written afterwards."""
        self._flush(-(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE)
        os.ftruncate(self._fd, self._size)  # cut off the padding of the last page
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _flush(self, size: int) -> None:
        at = 0
        while at < size:
            try:
                at += os.write(self._fd, self._block[at:size])
            except OSError as e:
                if e.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._switch(False)  # it needs blocks larger than a page, or a limit ends within one

    def _switch(self, on: bool) -> bool:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        direct = getattr(os, "O_DIRECT", 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
        except OSError:
            return False
        return on


def write_bytes(path: Path, data: bytes) -> str:
    """Write a new file and return its sha256."""
    with open(path, "xb") as f:
        f.write(data)
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a new file and return its sha256."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> str:
    """Write a new JSON file as transformers does (indent 2, newline at the end) and return its sha256."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's contents (a symlink is followed) to a new file and return their sha256."""
    with open(source, "rb") as src, open(target, "xb") as dst:
        shutil.copyfileobj(src, dst, CHUNK)
    return hash_file(target)


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _staging(place: Path) -> Path:
    # The name holds the host, because machines may share a directory without seeing each other's locks.
    return place.parent / f".{place.name}.steer-{socket.gethostname()}"


def _locked(work: Path, out: Path) -> int:
    """Make the directory, or take over one that a dead process left. Returns a file descriptor that holds the lock on
    it. Errors: OutputExistsError if a live process holds the lock."""
    while True:
        with suppress(FileExistsError):  # no directory; said below
            work.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as closing:  # its last owner has just renamed or removed it
            if work.is_symlink() or work.is_file():
                found = "a link" if work.is_symlink() else "a file"
                raise SteerError(f"{work}: expected a directory of this program, found {found}; remove it")
            fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            closing.callback(os.close, fd)
            # The name can be guessed, and files that others put there would end up in the output.
            stat = os.fstat(fd)
            if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
                raise SteerError(
                    f"{work}: expected a directory that only you can write, found one that others can; remove it, "
                    "or name an output elsewhere"
                )
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise OutputExistsError(f"{out}: is being written; wait, or name another output") from e
            if os.path.samestat(stat, os.lstat(work)):
                closing.pop_all()
                return fd


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
    errno.ENOLCK: "the file system has no locks; name an output on another disk",
    errno.ENOTDIR: "a part of the path is a file; name another output",
}


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn an OSError whose cause the user can fix into a SteerError with advice."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another machine's process was first
            check_output(out)
        if e.errno not in _REASONS:
            raise
        where = Path(os.path.realpath(os.fsdecode(e.filename))) if e.filename is not None else None
        place = Path(os.path.realpath(out))
        if where is None or place.is_relative_to(where) or where.is_relative_to(_staging(place)):
            raise SteerError(f"{out}: could not be written, {_REASONS[e.errno]}") from e
        raise SteerError(f"{where}: could not be used, {e.strerror}; check its permissions and its disk") from e
