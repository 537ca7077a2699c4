"""Bakes an edit into a new directory, in any form, with a model card and a certificate of what was measured.

The plan of the form (`checkpoint`, `adapter`, `llama_cpp`) writes the weights; `bake` writes everything else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from safetensors.torch import save

from steer.baking.adapter import AdapterPlan
from steer.baking.certificate import (
    DIRECTIONS,
    Certificate,
    Form,
    SavedDirection,
    inside,
    lora_files,
    proved_structure,
    server_command,
    source_name,
    utf8,
    versions,
)
from steer.baking.checkpoint import CheckpointPlan
from steer.baking.journal import Journal
from steer.baking.llama_cpp import LlamaCppPlan
from steer.baking.plan import Plan, check_mtp
from steer.checkpoint.chat_templates import FILE as CHAT_TEMPLATE
from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.staging import check_output, copy_file, hash_file, staged, write_text
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.small_files import load_yaml
from steer.errors import SteerError, UsageError

PLANS: dict[Form, type[Plan]] = {p.form: p for p in (CheckpointPlan, AdapterPlan, LlamaCppPlan)}

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of a card's header that also hold for a derived model."""
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json"
)  # fmt: skip
"""Names of a tokenizer's files."""
_LIMIT = 1 << 20
"""Bytes of a card that are read."""
_HEADERS: dict[Form, dict[str, Any]] = {
    "checkpoint": {"base_model_relation": "finetune", "library_name": "transformers", "tags": []},
    "adapter": {"base_model_relation": "adapter", "library_name": "peft", "tags": ["lora"]},
    "gguf": {"base_model_relation": "adapter", "tags": ["gguf", "llama.cpp"]},
}


