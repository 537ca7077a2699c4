"""A log of the files that a bake has finished, kept in its staging directory so that a killed bake can be resumed.

`bake` and `adapter` record each finished file and ask on the next start which ones are still valid.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from steer.baking.form import Form
from steer.baking.outputs import versions
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.staging import empty, hash_file
from steer.core.edit import Edit
from steer.files import parse_json, sync

JOURNAL = ".steer-journal"
"""Name of the log in the staging directory."""


class Journal:
    """A log of JSON lines: one line per finished output file, appended after the file was synced to the disk, and one
    line per fact that belongs to no output file."""

    def __init__(self, work: Path, key: str) -> None:
        """Read what a killed run with the same key finished, and remove everything else from the directory.

        A file counts as finished if it still has the hash in its line.
        """
        self._work, self._path = work, work / JOURNAL
        head, *lines = _lines(self._path) or [{}]
        lines = lines if head == {"key": key} else []
        complete = [line for line in lines if _is_complete(work, line)]
        facts = [line for line in lines if isinstance(line, dict) and {"of", "read"} <= set(line)]
        self.facts: dict[str, dict[str, Any]] = {line["of"]: line for line in facts}
        """Source file -> what `note` recorded."""
        self.finished: dict[str, dict[str, Any]] = {line["file"]: line for line in complete}
        """Output file -> what `record` recorded."""
        # Replaced in one step: if the process is killed here, the next run still knows the finished files.
        part = work / f"{JOURNAL}.part"
        part.write_bytes(b"".join(map(_line, ({"key": key}, *complete, *facts))))
        sync(part)
        part.replace(self._path)
        empty(work, keep={*self.finished, JOURNAL})
        sync(work)

    @classmethod
    def of(cls, work: Path, files: CheckpointFiles, edit: Edit, form: Form) -> Journal:
        """The journal of a bake of this edit, in this form, into this directory, with what a killed run finished."""
        shards = [(s.name, s.size, s.mtime_ns, s.header) for s in files.shards]
        where = torch.cuda.is_available()  # sums on a GPU are rounded differently
        return cls(work, fingerprint(versions(), where, form, files.config, shards, edit))

    def record(self, file: str, *, written: str, **facts: Any) -> None:
        """Record that an output file is finished and on the disk, with its sha256 and other facts."""
        self._append({"file": file, "written": written, **facts})
        sync(self._work)

    def note(self, of: str, *, read: str) -> None:
        """Record the sha256 of a file of the source, for the next run with the same key."""
        self._append({"of": of, "read": read})

    def _append(self, facts: Mapping[str, Any]) -> None:
        with open(self._path, "ab") as f:
            f.write(_line(facts))
            f.flush()
            os.fsync(f.fileno())

    def close(self) -> None:
        """Remove the log, when nothing is left to resume."""
        self._path.unlink()


def fingerprint(*values: Any) -> str:
    """The sha256 of plain values, dataclasses and tensors, nested in any way.

    Two edits have the same fingerprint only if all their fields are equal, to the last bit.
    """
    sha = hashlib.sha256()
    _feed(sha, values)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if is_dataclass(value):
        value = (type(value).__name__, *((f.name, getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, Mapping):
        value = ("mapping", *sorted(value.items()))
    if isinstance(value, list | tuple):
        sha.update(b"(%d" % len(value))
        for item in value:
            _feed(sha, item)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        text = repr(value).encode()
        sha.update(b"%d:" % len(text) + text)
    else:
        tensor = torch.as_tensor(value)
        _feed(sha, (str(tensor.dtype), list(tensor.shape)))
        sha.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def _line(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts).encode() + b"\n"


def _lines(path: Path) -> list[Any]:
    """The complete lines. A kill or a crash may have torn the last one."""
    out = []
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            out.append(parse_json(line))
    except (FileNotFoundError, ValueError):
        pass
    return out


def _is_complete(work: Path, line: Any) -> bool:
    if not isinstance(line, dict) or not {"file", "written", "read"} <= set(line):
        return False
    path = work / line["file"]
    return path.is_file() and hash_file(path) == line["written"]
