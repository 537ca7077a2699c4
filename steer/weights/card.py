"""The model card of a baked checkpoint, written from its certificate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from steer.weights.certify import Certificate

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card's header says of any derivative as well."""


def model_card(cert: Certificate, source_card: Path) -> str:
    """README.md for a hub: a YAML header, then what was done and what was measured.

    Licence and language come from the source's card, where it has one with a readable header.
    """
    header: dict[str, Any] = {
        "base_model": "/".join(re.sub(r"[^\w.-]+", "-", part) for part in cert.source.split("/")),
        "library_name": "transformers",
        "tags": ["steer", "feature-steering", *(["abliterated"] if cert.writers else [])],
    } | {k: v for k, v in _front_matter(source_card).items() if k in _KEPT}
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {cert.source}, edited with steer",
        "",
        f"The weights of `{cert.source}` ({cert.architecture}) with this edit in them. "
        "`steer_certificate.json` holds every number below; `steer verify` recomputes them from the files.",
        "",
        "| edit | direction | block | |",
        "|---|---|---|---|",
    ]
    strengths = sorted({f"{w.strength:.3g}" for w in cert.writers}, key=float)
    strength = f"strength {' to '.join(dict.fromkeys([*strengths[:1], *strengths[-1:]]))}"
    for d in cert.directions:
        what = ("ablate", strength) if d.amount is None else ("add", f"amount {d.amount:+g}")
        lines.append(f"| {what[0]} | {d.name} | {d.site} | {what[1]} |")
    lines += ["", "## Measured on these files", ""]
    method = cert.edit.get("method")
    if cert.writers and method:
        kept = ", each column keeping its norm" if method["norm_preserving"] else ""
        lines.append(f"- Method of the ablation: {method['projection']}{kept}.")
    if cert.writers:
        lines += [
            f"- Writers of the residual stream edited: {cert.writers_edited} of {cert.writers_found} "
            f"({_blocks(cert.edit.get('blocks'))}).",
            f"- Share of the ablated directions that remains, worst writer: {cert.worst_remaining:.3%} "
            f"(asked for {1 - cert.strength:.0%}; the rest is rounding to the stored dtype).",
        ]
    carried = sorted(b.site for b in cert.biases if b.site is not None)
    if carried:
        lines.append(f"- Constant added to the residual stream after blocks {', '.join(map(str, carried))}, as biases.")
    changed = ", ".join(f"`{k}` is now `{v}`" for k, v in cert.config.items())
    lines += [
        f"- config.json: {changed or 'unchanged'}. All else is the source's, byte for byte.",
        "",
        f"Made with {', '.join(f'{k} {v}' for k, v in cert.versions.items())}.",
    ]
    if cert.command:
        lines += ["", "```sh", cert.command, "```"]
    return "\n".join(lines) + "\n"


def _blocks(blocks: object) -> str:
    return f"blocks {blocks[0]}-{blocks[1]}" if isinstance(blocks, list) else str(blocks)


def _front_matter(path: Path) -> dict[str, Any]:
    """The header of a model card, empty when there is none that can be read."""
    if not path.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}
