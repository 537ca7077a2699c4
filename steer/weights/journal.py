"""What a bake has finished, kept beside it, so that the next one goes on where a killed one was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from steer.files import parse_json, sync
from steer.values.edit import Edit
from steer.weights.bakeable import Form
from steer.weights.kept import versions
from steer.weights.staging import empty, hash_file
from steer.weights.stream import CheckpointFiles

JOURNAL = ".steer-journal"
"""Its name in the staging directory."""


class Journal:
    """One line of JSON a finished file, each written once the file is on the disk, and a line a fact that has none."""

    def __init__(self, work: Path, key: str) -> None:
        """Read what a killed run with the same key had finished; remove whatever else the directory holds.

        A file counts as finished if it still has the hash that its line tells.
        """
        self._work, self._path = work, work / JOURNAL
        head, *past = _lines(self._path) or [{}]
        past = past if head == {"key": key} else []
        whole = [line for line in past if _whole(work, line)]
        facts = [line for line in past if isinstance(line, dict) and {"of", "read"} <= set(line)]
        self.facts: dict[str, dict[str, Any]] = {line["of"]: line for line in facts}
        """What was noted, by name."""
        self.finished: dict[str, dict[str, Any]] = {line["file"]: line for line in whole}
        """File -> what was recorded of it."""
        # Exchanged at once: killed here, the next run still knows what is finished.
        part = work / f"{JOURNAL}.part"
        part.write_bytes(b"".join(map(_line, ({"key": key}, *whole, *facts))))
        sync(part)
        part.replace(self._path)
        empty(work, keep={*self.finished, JOURNAL})
        sync(work)

    @classmethod
    def of(cls, work: Path, files: CheckpointFiles, edit: Edit, form: Form) -> Journal:
        """What a killed bake of the same edit, in the same form, into the same place has finished."""
        shards = [(s.name, s.size, s.mtime_ns, s.header) for s in files.shards]
        where = torch.cuda.is_available()  # sums on a GPU round another way
        return cls(work, fingerprint(versions(), where, form, files.config, shards, edit))

    def record(self, file: str, *, written: str, **facts: Any) -> None:
        """Note that a file of the directory is finished and on the disk, with its sha256."""
        self._append({"file": file, "written": written, **facts})
        sync(self._work)

    def note(self, of: str, *, read: str) -> None:
        """Note the sha256 of a file of the source, for the next run of the same key."""
        self._append({"of": of, "read": read})

    def _append(self, facts: Mapping[str, Any]) -> None:
        with open(self._path, "ab") as f:
            f.write(_line(facts))
            f.flush()
            os.fsync(f.fileno())

    def close(self) -> None:
        """Remove it: nothing is left to go on with."""
        self._path.unlink()


def fingerprint(*values: Any) -> str:
    """The sha256 of plain values, dataclasses and tensors, however they are nested.

    Two edits have the same one only if every field of them is the same, to the last bit.
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
    """The lines that are whole: a kill or a crash may have torn the last."""
    out = []
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            out.append(parse_json(line))
    except (FileNotFoundError, ValueError):
        pass
    return out


def _whole(work: Path, line: Any) -> bool:
    if not isinstance(line, dict) or not {"file", "written", "read"} <= set(line):
        return False
    path = work / line["file"]
    return path.is_file() and hash_file(path) == line["written"]
