"""Bakes an edit into a new directory, in any form, with a model card and a certificate of what was measured.

The plan of the form (`checkpoint`, `adapter`, `control_vector`) writes the weights; `bake` writes everything else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from steer.baking.adapter import AdapterPlan
from steer.baking.card import card_header, model_card
from steer.baking.certificate import DIRECTIONS, Certificate, Form, SavedDirection, source_name, utf8, versions
from steer.baking.checkpoint import CheckpointPlan
from steer.baking.control_vector import ControlVectorPlan
from steer.baking.journal import Journal
from steer.baking.plan import Plan
from steer.checkpoint.staging import check_output, hash_file, staged, write_text
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import UsageError

PLANS: dict[Form, type[Plan]] = {p.form: p for p in (CheckpointPlan, AdapterPlan, ControlVectorPlan)}


def bake(
    source: Path,
    out: Path,
    edit: Edit,
    form: Form = "checkpoint",
    *,
    command: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write `edit` in one of the forms to the directory `out`, and return the certificate of what was measured on it.

    `checkpoint` is a copy of `source` with the edit in its weights: tensors that the edit does not change, and files
    other than weights, are copied byte for byte, and weights in fp8 with one scale per block are written as bf16.
    `adapter` is a LoRA for the source. `gguf` is a control vector with what the edit adds, multiplied by the amounts.
    Features that add become biases, as directions do; other operations on features are refused.

    `out` is complete or absent; files that a killed bake of the same source and edit had finished are not written
    again. `command` is the command line that the certificate and the card show. `say` is called with the plan before
    anything is written, `progress` with (bytes of weights done, bytes in total).

    Errors: OutputExistsError, CheckpointError for a broken source, UnsupportedError for a source or an edit of a kind
    that the form cannot hold, MismatchError for a direction of another width, UsageError for a block or site that the
    source lacks, SteerError for a full or read-only disk.
    """
    source, out = Path(source), Path(out)
    check_output(out)
    if form == "checkpoint" and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; name an output outside it")
    plan = PLANS[form](source, edit)
    say(plan.summary())
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, plan.total)

    header = card_header(source / "README.md")
    with staged(out, resume=form != "gguf") as work:
        journal = Journal.of(work, plan.files, plan.edit, form)
        written: dict[str, str] = {}
        directions, neutral = _save_directions(plan.edit, work, written), _save_means(plan.edit, work, written)
        facts = plan.write(work, journal, written, advance)
        order = {name: n for n, w in enumerate(plan.found.writers) for name in (w.tensor, w.bias)}
        writers = tuple(sorted(facts.get("writers", ()), key=lambda w: order[w.tensor]))
        defaults = {
            "writers_found": len(plan.found.writers),
            "config": {},
            "left_out": (),
            "unloaded": plan.found.unloaded,
        }
        cert = Certificate(
            source=source_name(source),
            architecture=plan.anatomy.architecture,
            edit=plan.edit.describe(),
            strength=min((w.strength for w in writers), default=plan.edit.strength),
            neutral=neutral,
            directions=directions,
            files=written,
            versions=versions(),
            command=None if command is None else utf8(command),
            form=form,
            **(defaults | facts | {"writers": writers, "biases": tuple(facts["biases"])}),
        )
        written["README.md"] = write_text(work / "README.md", model_card(cert, header))
        cert = replace(cert, files=dict(sorted(written.items())))
        cert.save(work)
        journal.close()
    return cert


def _save_directions(edit: Edit, work: Path, written: dict[str, str]) -> tuple[SavedDirection, ...]:
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


def _save_means(edit: Edit, work: Path, written: dict[str, str]) -> str | None:
    """Write the neutral means that the method spared, and return the name of their file; None without means."""
    if edit.method.neutral is None:
        return None
    name = f"{DIRECTIONS}/neutral.means.safetensors"  # no direction's file has a dot in its stem, so the names differ
    (work / DIRECTIONS).mkdir(exist_ok=True)
    (work / name).write_bytes(save({"neutral": edit.method.neutral}))
    written[name] = hash_file(work / name)
    return name
