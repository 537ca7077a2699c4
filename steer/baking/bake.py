"""Bakes an edit into a copy of a checkpoint, tensor by tensor, with a certificate of what was measured on the result.

`bake` plans the edit (`plan`), streams each shard through `rewrite` with an `_Editor` that changes the tensors and
records proofs, and writes card and certificate (`outputs`). `journal` lets a killed bake resume.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.baking.card import card_header
from steer.baking.certificate import CERTIFICATE, Certificate, inside, visible_files
from steer.baking.journal import Journal
from steer.baking.outputs import DIRECTIONS, finish, save_directions, save_means, source_name, utf8, versions
from steer.baking.plan import BakePlan
from steer.baking.proofs import BiasProof, WriterProof
from steer.baking.rewrite import Rewrite, rewrite_shards
from steer.checkpoint.ablation import Ablation, ablate, as_tensor, on_accelerator, projection
from steer.checkpoint.anatomy import Writer
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import INDEX, Buffer, CheckpointFiles, NewTensor, TensorInfo
from steer.checkpoint.staging import check_output, copy_file, hash_file, staged, write_json
from steer.core.edit import Edit
from steer.errors import CheckpointError, UsageError

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|npz|index\.json)$")
"""Names of weight files. Such files beside the checkpoint's own hold the unedited model, so they are left out."""


