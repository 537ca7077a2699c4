"""Writing an edit into a copy of a checkpoint, tensor by tensor, with a certificate of what came out."""

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

from steer.errors import CheckpointError, UsageError
from steer.values.edit import Edit
from steer.weights.ablation import Ablation
from steer.weights.anatomy import Writer
from steer.weights.arithmetic import ablate, as_tensor, on_accelerator, projection
from steer.weights.card import card_header
from steer.weights.certify import CERTIFICATE, BiasProof, Certificate, WriterProof, inside, visible_files
from steer.weights.journal import Journal
from steer.weights.kept import DIRECTIONS, finish, save_directions, save_means, source_name, utf8, versions
from steer.weights.plan import Plan
from steer.weights.quantised import dequantised
from steer.weights.rewrite import Rewrite, rewrite_shards
from steer.weights.staging import check_output, copy_file, hash_file, staged, write_json
from steer.weights.stream import INDEX, Buffer, CheckpointFiles, NewTensor, TensorInfo

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|npz|index\.json)$")
"""Files of weights. Those beside the checkpoint's own hold the unedited model, so they are left out."""


def bake(
    source: Path,
    out: Path,
    edit: Edit,
    *,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write `source` with `edit` in its weights to `out`, and return what was measured on the result.

    Tensors the edit does not concern, and files that are no weights, are copied byte for byte. `out` is
    complete or absent; what a killed bake of the same source and edit had finished is not done again. Weights in fp8
    with a scale a block are written as bf16. `progress` is called with (bytes of weights written, bytes in all).

    Features that add become biases, as directions do; the other operations on features are refused.

    Errors: OutputExistsError, CheckpointError for a broken source, UnsupportedError for one that cannot hold
    the edit, and for an edit that weights cannot hold, MismatchError for a direction of another width, UsageError
    for a block or site it lacks, SteerError for a full or read-only disk.
    """
    source, out = Path(source), Path(out)
    check_output(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; name an output outside it")
    plan = Plan.of(dequantised(CheckpointFiles.open(source)), edit)
    with staged(out, resume=True) as work:
        return _write(plan, work, command, progress)


@dataclass
class _Editor:
    """Changes tensors in place as they stream by, and keeps the proofs."""

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
        """Ablate if a `writer` is given, then add the shift if there is one; both change what `data` holds."""
        stored = as_tensor(data, info.dtype, info.shape)
        bias = writer is None or info.name == writer.bias
        weight = stored if bias else on_accelerator(stored)
        q = None if writer is None else self.ablation.subspace(writer)
        strength = 0.0 if writer is None else self.ablation.strength(writer)
        keep = self.ablation.edit.method.norm_preserving
        before = 0.0
        if bias:  # `[d]` or `[experts, d]`: rows that face the residual stream, as an embedding's do
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


def _write(plan: Plan, work: Path, command: str | None, progress: Callable[[int, int], None] | None) -> Certificate:
    files, anatomy, edit = plan.files, plan.anatomy, plan.edit
    editor = _Editor(plan.ablation, files.root)
    journal = Journal.of(work, plan.files, plan.edit, "checkpoint")
    # Small files first: what is wrong with them is not found out once the weights are written.
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
        tensors={  # from the headers as they now stand on disk
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
    plan: Plan,
    editor: _Editor,
    work: Path,
    journal: Journal,
    written: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Write shards and index; add the sha256 of what was written to `written`, return those of what was read."""
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
        if past := journal.finished.get(shard.name):
            sources[shard.name], written[shard.name] = past["read"], past["written"]
            editor.writers += [WriterProof(**w) for w in past["writers"]]
            editor.biases += [BiasProof(**b) for b in past["biases"]]
            advance(sum(t.nbytes for t in (*shard.tensors, *plan.new.get(shard.name, ()))))
    jobs = []
    for shard in files.shards:
        if shard.name not in written:
            change = {t.name: changes[t.name] for t in shard.tensors if t.name in changes}
            jobs.append(Rewrite(shard, work / shard.name, change, plan.new.get(shard.name, ())))
    with _one_thread(), closing(rewrite_shards(jobs, advance)) as rewritten:
        for one in rewritten:
            name = one.shard.name
            sources[name], written[name] = one.read, one.written
            proofs = {
                key: [asdict(p) for p in of if files.tensors[p.tensor].file == name]
                for key, of in (("writers", editor.writers), ("biases", editor.biases))
            }
            journal.record(name, read=one.read, written=one.written, **proofs)
    if files.index is not None:
        sources[INDEX] = hash_file(files.root / INDEX)
        written[INDEX] = _write_index(plan, files.index, work)
    order = {name: n for n, name in enumerate(files.tensors)}
    editor.biases.sort(key=lambda proof: order[proof.tensor])
    return sources


@contextmanager
def _one_thread() -> Iterator[None]:
    """One core keeps up with the hashing, which needs the others; and sums come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def changes_of(plan: Plan) -> tuple[_Editor, dict[str, Callable[[Buffer], None]]]:
    """(what keeps the proofs, tensor -> what is done to its bytes)."""
    editor = _Editor(plan.ablation, plan.files.root)
    return editor, _changes(plan, editor)


def _changes(plan: Plan, editor: _Editor) -> dict[str, Callable[[Buffer], None]]:
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


def _created_biases(plan: Plan) -> list[BiasProof]:
    out = []
    for t in _flat(plan.new):
        if t.name in plan.created and isinstance(t.data, bytes):
            bias = as_tensor(bytearray(t.data), t.dtype, t.shape).double()
            out.append(BiasProof(t.name, plan.created[t.name], True, float(bias.norm())))
    return out


def _write_index(plan: Plan, index: dict[str, Any], work: Path) -> str:
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
    """Copy what is no weights; return what was left out, links that lead out of the checkpoint included."""
    root, left_out = files.root, []
    rewritten = {"config.json", *(s.name for s in files.shards), *([INDEX] if files.index is not None else [])}
    for name in visible_files(root):
        path = Path(name)
        ours = name in ("README.md", CERTIFICATE) or path.parts[0] == DIRECTIONS
        if name in rewritten:
            continue
        loose = not (root / path).is_file() or not inside(root / path, root)
        if ours or _WEIGHTS.search(name) or loose or name != utf8(name):
            left_out.append(utf8(name))
            continue
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        written[name] = copy_file(root / path, work / path)
    return tuple(left_out)
