"""A log of the files that a bake has finished, kept in its staging directory so that a killed bake can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from steer.baking.certificate import Form, versions
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.staging import empty, hash_file
from steer.core.edit import Edit
from steer.files import parse_json, sync

JOURNAL = ".steer-journal"
"""Name of the log in the staging directory."""


class Journal:
    """A log of JSON lines: one line per finished output file, appended after the file was synced to the disk, and one
    line per file of the source whose hash belongs to no output file."""

    def __init__(self, work: Path, key: str) -> None:
        """Read what a killed run with the same key finished, and remove everything else from the directory.

        An output file counts as finished if it still has the hash in its line.
        """
        self.work, self._path = work, work / JOURNAL
        head, *lines = _lines(self._path) or [{}]
        lines = [line for line in lines if head == {"key": key} and _holds(work, line)]
        self.finished: dict[str, dict[str, Any]] = {line["file"]: line for line in lines}
        """File -> what `record` recorded."""
        # Replaced in one step: if the process is killed here, the next run still knows the finished files.
        part = work / f"{JOURNAL}.part"
        part.write_bytes(b"".join(map(_line, ({"key": key}, *lines))))
        sync(part)
        part.replace(self._path)
        empty(work, keep={*self.finished, JOURNAL})
        sync(work)

    @classmethod
    def of(cls, work: Path, files: CheckpointFiles, edit: Edit, form: Form, *, edit_mtp: bool = False) -> Journal:
        """The journal of a bake of this edit, in this form, into this directory, with the steps of a killed run."""
        shards = [(s.name, s.size, s.mtime_ns, s.header) for s in files.shards]
        where = torch.cuda.is_available()  # sums on a GPU are rounded differently
        return cls(work, fingerprint(versions(), where, form, files.config, shards, edit, edit_mtp))

    def record(self, file: str, **facts: Any) -> None:
        """Record facts of a file, for the next run with the same key. With `written`, its sha256, it is an output file
        that is finished and on the disk."""
        with open(self._path, "ab") as f:
            f.write(_line({"file": file, **facts}))
            f.flush()
            os.fsync(f.fileno())
        sync(self.work)

    def close(self) -> None:
        """Remove the log, when nothing is left to resume."""
        self._path.unlink()


def fingerprint(*values: Any) -> str:
    """The sha256 of plain values, dataclasses and tensors, nested in any way.

    Two edits have the same fingerprint only if all their fields are equal, to the last bit.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value that JSON does not know, as one that it does."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Edit):
        return {"Edit": [value.moves, value.blocks, value.method, value.strengths]}
    if is_dataclass(value):
        return {type(value).__name__: {f.name: getattr(value, f.name) for f in fields(value)}}
    tensor = torch.as_tensor(value).detach().contiguous().cpu()
    return {str(tensor.dtype): list(tensor.shape), "bytes": tensor.reshape(-1).view(torch.uint8).numpy().tobytes()}


def _line(facts: dict[str, Any]) -> bytes:
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


def _holds(work: Path, line: Any) -> bool:
    """Whether a line is one that `record` wrote, and its output file is still as it was."""
    if not isinstance(line, dict) or not ("file" in line and line.keys() & {"written", "read"}):
        return False
    path = work / line["file"]
    return "written" not in line or (path.is_file() and hash_file(path) == line["written"])
