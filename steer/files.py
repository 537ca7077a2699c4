"""Files read and written everywhere: replaced atomically, and JSON of strangers parsed within limits.

Imports nothing of the package but its errors, so that everything may import it.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steer.errors import CheckpointError, SteerError

JSON_DEPTH = 64
"""Levels of brackets that are read. Whatever walks a parsed value calls itself once a level."""
_JSON_BYTES = 256 << 20
"""A safetensors header has at most 100 MB; the index of a checkpoint with 100,000 tensors has 10."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside `path`, for the block to create; it takes the place of `path` when the block ends without an
    exception, on the disk before its name is. After a crash `path` is the new file or what was there.

    Links are followed: what they point to is replaced. The permissions of a file that was there stay.
    Errors: SteerError for a place that cannot be written.
    """
    place = Path(os.path.realpath(path))
    # The host, because a directory may be shared between machines, which number their processes apart.
    stem = f".{place.name[:80]}.{socket.gethostname()}-"
    part = place.with_name(f"{stem}{os.getpid()}-{threading.get_ident()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(f"{glob.escape(stem)}*.part"):  # by a killed process, or laid there
            if left == part or not _alive(left.name.removeprefix(stem).partition("-")[0]):
                left.unlink(missing_ok=True)
        yield part
        sync(part)
        if place.exists():
            shutil.copymode(place, part)
        part.replace(place)
        sync(place.parent)
    except OSError as e:
        raise SteerError(f"{path}: could not be written ({e.strerror}); name another place, or free some space") from e
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write a whole file, text as UTF-8; see `replacing`. Errors: SteerError for a place that cannot be written."""
    with replacing(path) as part, open(part, "xb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def parse_json(data: bytes | str) -> Any:
    """The value that JSON text in UTF-8 stands for.

    Errors: ValueError, of one line, also for brackets nested over `JSON_DEPTH` deep, for numbers of thousands of
    digits, and for text that is half a surrogate pair, which could not be written again.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as e:
        raise ValueError(f"bytes that are not UTF-8 at {e.start}") from e
    except UnicodeEncodeError as e:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) in a text") from e
    except RecursionError as e:
        raise ValueError(_TOO_DEEP) from e
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [v for node in level if isinstance(node, dict | list) for v in _children(node)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def read_json_object(
    path: Path, *, what: str = "a JSON object", do: str = "mend the file", error: type[SteerError] = CheckpointError
) -> dict[str, Any]:
    """The JSON object in a file. `what` was expected there, and `do` is what mends it, for the message.

    Errors: `error`, of one line, for a file that is missing, cannot be read, or holds anything else.
    """

    def wrong(found: str, e: Exception | None = None) -> SteerError:
        return error(f"{path}: expected {what}, found {found}; {do}")

    try:
        if path.stat().st_size > _JSON_BYTES:
            raise wrong(f"over {_JSON_BYTES >> 20} MB")
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
    """`value` for JSON, which has neither nan nor infinities: null in their place, in dicts and lists of any depth."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(e: Exception) -> str:
    """What another library says is wrong, in one line."""
    if isinstance(e, UnicodeDecodeError):
        return f"bytes that are no UTF-8 at {e.start}"
    text = " ".join(str(e).split()) or type(e).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _alive(process: str) -> bool:
    """Whether a process of this machine has the number."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _children(node: Mapping[str, Any] | list[Any]) -> Any:
    return node.values() if isinstance(node, Mapping) else node


_TOO_DEEP = f"brackets nested over {JSON_DEPTH} deep"