def bake(
    source: Path,
    out: Path,
    edit: Edit,
    *,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write a copy of `source` with `edit` in its weights to `out`, and return the certificate of what was measured on
    it.

    Tensors that the edit does not change, and files other than weights, are copied byte for byte. `out` is complete or
    absent; files that a killed bake of the same source and edit had finished are not written again. Weights in fp8 with
    one scale per block are written as bf16. `progress` is called with (bytes of weights written, bytes in total).
    `command` is the command line that the certificate and the card show.

    Features that add become biases, as directions do; other operations on features are refused.

    Errors: OutputExistsError, CheckpointError for a broken source, UnsupportedError for a source or an edit of a kind
    that weights cannot hold, MismatchError for a direction of another width, UsageError for a block or site that the
    source lacks, SteerError for a full or read-only disk.
    """
    source, out = Path(source), Path(out)
    check_output(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; name an output outside it")
    plan = BakePlan.of(dequantised(CheckpointFiles.open(source)), edit)
    with staged(out, resume=True) as work:
        return _write(plan, work, command, progress)


@dataclass
class _Editor:
    """Changes tensors in place while they stream through, and records the proofs."""

    ablation: Ablation
    root: Path
    writers: list[WriterProof] = field(default_factory=list)
    biases: list[BiasProof] = field(default_factory=list)

    def apply(
        self,
        info: TensorInfo,
        writer: Writer | None,
        site: int | None,
        shift: Float[Tensor, " d"] | None,
        data: Buffer,
    ) -> None:
        """Ablate the tensor in `data` if a `writer` is given, then add `shift` if there is one, both in place."""
        stored = as_tensor(data, info.dtype, info.shape)
        bias = writer is None or info.name == writer.bias
        weight = stored if bias else on_accelerator(stored)
        q = None if writer is None else self.ablation.subspace(writer)
        strength = 0.0 if writer is None else self.ablation.strength(writer)
        keep = self.ablation.edit.method.norm_preserving
        before = 0.0
        if bias:  # `[d]` or `[experts, d]`: its rows face the residual stream, as an embedding's do
            wide = weight.double().view(-1, info.shape[-1])
            if q is not None:
                before = ablate(wide, q, 1, strength, norm_preserving=keep)
            weight.copy_((wide if shift is None else wide + shift).view(weight.shape))
            if shift is not None and not torch.isfinite(weight).all():
                raise CheckpointError(f"{self.root}: {info.name} is not finite in {info.dtype} after the add; add less")
        elif writer is not None and q is not None:
            before = ablate(weight, q, writer.axis, strength, norm_preserving=keep)
            if weight is not stored:
                stored.copy_(weight)
        if shift is not None:
            self.biases.append(BiasProof(info.name, site, False, float(weight.double().norm())))
        if writer is None or q is None:
            return
        after, size = projection(weight, q, writer.axis, bias=bias, shift=shift)
        axis = weight.ndim - 1 if bias else writer.axis
        proof = WriterProof(info.name, writer.kind, writer.block, axis, bias, info.dtype, strength, before, after, size)
        if not math.isfinite(size) or not proof.holds:
            raise CheckpointError(
                f"{self.root}: {info.name} puts {after:.3g} of {before:.3g} into the ablated directions "
                "after the edit; expected finite weights, check the source"
            )
        self.writers.append(proof)


def _write(plan: BakePlan, work: Path, command: str | None, progress: Callable[[int, int], None] | None) -> Certificate:
    """Write everything of the output into the staging directory `work`, small files first."""
    files, anatomy, edit = plan.files, plan.anatomy, plan.edit
    editor = _Editor(plan.ablation, files.root)
    journal = Journal.of(work, plan.files, plan.edit, "checkpoint")
    # Small files first, so that a problem with them shows before the weights are written.
    header = card_header(files.root / "README.md")
    written: dict[str, str] = {}
    left_out = _copy_side_files(files, work, written)
    config = files.decoded | plan.config
    if config:
        written["config.json"] = write_json(work / "config.json", files.config | plan.config)
    else:
        written["config.json"] = copy_file(files.root / "config.json", work / "config.json")
    directions = save_directions(edit, work, written)
    neutral = save_means(edit, work, written)
    sources = _write_weights(plan, editor, work, journal, written, progress)
    order = {name: i for i, w in enumerate(plan.found.writers) for name in (w.tensor, w.bias)}
    cert = Certificate(
        source=source_name(files.root),
        architecture=anatomy.architecture,
        edit=edit.describe(),
        strength=min((w.strength for w in editor.writers), default=edit.strength),
        neutral=neutral,
        writers_found=len(plan.found.writers),
        writers=tuple(sorted(editor.writers, key=lambda w: order[w.tensor])),
        biases=(*editor.biases, *_created_biases(plan)),
        directions=directions,
        config=config,
        tensors={  # from the headers of the written files
            t.name: [t.file, t.dtype, list(t.shape)] for t in CheckpointFiles.open(work).tensors.values()
        },
        source_files=dict(sorted(sources.items())),
        files=written,
        left_out=left_out,
        versions=versions(),
        command=command,
        unloaded=plan.found.unloaded,
    )
    cert = finish(cert, work, header, written)
    journal.close()
    return cert


def _write_weights(
    plan: BakePlan,
    editor: _Editor,
    work: Path,
    journal: Journal,
    written: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Write shards and index. Adds the sha256 of each written file to `written`, and returns those of the files
    read."""
    files = plan.files
    changes = _changes(plan, editor)
    done, total = 0, sum(t.nbytes for t in (*files.tensors.values(), *_flat(plan.new)))

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    sources = {"config.json": hash_file(files.root / "config.json")}
    for shard in files.shards:
        if finished := journal.finished.get(shard.name):
            sources[shard.name], written[shard.name] = finished["read"], finished["written"]
            editor.writers += [WriterProof(**w) for w in finished["writers"]]
            editor.biases += [BiasProof(**b) for b in finished["biases"]]
            advance(sum(t.nbytes for t in (*shard.tensors, *plan.new.get(shard.name, ()))))
    jobs = []
    for shard in files.shards:
        if shard.name not in written:
            change = {t.name: changes[t.name] for t in shard.tensors if t.name in changes}
            jobs.append(Rewrite(shard, work / shard.name, change, plan.new.get(shard.name, ())))
    with _one_thread(), closing(rewrite_shards(jobs, advance)) as rewritten:
        for result in rewritten:
            name = result.shard.name
            sources[name], written[name] = result.read, result.written
            proofs = {
                key: [asdict(p) for p in proofs_of_kind if files.tensors[p.tensor].file == name]
                for key, proofs_of_kind in (("writers", editor.writers), ("biases", editor.biases))
            }
            journal.record(name, read=result.read, written=result.written, **proofs)
    if files.index is not None:
        sources[INDEX] = hash_file(files.root / INDEX)
        written[INDEX] = _write_index(plan, files.index, work)
    order = {name: n for n, name in enumerate(files.tensors)}
    editor.biases.sort(key=lambda proof: order[proof.tensor])
    return sources


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: one core keeps up with the hashing, which needs the other cores, and sums are the same
    on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def changes_of(plan: BakePlan) -> tuple[_Editor, dict[str, Callable[[Buffer], None]]]:
    """(the editor, which records the proofs; tensor -> function that changes its bytes)."""
    editor = _Editor(plan.ablation, plan.files.root)
    return editor, _changes(plan, editor)


def _changes(plan: BakePlan, editor: _Editor) -> dict[str, Callable[[Buffer], None]]:
    """Tensor -> function that edits its bytes in place, for every tensor that the plan changes."""
    shifts, tensors = plan.edit.biases(), plan.files.tensors
    jobs: dict[str, tuple[Writer | None, int | None]] = {}
    for writer in plan.writers:
        jobs |= {name: (writer, None) for name in (writer.tensor, writer.bias) if name and name in tensors}
    for name, site in plan.shifted.items():
        jobs[name] = (jobs[name][0] if name in jobs else None, site)
    return {
        name: partial(editor.apply, tensors[name], writer, site, None if site is None else shifts[site])
        for name, (writer, site) in jobs.items()
    }


def _flat(new: dict[str, tuple[NewTensor, ...]]) -> list[NewTensor]:
    return [t for tensors in new.values() for t in tensors]


def _created_biases(plan: BakePlan) -> list[BiasProof]:
    out = []
    for t in _flat(plan.new):
        if t.name in plan.created and isinstance(t.data, bytes):
            bias = as_tensor(bytearray(t.data), t.dtype, t.shape).double()
            out.append(BiasProof(t.name, plan.created[t.name], True, float(bias.norm())))
    return out


def _write_index(plan: BakePlan, index: dict[str, Any], work: Path) -> str:
    """Write the index with the added tensors and new totals, or copy it if nothing changed. Returns its sha256."""
    if not plan.new and not plan.files.decoded:
        return copy_file(plan.files.root / INDEX, work / INDEX)
    added = {t.name: shard for shard, tensors in plan.new.items() for t in tensors}
    weight_map = index["weight_map"] | added
    if list(index["weight_map"]) == sorted(index["weight_map"]):
        weight_map = dict(sorted(weight_map.items()))
    counts = dict(index.get("metadata") or {})
    for key, more in (
        ("total_size", sum(t.nbytes for t in _flat(plan.new))),
        ("total_parameters", sum(math.prod(t.shape) for t in _flat(plan.new))),
    ):
        if key in counts:
            counts[key] += more
    return write_json(work / INDEX, index | {"metadata": counts, "weight_map": weight_map})


def _copy_side_files(files: CheckpointFiles, work: Path, written: dict[str, str]) -> tuple[str, ...]:
    """Copy all files that are not weights. Returns the files left out, which include links out of the checkpoint."""
    root, left_out = files.root, []
    rewritten = {"config.json", *(s.name for s in files.shards), *([INDEX] if files.index is not None else [])}
    for name in visible_files(root):
        path = Path(name)
        written_anew = name in ("README.md", CERTIFICATE) or path.parts[0] == DIRECTIONS
        if name in rewritten:
            continue
        loose = not (root / path).is_file() or not inside(root / path, root)
        if written_anew or _WEIGHTS.search(name) or loose or name != utf8(name):
            left_out.append(utf8(name))
            continue
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        written[name] = copy_file(root / path, work / path)
    return tuple(left_out)
