"""An edit as a PEFT LoRA of exactly the rank it needs: the source stays as it is, and without the adapter it is back.

Removing `s` of the subspace `Q` from a writer is `W' = W - s Q (Q^T W) = W + B A` with `B = -s Q` and `A = Q^T W`,
whose rank is the number of directions. A bias loses `s Q (Q^T b)` and gains what is added there: the bias of LoRA's B.
Experts have an A and a B each, side by side in two tensors for all of them. What peft cannot hold is refused; see
`steer.weights.adapter_parts`. The files are written without peft: importing it takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from safetensors.torch import load_file, save
from torch import Tensor

from steer.errors import CheckpointError
from steer.files import sync
from steer.values.edit import Edit
from steer.values.method import Kind
from steer.weights.ablation import Ablation
from steer.weights.adapter_factors import Proofs, adapter_tensors
from steer.weights.adapter_parts import Part, adapter_config, find_parts
from steer.weights.anatomy import Anatomy, Found
from steer.weights.bakeable import bakeable, check_bakeable
from steer.weights.card import card_header
from steer.weights.certify import ADAPTER, BiasProof, Certificate, WriterProof
from steer.weights.journal import Journal
from steer.weights.kept import finish, hub_name, save_directions, save_means, source_name, versions
from steer.weights.plan import head_is_embedding, unloaded_line
from steer.weights.quantised import dequantised
from steer.weights.staging import HashingFile, hash_file, staged, write_json
from steer.weights.stream import INDEX, CheckpointFiles, Shard

CONFIG = "adapter_config.json"
_PARTS = ".factors-"
"""What the names of the files begin with that keep finished parts until all are."""
_GROUP = 1 << 30
"""Bytes of weights that are read between two of them."""


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter will hold, checked against the source before anything is written."""

    files: CheckpointFiles
    anatomy: Anatomy
    edit: Edit
    """Features that add are directions in it."""
    found: Found
    ablation: Ablation
    parts: tuple[Part, ...]
    biases: bool
    """Whether every Linear that it changes has a bias in it."""
    untie_to_merge: bool
    """Whether it changes an embedding that is the LM head too. As an adapter it leaves the head alone; merged into the
    one tensor that both are, it does not."""

    @classmethod
    def of(cls, source: Path, edit: Edit) -> AdapterPlan:
        """Errors: as `bake_adapter`."""
        files = dequantised(CheckpointFiles.open(source))
        anatomy = Anatomy.of(files.config, str(source))
        anatomy.check_edit(edit)
        check_bakeable(bakeable(edit.as_moves(), "adapter", anatomy), str(source))
        edit = edit.with_adds_as_directions()
        found = anatomy.find(files.config, files.tensors)
        ablation = Ablation.of(edit, anatomy, files)
        parts = find_parts(files.tensors, anatomy, found, ablation)
        biases = any(p.kind == "linear" and p.bias for p in parts)
        untie = any(p.kind == "embedding" for p in parts) and head_is_embedding(files, anatomy, found)
        return cls(files, anatomy, edit, found, ablation, parts, biases, untie)

    def summary(self) -> str:
        """The writers found, what the adapter does to them, and coverage, for people to read before anything is
        written."""
        a, edited = self.anatomy, [w for p in self.parts for w in p.writers if self.ablation.strength(w) > 0]
        lines = [f"{self.files.root}: {a.architecture}, {a.blocks} blocks, residual width {a.width}"]
        for kind in get_args(Kind):
            of = [w for w in self.found.writers if w.kind == kind]
            names = list(dict.fromkeys(p.kind for p in self.parts for w in p.writers if w.kind == kind))
            lines.append(f"  {kind}: {len({w.tensor for w in edited if w.kind == kind})} of {len(of)} changed"
                         f"{', as ' + ', '.join(names) if names else ''}")  # fmt: skip
        ranks = ", ".join(map(str, sorted({p.rank for p in self.parts})))
        lines.append(f"  adapter: {len(self.parts)} targets, rank {ranks}{', with biases' if self.biases else ''}")
        lines.append(f"  coverage: {len({w.tensor for w in edited})} of {len(self.found.writers)} writers changed")
        lines += [f"  add after block {p.site}: {p.path}" for p in self.parts if p.site is not None]
        if others := self.found.unloaded:
            lines.append(unloaded_line(others))
        return "\n".join(lines)


