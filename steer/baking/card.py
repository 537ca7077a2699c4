"""Writes the model card (README.md) of a bake from its certificate; `card.md.j2` holds its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from steer.baking.certificate import Certificate, Form
from steer.checkpoint.layouts import LAYOUTS
from steer.core.small_files import load_yaml
from steer.errors import SteerError

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a card's header that also hold for a derived model."""
_LIMIT = 1 << 20
"""Bytes of a card that are read."""
_HEADERS: dict[Form, dict[str, Any]] = {
    "checkpoint": {"base_model_relation": "finetune", "library_name": "transformers", "tags": []},
    "adapter": {"base_model_relation": "adapter", "library_name": "peft", "tags": ["lora"]},
    "gguf": {"base_model_relation": "adapter", "tags": ["gguf", "control-vector", "llama.cpp"]},
}


def model_card(cert: Certificate, source_header: Mapping[str, Any]) -> str:
    """README.md for a model hub: a YAML header, then the edit and the measurements.

    Licence and language are copied from `source_header`, the header of the source's card.
    """
    form = _HEADERS[cert.form]
    header = {
        "base_model": "/".join(re.sub(r"[^\w.-]+", "-", part) for part in cert.source.split("/")),
        **form,
        "tags": ["steer", "feature-steering", *(["abliterated"] if cert.writers else []), *form["tags"]],
        **{k: v for k, v in source_header.items() if k in _KEPT},
    }
    strengths = sorted(w.strength for w in cert.writers)
    environment = Environment(
        loader=PackageLoader("steer", "baking"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("card.md.j2").render(
        cert=cert,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        head=LAYOUTS[cert.architecture].head_module,
        strength=" to ".join(dict.fromkeys(f"{s:.3g}" for s in (*strengths[:1], *strengths[-1:]))),
        sites=", ".join(map(str, sorted(b.site for b in cert.biases if b.site is not None))),
        where=_where(cert.edit),
        changed=", ".join(f"`{k}` is now `{v}`" for k, v in cert.config.items()),
        versions=", ".join(f"{k} {v}" for k, v in cert.versions.items()),
    )


def _where(edit: dict[str, Any]) -> str:
    blocks, strengths = edit.get("blocks"), edit.get("strengths")
    where = f"blocks {blocks[0]}-{blocks[1]}" if isinstance(blocks, list) else str(blocks)
    if strengths is None:
        return where
    by_kind = [f"{kind} {_strength(strength)}" for kind, strength in strengths.items()]
    return ", ".join([*([where] if isinstance(blocks, list) else []), *by_kind])


def _strength(strength: Any) -> str:
    if not isinstance(strength, dict):
        return f"{strength:g}"
    return "{height:g} at block {peak:g}, down to {floor:g} in {width:g} blocks".format(**strength)


def card_header(path: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty if there is none that can be read within a megabyte.

    Never raises: a broken card is no reason to lose weights that are written.
    """
    try:
        with open(path, "rb") as f:
            text = f.read(_LIMIT).decode(errors="replace")
        match = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
        header = load_yaml(match[1].encode(), str(path), "a header", aliases=True) if match else None
    except (OSError, SteerError):
        return {}
    return header if isinstance(header, dict) else {}
