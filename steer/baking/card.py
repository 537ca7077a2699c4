"""Writes the model card (README.md) of a bake from its certificate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from steer.baking.certificate import Certificate
from steer.checkpoint.layouts import LAYOUTS
from steer.core.small_files import load_yaml
from steer.errors import SteerError

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a card's header that also hold for a derived model."""
_LIMIT = 1 << 20
"""Bytes of a card that are read."""


_LIBRARY = {"checkpoint": "transformers", "adapter": "peft"}
_TAGS = {"checkpoint": (), "adapter": ("lora",), "gguf": ("gguf", "control-vector", "llama.cpp")}
_WHAT = {
    "checkpoint": "The weights of `{source}` ({architecture}) with this edit in them.",
    "adapter": "A LoRA for `{source}` ({architecture}) that does this edit. Its weights stay as they are: without the "
    "adapter it is the source again.",
    "gguf": "A control vector for `{source}` ({architecture}), as llama.cpp and what is built on it load it. The "
    "amounts below are in it: use it at scale 1.",
}


_MERGING = """
Do not merge it as it is: the LM head of the source is its embedding, and merging this adapter into the embedding would
change the logits through the head. Give the head its own weight first:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("the source")
model.{head}.weight = torch.nn.Parameter(model.{head}.weight.detach().clone())
model.config.tie_word_embeddings = False
model = PeftModel.from_pretrained(model, "this directory").merge_and_unload()
```"""


def model_card(cert: Certificate, source_header: Mapping[str, Any]) -> str:
    """README.md for a model hub: a YAML header, then the edit and the measurements.

    Licence and language are copied from `source_header`, the header of the source's card.
    """
    library = _LIBRARY.get(cert.form)
    header: dict[str, Any] = {
        "base_model": "/".join(re.sub(r"[^\w.-]+", "-", part) for part in cert.source.split("/")),
        "base_model_relation": "finetune" if cert.form == "checkpoint" else "adapter",
        **({"library_name": library} if library else {}),
        "tags": ["steer", "feature-steering", *(["abliterated"] if cert.writers else []), *_TAGS[cert.form]],
    } | {k: v for k, v in source_header.items() if k in _KEPT}
    what = _WHAT[cert.form].format(source=cert.source, architecture=cert.architecture)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {cert.source}, {'edited' if cert.form == 'checkpoint' else 'steered'} with steer",
        "",
        f"{what} `steer_certificate.json` holds every number below; `steer verify` recomputes them from the files.",
        "",
        "| edit | direction | block | |",
        "|---|---|---|---|",
    ]
    strengths = sorted({f"{w.strength:.3g}" for w in cert.writers}, key=float)
    strength = f"strength {' to '.join(dict.fromkeys([*strengths[:1], *strengths[-1:]]))}"
    for d in cert.directions:
        entry = ("ablate", strength) if d.amount is None else ("add", f"amount {d.amount:+g}")
        lines.append(f"| {entry[0]} | {d.name.replace('|', '/')} | {d.site} | {entry[1]} |")
    lines += [*_usage(cert), "", "## Measured on these files", "", *_measured(cert), ""]
    lines.append(f"Made with {', '.join(f'{k} {v}' for k, v in cert.versions.items())}.")
    if cert.command:
        lines += ["", "```sh", cert.command, "```"]
    return "\n".join(lines) + "\n"


def _usage(cert: Certificate) -> list[str]:
    if cert.form == "adapter":
        return [
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("this directory")',
            "model.disable_adapter()  # a context manager: inside it is the source",
            "```",
            *(_MERGING.format(head=LAYOUTS[cert.architecture].head_module).split("\n") if cert.untie_to_merge else ()),
        ]
    if cert.form == "gguf":
        file = next(f for f in cert.files if f.endswith(".gguf"))
        return ["", "```sh", f"llama-cli -m MODEL.gguf --control-vector {file}", "```"]
    return []


def _measured(cert: Certificate) -> list[str]:
    lines = []
    method = cert.edit.get("method")
    if cert.writers and method:
        norm_note = ", each column keeping its norm" if method["norm_preserving"] else ""
        lines.append(f"- Method of the ablation: {method['projection']}{norm_note}.")
    if cert.writers:
        lines += [
            f"- Writers of the residual stream edited: {cert.writers_edited} of {cert.writers_found} "
            f"({_where(cert.edit)}).",
            f"- Share of the ablated directions that remains, worst writer: {cert.worst_remaining:.3%} "
            f"(asked for {1 - cert.strength:.0%}; the rest is rounding to the stored dtype).",
        ]
    if add_sites := sorted(b.site for b in cert.biases if b.site is not None):
        where = {"checkpoint": "biases", "adapter": "biases of the adapter", "gguf": "the control vector"}[cert.form]
        lines.append(
            f"- Constant added to the residual stream after blocks {', '.join(map(str, add_sites))}, as {where}."
        )
    if cert.unloaded:
        count, first = len(cert.unloaded), cert.unloaded[0]
        lines.append(f"- Not edited, as transformers does not load them: {count} tensors, from `{first}` on.")
    if cert.form == "checkpoint":
        changed = ", ".join(f"`{k}` is now `{v}`" for k, v in cert.config.items())
        lines.append(f"- config.json: {changed or 'unchanged'}. All else is the source's, byte for byte.")
    return lines


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
