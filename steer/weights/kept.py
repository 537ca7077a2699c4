"""What every output of a bake keeps beside what it is for: directions, neutral means, a model card, a certificate."""

from __future__ import annotations

import itertools
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save

from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.weights.card import model_card
from steer.weights.certify import Certificate, SavedDirection
from steer.weights.staging import hash_file, write_text

DIRECTIONS = "steer_directions"
"""The folder in the output that keeps the directions."""


def save_directions(edit: Edit, work: Path, written: dict[str, str]) -> tuple[SavedDirection, ...]:
    """Write each direction of an edit once; add the sha256 of what was written to `written`."""
    saved: dict[Direction, str] = {}
    out = []
    for direction, amount in (*((d, None) for d in edit.ablate), *edit.add):
        if direction not in saved:
            stem = f"{DIRECTIONS}/{re.sub(r'[^A-Za-z0-9_-]+', '-', direction.name)}-{direction.site}"
            names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
            saved[direction] = next(f for n in names if (f := f"{n}.safetensors") not in saved.values())
            direction.save(work / saved[direction])
            written[saved[direction]] = hash_file(work / saved[direction])
        name, site = direction.name, direction.site
        out.append(SavedDirection(saved[direction], name, site, amount, direction.provenance))
    return tuple(out)


def save_means(edit: Edit, work: Path, written: dict[str, str]) -> str | None:
    """Write the neutral means that the method spared, if it did; return the name of their file."""
    if edit.method.neutral is None:
        return None
    name = f"{DIRECTIONS}/neutral.means.safetensors"  # no direction's file has a dot in its stem
    (work / DIRECTIONS).mkdir(exist_ok=True)
    (work / name).write_bytes(save({"neutral": edit.method.neutral}))
    written[name] = hash_file(work / name)
    return name


def finish(cert: Certificate, work: Path, source_header: Mapping[str, Any], written: dict[str, str]) -> Certificate:
    """Write model card and certificate, the last files of an output; return the certificate with all their hashes.

    `source_header`: of the source's model card, read before anything was written.
    """
    cert = replace(cert, command=None if cert.command is None else utf8(cert.command))
    written["README.md"] = write_text(work / "README.md", model_card(cert, source_header))
    cert = replace(cert, files=dict(sorted(written.items())))
    cert.save(work)
    return cert


def source_name(root: Path) -> str:
    """The hub name of a checkpoint where its path tells it, else the name of its directory."""
    return hub_name(root) or utf8(root.resolve().name)


def utf8(name: str) -> str:
    """A name or a command for people, `?` where it is no UTF-8, which no JSON of ours holds."""
    return name.encode(errors="replace").decode()


def hub_name(root: Path) -> str | None:
    """The hub name of a checkpoint in a hub's cache, `models--org--name/snapshots/<commit>`; None elsewhere."""
    parts = (part for part in root.resolve().parts if part.startswith("models--"))
    return next(("/".join(part.split("--", 2)[1:]) for part in parts), None)


def versions() -> dict[str, str]:
    """Of what an output depends on."""
    import torch

    try:
        steer = metadata.version("steer")
    except metadata.PackageNotFoundError:  # run from a checkout
        steer = "unknown"
    return {"steer": steer, "torch": torch.__version__, "python": platform.python_version()}
