"""Reading and writing files for every other module: atomic replacement, and JSON from strangers parsed within limits.

Imports nothing of the package except `steer.errors`, so that every module may import it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steer.errors import CheckpointError, OutputExistsError, SteerError

JSON_DEPTH = 64
"""Deepest nesting of brackets that is accepted. Code that walks a parsed value recurses once per level."""
_JSON_BYTES = 256 << 20
"""Largest JSON file that is read. A safetensors header has at most 100 MB; the index of a checkpoint with 100,000
tensors has 10."""


@contextmanager
def replacing(path: str | Path, *, new: bool = False) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, for the block to create. When the block ends without an exception,
    the new file is synced to the disk and then replaces `path`. After a crash `path` is either the new file or the old
    one.

    Links are followed: the file that a link points to is replaced. A replaced file keeps its permissions. `new`:
    nothing is replaced; a file or a link at `path` is an error.
    Errors: SteerError for a path that cannot be written.
    """
    place = Path(path if new else os.path.realpath(path))
    # The name holds the host, because machines may share a directory, and each numbers its processes by itself.
    stem = f".{place.name[:80]}.{socket.gethostname()}-"
    part = place.with_name(f"{stem}{os.getpid()}-{threading.get_ident()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for leftover in place.parent.glob(f"{glob.escape(stem)}*.part"):  # of a killed process, or put there by others
            if leftover == part or not _alive(leftover.name.removeprefix(stem).partition("-")[0]):
                leftover.unlink(missing_ok=True)
        yield part
        sync(part)
        if new:
            try:
                os.link(part, place)  # a rename would replace a file that is there
            except FileExistsError as e:
                raise SteerError(
                    f"{path}: expected no such file, found one; it is not overwritten, name another"
                ) from e
        else:
            if place.exists():
                shutil.copymode(place, part)
            part.replace(place)
        sync(place.parent)
    except OSError as e:
        raise SteerError(f"{path}: could not be written ({e.strerror}); name another place, or free some space") from e
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> Path:
    """Return `path` if a file can be written there; nothing is changed. Called before work of minutes whose result goes
    there. Errors: SteerError, as of `replacing`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=next(p for p in path.absolute().parents if p.exists())):
            return path
    except OSError as e:
        raise SteerError(f"{path}: could not be written ({e.strerror}); name another place, or free some space") from e


def names_in(folder: Path) -> list[str]:
    """The names in a directory, without the unfinished files that a killed process left of `replacing`."""
    return [path.name for path in folder.iterdir() if not path.match(".*.part")]


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write a whole file, text as UTF-8, with `replacing`. Errors: SteerError for a path that cannot be written."""
    with replacing(path) as part, open(part, "xb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


def write_atomic_json(path: str | Path, value: Any, *, indent: int | None = 2) -> Path:
    """Write a value as a JSON file with `write_atomic`; nan and infinities become null. Errors: as there."""
    return write_atomic(path, json.dumps(without_nan(value), indent=indent) + "\n")


def write_new(path: str | Path, text: str) -> Path:
    """Write a whole text file, in UTF-8, where there is none. Errors: SteerError for a path that exists or cannot be
    written."""
    with replacing(path, new=True) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def delete(path: Path) -> None:
    """Delete a file, if it exists. Errors: SteerError if it cannot be deleted."""
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise SteerError(f"{path}: could not be deleted ({e.strerror}); check its permissions") from e


def append_line(path: str | Path, line: bytes) -> None:
    """Append a line to a file, in place of one that a crash cut off. It is on the disk when this returns, and lines of
    other threads and processes stay whole. Errors: SteerError for a path that cannot be written."""
    place = Path(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync(place.parent)
    except OSError as e:
        raise SteerError(f"{path}: could not be written ({e.strerror}); name another place, or free some space") from e


@contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Lock a directory against other processes, creating it if needed. The lock ends with the block or the process.

    Errors: OutputExistsError that says `taken` where another process holds the lock; SteerError for a directory that
    cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise SteerError(f"{folder}: could not be written, {e.strerror}; name an output where you may write") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise OutputExistsError(f"{folder}: {taken}") from e
    try:
        yield
    finally:
        os.close(lock)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's list of names, are on the disk (fsync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def parse_json(data: bytes | str, *, number: Callable[[str], float] = float, halves: bool = False) -> Any:
    """Parse JSON text in UTF-8.

    `number`: reads numbers with a point, infinities and nan. `halves`: accept half a surrogate pair in a text, which
    cannot be written as UTF-8.
    Errors: ValueError with a message of one line for text that is no JSON, for brackets nested more than `JSON_DEPTH`
    deep, for numbers of thousands of digits, and for half a surrogate pair without `halves`.
    """
    too_deep = f"brackets nested over {JSON_DEPTH} deep"
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, parse_float=number, parse_constant=number)
        if not halves and "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as e:
        raise ValueError(one_line(e)) from e
    except UnicodeEncodeError as e:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) in a text") from e
    except RecursionError as e:
        raise ValueError(too_deep) from e
    level = [value]
    for _ in range(JSON_DEPTH):
        nodes = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [v for values in nodes for v in values]
        if not level:
            return value
    raise ValueError(too_deep)


def read_json_object(
    path: Path, *, what: str = "a JSON object", do: str = "mend the file", error: type[SteerError] = CheckpointError
) -> dict[str, Any]:
    """Read the JSON object in a file. An error says that `what` was expected there, and that the user should `do`.

    Errors: `error`, of one line, for a file that is missing, cannot be read, or holds anything else.
    """

    def wrong(found: str, e: Exception | None = None) -> SteerError:
        return error(f"{path}: expected {what}, found {found}; {do}")

    try:
        found = path.stat()
        if found.st_size > _JSON_BYTES:
            raise wrong(f"over {_JSON_BYTES >> 20} MB")
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise wrong("a device or a pipe, which may never end")
        value = parse_json(path.read_bytes())
    except FileNotFoundError as e:
        raise wrong("none") from e
    except OSError as e:
        raise error(f"{path}: could not be read ({e.strerror}); check the path and its permissions") from e
    except ValueError as e:
        raise wrong(f"no JSON ({one_line(e)})") from e
    if not isinstance(value, dict):
        raise wrong("JSON of another kind")
    return value


def without_nan(value: Any) -> Any:
    """Copy a value for JSON, which has neither nan nor infinities: null replaces them, in dicts and lists of any
    depth."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(e: Exception | str) -> str:
    """The message of another library's exception, or of another server, as one line of at most 300 printable
    characters."""
    if isinstance(e, UnicodeDecodeError):
        return f"bytes that are not UTF-8 at {e.start}"
    text = " ".join(str(e).split()) or type(e).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def _alive(process: str) -> bool:
    """Whether this machine runs a process with that number."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True
