"""Writes what every form of output contains: directions, neutral means, a model card and a certificate.

`certified_edit` reads the edit back from an output, for `verify`.
"""

from __future__ import annotations

import itertools
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from steer.baking.card import model_card
from steer.baking.certificate import Certificate
from steer.baking.checks import check_claims
from steer.baking.proofs import SavedDirection
from steer.checkpoint.staging import hash_file, write_text
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Method, Strengths

DIRECTIONS = "steer_directions"
"""Folder in the output for the directions."""


def save_directions(edit: Edit, work: Path, written: dict[str, str]) -> tuple[SavedDirection, ...]:
    """Write each direction of an edit once, and add the sha256 of the files to `written`."""
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
    """Write the neutral means that the method spared, and return the name of their file; None without means."""
    if edit.method.neutral is None:
        return None
    name = f"{DIRECTIONS}/neutral.means.safetensors"  # no direction's file has a dot in its stem, so the names differ
    (work / DIRECTIONS).mkdir(exist_ok=True)
    (work / name).write_bytes(save({"neutral": edit.method.neutral}))
    written[name] = hash_file(work / name)
    return name


def certified_edit(folder: Path, cert: Certificate) -> Edit:
    """The edit that a certificate describes, with the directions stored in the output."""
    loaded = [(Direction.load(folder / d.file), d.amount) for d in cert.directions]
    certified = [(d.name, d.site, _text(d.provenance)) for d in cert.directions]
    check_claims(folder, {"directions": certified != [(d.name, d.site, _text(d.provenance)) for d, _ in loaded]})
    blocks, strengths = cert.edit.get("blocks"), cert.edit.get("strengths")
    kernels: dict[str, Any] = {k: Kernel(**v) if isinstance(v, dict) else v for k, v in (strengths or {}).items()}
    edit = Edit(
        ablate=tuple(d for d, amount in loaded if amount is None),
        strength=cert.edit.get("strength") or 1.0,
        blocks=(blocks[0], blocks[1]) if isinstance(blocks, list) else None,
        add=tuple((d, amount) for d, amount in loaded if amount is not None),
        method=Method(
            **cert.edit.get("method", {}), neutral=_load_neutral(folder / cert.neutral) if cert.neutral else None
        ),
        strengths=None if strengths is None else Strengths(**kernels),
    )
    check_claims(folder, {"edit": _text(edit.describe()) != _text(cert.edit)})
    return edit


def _load_neutral(path: Path) -> Float[Tensor, "blocks d"]:
    """The neutral means that a method spared."""
    return load_file(path)["neutral"]


def _text(value: Any) -> str:
    """A value as JSON, for comparing computed values with values from a file; nan equals nan in it, unlike in
    numbers."""
    return json.dumps(value, sort_keys=True)


def finish(cert: Certificate, work: Path, source_header: Mapping[str, Any], written: dict[str, str]) -> Certificate:
    """Write model card and certificate, the last files of an output. Returns the certificate with all hashes.

    `source_header` is the header of the source's model card, read before anything was written.
    """
    cert = replace(cert, command=None if cert.command is None else utf8(cert.command))
    written["README.md"] = write_text(work / "README.md", model_card(cert, source_header))
    cert = replace(cert, files=dict(sorted(written.items())))
    cert.save(work)
    return cert


def source_name(root: Path) -> str:
    """The hub name of a checkpoint if its path shows it, else the name of its directory."""
    return hub_name(root) or utf8(root.resolve().name)


def utf8(name: str) -> str:
    """A name or a command for people. Bytes that are not UTF-8 become `?`, because JSON cannot hold them."""
    return name.encode(errors="replace").decode()


def hub_name(root: Path) -> str | None:
    """The hub name of a checkpoint in the hub's cache, `models--org--name/snapshots/<commit>`; None elsewhere."""
    parts = (part for part in root.resolve().parts if part.startswith("models--"))
    return next(("/".join(part.split("--", 2)[1:]) for part in parts), None)


def versions() -> dict[str, str]:
    """Versions of the programs that an output depends on."""
    import torch

    try:
        steer = metadata.version("steer")
    except metadata.PackageNotFoundError:  # run from a checkout
        steer = "unknown"
    return {"steer": steer, "torch": torch.__version__, "python": platform.python_version()}