def bake(
    source: Path,
    out: Path,
    edit: Edit,
    form: Form = "checkpoint",
    *,
    edit_mtp: bool = False,
    chat_template: str | Path | None = None,
    command: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write `edit` in one of the forms to the directory `out`, and return the certificate of what was measured on it.

    `checkpoint` is a copy of `source` with the edit in its weights: tensors that the edit does not change, and files
    other than weights, are copied byte for byte, and weights in fp8 with one scale per block are written as bf16.
    `adapter` is a LoRA for the source. `gguf` is files for llama.cpp: what the edit adds, multiplied by
    the amounts, as a control vector, and a LoRA for each direction that it ablates.
    Features that add become biases, as directions do; other operations on features are refused.

    `out` is complete or absent; files that a killed bake of the same source and edit had finished are not written
    again. `edit_mtp`: whether a checkpoint's layers for multi-token prediction that have the shape of a block are
    ablated too, at the strength of the last block; adds do not concern them. `chat_template`: one that ships or a file,
    by default $STEER_CHAT_TEMPLATE, in place of the source's: an adapter then has the source's tokenizer too, and a
    control vector a file for llama.cpp's --chat-template-file. `command` is the command line that the certificate and
    the card show. `say` is called with the plan before anything is written, `progress` with (bytes of weights done,
    bytes in total).

    Errors: OutputExistsError, CheckpointError for a broken source, UnsupportedError for a source or an edit of a kind
    that the form cannot hold, MismatchError for a direction of another width, UsageError for a block or site that the
    source lacks, SteerError for a full or read-only disk.
    """
    source, out = Path(source), Path(out)
    check_output(out)
    if form == "checkpoint" and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; name an output outside it")
    template = chosen_template(chat_template)
    plan = PLANS[form](source, edit, edit_mtp=edit_mtp)
    if edit_mtp:
        check_mtp(plan.found, form, plan.anatomy, ablates=bool(plan.edit.ablate))
    say(plan.summary())
    if template is not None and form == "gguf":
        say(f"  {CHAT_TEMPLATE}: llama.cpp takes it with --jinja --chat-template-file")
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, plan.total)

    header = _card_header(source / "README.md")
    with staged(out, resume=form != "gguf") as work:
        journal = Journal.of(work, plan.files, plan.edit, form, edit_mtp=edit_mtp)
        facts = plan.write(journal, advance)
        directions, neutral = _save_directions(plan.edit, work), _save_means(plan.edit, work)
        files = facts["files"] | {name: hash_file(work / name) for name in {d.file for d in directions}}
        if neutral:
            files[neutral] = hash_file(work / neutral)
        if template is not None:
            for file in _tokenizer_files(source) if form == "adapter" else ():  # else nothing loads the template there
                (work / file.name).unlink(missing_ok=True)
                files[file.name] = copy_file(file, work / file.name)
            (work / CHAT_TEMPLATE).unlink(missing_ok=True)
            files[CHAT_TEMPLATE] = write_text(work / CHAT_TEMPLATE, template)
        order = {name: n for n, w in enumerate(plan.all_writers) for name in (w.tensor, w.bias)}
        writers = tuple(sorted(facts.get("writers", ()), key=lambda w: order[w.tensor]))
        facts |= {"writers": writers, "biases": tuple(facts["biases"]), "files": files}
        defaults = {
            "writers_found": len(plan.all_writers),
            "config": {},
            "left_out": (),
            "unloaded": plan.passed_through,
        }
        cert = Certificate(
            source=source_name(source),
            architecture=plan.anatomy.architecture,
            structure=None if form == "checkpoint" else proved_structure(plan.anatomy),
            edit=plan.edit.describe(),
            strength=min((w.strength for w in writers), default=plan.edit.strength),
            neutral=neutral,
            directions=directions,
            versions=versions(),
            command=None if command is None else utf8(command),
            form=form,
            edit_mtp=edit_mtp,
            **(defaults | facts),
        )
        files["README.md"] = write_text(work / "README.md", _model_card(cert, header, plan.anatomy.head_module))
        cert = replace(cert, files=dict(sorted(files.items())))
        cert.save(work)
        journal.close()
    return cert


def _tokenizer_files(source: Path) -> list[Path]:
    """The files of a checkpoint that a tokenizer is loaded from."""
    found = (f for pattern in _TOKENIZER for f in source.glob(pattern))
    return sorted(f for f in found if f.is_file() and inside(f, source))


def _save_directions(edit: Edit, work: Path) -> tuple[SavedDirection, ...]:
    """Write each direction of an edit once."""
    saved: dict[Direction, str] = {}
    out = []
    for direction, amount in (*((d, None) for d in edit.ablate), *edit.add):
        if direction not in saved:
            stem = f"{DIRECTIONS}/{re.sub(r'[^A-Za-z0-9_-]+', '-', direction.name)}-{direction.site}"
            names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
            saved[direction] = next(f for n in names if (f := f"{n}.safetensors") not in saved.values())
            direction.save(work / saved[direction])
        name, site = direction.name, direction.site
        out.append(SavedDirection(saved[direction], name, site, amount, direction.provenance))
    return tuple(out)


def _save_means(edit: Edit, work: Path) -> str | None:
    """Write the neutral means that the method spared, and return the name of their file; None without means."""
    if edit.method.neutral is None:
        return None
    name = f"{DIRECTIONS}/neutral.means.safetensors"  # no direction's file has a dot in its stem, so the names differ
    (work / DIRECTIONS).mkdir(exist_ok=True)
    (work / name).write_bytes(save({"neutral": edit.method.neutral}))
    return name


def _model_card(cert: Certificate, source_header: Mapping[str, Any], head: str) -> str:
    """README.md for a model hub: a YAML header, then the edit and the measurements.

    Licence and language are copied from `source_header`, the header of the source's card. `head`: path of the LM head.
    """
    form = _HEADERS[cert.form]
    kinds = ()
    if cert.form == "gguf":
        kinds = [*(["lora"] if cert.writers else []), *(["control-vector"] if cert.biases else [])]
    header = {
        "base_model": "/".join(re.sub(r"[^\w.-]+", "-", part) for part in cert.source.split("/")),
        **form,
        "tags": ["steer", "feature-steering", *(["abliterated"] if cert.writers else []), *form["tags"], *kinds],
        **{k: v for k, v in source_header.items() if k in _KEPT},
    }
    strengths = sorted(w.strength for w in cert.writers)
    environment = Environment(
        loader=PackageLoader("steer", "baking"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("card.md.j2").render(
        cert=cert,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        head=head,
        strength=" to ".join(dict.fromkeys(f"{s:.3g}" for s in (*strengths[:1], *strengths[-1:]))),
        sites=", ".join(map(str, sorted(b.site for b in cert.biases if b.site is not None))),
        changed=", ".join(f"`{k}` is now `{v}`" for k, v in cert.config.items()),
        server=server_command(cert) if cert.form == "gguf" else "",
        loras=lora_files(cert),
        versions=", ".join(f"{k} {v}" for k, v in cert.versions.items()),
    )


def _card_header(path: Path) -> dict[str, Any]:
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