def bake_adapter(
    source: Path,
    out: Path,
    edit: Edit,
    *,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write `edit` as an adapter for `source` to the directory `out`, and return what was measured.

    `out` is complete or absent. `progress` is called with (bytes of weights read, bytes in all).

    Errors: as `steer.weights.bake.bake`; UnsupportedError for what an adapter cannot hold, naming it.
    """
    source, out = Path(source), Path(out)
    plan = AdapterPlan.of(source, edit)
    with staged(out, resume=True) as work:
        return _write(plan, work, command, progress)


def _write(
    plan: AdapterPlan, work: Path, command: str | None, progress: Callable[[int, int], None] | None
) -> Certificate:
    files, header = plan.files, card_header(plan.files.root / "README.md")
    journal = Journal.of(work, files, plan.edit, "adapter")
    tensors, proofs = _factors(plan, work, journal)
    sources = hash_sources(files, progress, journal)
    with HashingFile(work / ADAPTER) as f:
        f.write(save(tensors, metadata={"format": "pt"}))
    for path in work.glob(f"{_PARTS}*"):
        path.unlink()
    base = hub_name(files.root) or str(files.root.resolve())
    config = adapter_config(base, plan.anatomy, plan.parts, plan.biases)
    written = {ADAPTER: f.sha256, CONFIG: write_json(work / CONFIG, config)}
    directions = save_directions(plan.edit, work, written)
    order = {name: i for i, w in enumerate(plan.found.writers) for name in (w.tensor, w.bias)}
    cert = Certificate(
        source=source_name(files.root),
        architecture=plan.anatomy.architecture,
        edit=plan.edit.describe(),
        strength=min((w.strength for w in proofs.writers), default=plan.edit.strength),
        neutral=save_means(plan.edit, work, written),
        writers_found=len(plan.found.writers),
        writers=tuple(sorted(proofs.writers, key=lambda w: order[w.tensor])),
        biases=tuple(proofs.biases),
        directions=directions,
        config={},
        tensors={t.name: [t.file, t.dtype, list(t.shape)] for t in Shard.open(work / ADAPTER).tensors},
        source_files=sources,
        files=written,
        left_out=(),
        versions=versions(),
        command=command,
        form="adapter",
        unloaded=plan.found.unloaded,
        untie_to_merge=plan.untie_to_merge,
    )
    cert = finish(cert, work, header, written)
    journal.close()
    return cert


def _factors(plan: AdapterPlan, work: Path, journal: Journal) -> tuple[dict[str, Tensor], Proofs]:
    """Every tensor of the adapter, those that a killed bake had made read from its files."""
    tensors, proofs = {}, Proofs()
    for number, parts in enumerate(_groups(plan)):
        name = f"{_PARTS}{number}.safetensors"
        if past := journal.finished.get(name):
            tensors |= load_file(work / name)
            mine = Proofs([WriterProof(**w) for w in past["writers"]], [BiasProof(**b) for b in past["biases"]])
        else:
            mine = Proofs()
            made = dict(adapter_tensors(plan, parts, mine))
            with HashingFile(work / name) as f:
                f.write(save(made))
            sync(work / name)
            journal.record(name, written=f.sha256, read="", **asdict(mine))
            tensors |= made
        proofs.writers += mine.writers
        proofs.biases += mine.biases
    return tensors, proofs


def _groups(plan: AdapterPlan) -> Iterator[list[Part]]:
    """The parts, so many together that a file of theirs is worth its sync."""
    group, size = [], 0
    for part in plan.parts:
        group.append(part)
        size += sum(plan.files.tensors[w.tensor].nbytes for w in part.writers)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def hash_sources(
    files: CheckpointFiles, progress: Callable[[int, int], None] | None = None, journal: Journal | None = None
) -> dict[str, str]:
    """sha256 of the source's weights, its index and its config; with a journal, of those it does not know yet.

    Errors: CheckpointError for a shard that is no longer as its header was read.
    """
    done, total = 0, sum(s.size for s in files.shards)
    out = {}
    for shard in files.shards:
        past = None if journal is None else journal.facts.get(shard.name)
        out[shard.name] = past["read"] if past else hash_file(shard.path)
        stat = shard.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(f"{shard.path}: changed while it was read; wait until it is finished, run again")
        if journal is not None and not past:
            journal.note(shard.name, read=out[shard.name])
        done += shard.size
        if progress:
            progress(done, total)
    names = ["config.json", *([INDEX] if files.index is not None else [])]
    return out | {name: hash_file(files.root / name) for name in names}
