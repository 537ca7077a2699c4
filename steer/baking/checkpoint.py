"""Bakes an edit into a copy of a checkpoint, tensor by tensor.

`CheckpointPlan` streams each shard through `rewrite`, with functions that change tensors in place and record what they
measure; all other bytes are copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steer.baking.certificate import (
    CERTIFICATE,
    DIRECTIONS,
    BiasProof,
    Proofs,
    inside,
    utf8,
    visible_files,
)
from steer.baking.journal import Journal
from steer.baking.plan import Plan, shorter
from steer.baking.rewrite import Rewrite, rewrite_shards
from steer.checkpoint.anatomy import Writer
from steer.checkpoint.projection import DTYPES, ablate, as_bytes, as_tensor, on_accelerator, projection
from steer.checkpoint.reader import INDEX, Buffer, CheckpointFiles, NewTensor, TensorInfo
from steer.checkpoint.staging import copy_file, hash_file, write_json
from steer.core.edit import Edit
from steer.errors import CheckpointError, UsageError

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|npz|index\.json)$")
"""Names of weight files. Such files beside the checkpoint's own hold the unedited model, so they are left out."""


class CheckpointPlan(Plan):
    """The bake of a whole checkpoint."""

    form = "checkpoint"

    def __init__(self, source: Path | CheckpointFiles, edit: Edit, *, edit_mtp: bool = False) -> None:
        super().__init__(source, edit, edit_mtp=edit_mtp)
        tensors, found = self.files.tensors, self.found
        self.new: list[tuple[str, NewTensor]] = []
        """(shard, tensor added to it): an untied LM head, biases."""
        self.created: list[BiasProof] = []
        """The biases among them."""
        self.config: dict[str, Any] = {}
        """Changed entries of config.json."""
        if self.edit.embedding and self.anatomy.tied:
            self.config["tie_word_embeddings"] = False
            if found.head not in tensors:
                embedding = tensors[found.embedding]
                self.new.append((embedding.file, NewTensor(found.head, embedding.dtype, embedding.shape, embedding)))
        mlps = [w for w in found.writers if w.kind == "mlp" and w.bias and w.block in self.shifts]
        self.adds = {str(w.bias): w.block for w in mlps if w.block is not None}
        if self.shifts and not self.anatomy.biased:
            self._create_biases()
        if missing := self.adds.keys() - tensors.keys() - {b.tensor for b in self.created}:
            raise CheckpointError(
                f"{self.files.root}: expected tensor {min(missing)}, found none; fetch the model again"
            )
        self.total = sum(t.nbytes for t in (*tensors.values(), *(new for _, new in self.new)))

    def _create_biases(self) -> None:
        """Add a bias to every module that must have one: what the edit adds at its site, or zeros."""
        root, key = self.files.root, str(self.anatomy.layout.mlp_bias)
        for module in self.anatomy.bias_carriers():
            weight, name = self.files.tensors[f"{module}.weight"], f"{module}.bias"
            if name in self.files.tensors:
                raise CheckpointError(
                    f"{root}: holds {name}, which its config.json turns off ({key}); expected none, mend the config"
                )
            site = self.adds.get(name)
            value = torch.zeros(weight.shape[0]) if site is None else self.shifts[site]
            stored = value.to(DTYPES[weight.dtype])
            if not torch.isfinite(stored).all():
                raise UsageError(
                    f"{root}: {name}: expected finite numbers in {weight.dtype}, found some that it cannot hold; "
                    "add less"
                )
            bias = NewTensor(name, weight.dtype, weight.shape[:1], as_bytes(stored, weight.dtype))
            self.new.append((weight.file, bias))
            self.created.append(BiasProof(name, site, True, float(stored.double().norm())))
        self.config[key] = True

    def changes(self, writers: Sequence[Writer]) -> str:
        facts = [f": {', '.join(shorter(w.tensor for w in writers))}"]
        if any(w.bias in self.files.tensors for w in writers):
            facts.append("with biases")
        if norms := [norm for w in writers for norm in w.norms]:
            facts.append(f"through the gain of {', '.join(shorter(norms))}")
        if strengths := sorted(s for w in writers if (s := self.ablation.strength(w)) > 0):
            facts.append(f"strength {' to '.join(dict.fromkeys(f'{s:.3g}' for s in (strengths[0], strengths[-1])))}")
        return "; ".join(facts)

    def notes(self) -> list[str]:
        lines = [f"  config.json: {key} becomes {value}" for key, value in self.config.items()]
        if self.anatomy.tied and not self.head_is_embedding:
            lines.append(
                f"  {self.found.head}: differs from the embedding, though config.json ties them; kept as it is stored, "
                "which is how transformers 5 loads it"
            )
        return lines

    def write(self, journal: Journal, advance: Callable[[int], None]) -> dict[str, Any]:
        files, work, config = self.files, journal.work, self.files.decoded | self.config
        written, left_out = self._copy_side_files(work)  # first, so that a problem with them shows early
        if config:
            written["config.json"] = write_json(work / "config.json", files.config | self.config)
        else:
            written["config.json"] = copy_file(files.root / "config.json", work / "config.json")
        sources = {"config.json": hash_file(files.root / "config.json")}
        proofs, jobs = {shard.name: Proofs() for shard in files.shards}, []
        for shard in files.shards:
            new = [tensor for name, tensor in self.new if name == shard.name]
            if finished := journal.finished.get(shard.name):
                sources[shard.name], written[shard.name] = finished["read"], finished["written"]
                proofs[shard.name] = Proofs.of(finished)
                advance(sum(t.nbytes for t in (*shard.tensors, *new)))
            else:
                change = self.functions(shard.tensors, proofs[shard.name])
                jobs.append(Rewrite(shard, work / shard.name, change, new))
        with _one_thread(), closing(rewrite_shards(jobs, advance)) as rewritten:
            for done in rewritten:
                name = done.shard.name
                sources[name], written[name] = done.read, done.written
                journal.record(name, read=done.read, written=done.written, **asdict(proofs[name]))
        if files.index is not None:
            sources[INDEX] = hash_file(files.root / INDEX)
            written[INDEX] = self._write_index(files.index, work)
        stored = CheckpointFiles.open(work).tensors.values()  # from the headers of the written files
        return {
            "writers": [w for p in proofs.values() for w in p.writers],
            "biases": (*(b for p in proofs.values() for b in p.biases), *self.created),
            "config": config,
            "tensors": {t.name: [t.file, t.dtype, list(t.shape)] for t in stored},
            "source_files": dict(sorted(sources.items())),
            "files": written,
            "left_out": left_out,
        }

    def functions(self, tensors: Iterable[TensorInfo], proofs: Proofs) -> dict[str, Callable[[Buffer], None]]:
        """Tensor -> function that changes its bytes in place and adds what it measures to `proofs`, for those of the
        tensors that change."""
        writers = {name: w for w in self.writers for name in (w.tensor, w.bias) if name}
        return {
            t.name: partial(self._change, t, writers.get(t.name), self.adds.get(t.name), proofs)
            for t in tensors
            if t.name in writers or t.name in self.adds
        }

    def _change(self, info: TensorInfo, writer: Writer | None, site: int | None, proofs: Proofs, data: Buffer) -> None:
        """Ablate a tensor if it is the weight or the bias of a `writer`, then add what the edit adds at `site`."""
        root, keep = self.files.root, self.ablation.edit.method.norm_preserving
        stored, shift = as_tensor(data, info.dtype, info.shape), None if site is None else self.shifts[site]
        bias = writer is None or info.name == writer.bias
        q, strength = (
            (None, 0.0) if writer is None else (self.ablation.subspace(writer), self.ablation.strength(writer))
        )
        before, weight = 0.0, stored
        if bias:  # `[d]` or `[experts, d]`: its rows face the residual stream, as an embedding's do
            rows = stored.double().view(-1, info.shape[-1])
            if q is not None:
                before = ablate(rows, q, 1, strength, norm_preserving=keep)
            stored.copy_((rows if shift is None else rows + shift).view(stored.shape))
        elif writer is not None and q is not None:
            weight = on_accelerator(stored)
            before = ablate(weight, q, writer.axis, strength, norm_preserving=keep)
            if weight is not stored:
                stored.copy_(weight)
        if shift is not None:
            if not torch.isfinite(stored).all():
                raise CheckpointError(f"{root}: {info.name} is not finite in {info.dtype} after the add; add less")
            proofs.biases.append(BiasProof(info.name, site, False, float(stored.double().norm())))
        if writer is None or q is None:
            return
        after, size = projection(weight, q, writer.axis, bias=bias, shift=shift)
        proofs.writers.append(self.proof(writer, info.name, info.dtype, before, after, size))

    def _write_index(self, index: dict[str, Any], work: Path) -> str:
        """Write the index with the added tensors and new totals, or copy it if nothing changed. Returns its sha256."""
        if not self.new and not self.files.decoded:
            return copy_file(self.files.root / INDEX, work / INDEX)
        weight_map = index["weight_map"] | {t.name: shard for shard, t in self.new}
        if list(index["weight_map"]) == sorted(index["weight_map"]):
            weight_map = dict(sorted(weight_map.items()))
        metadata = dict(index.get("metadata") or {})
        added = {
            "total_size": sum(t.nbytes for _, t in self.new),
            "total_parameters": sum(math.prod(t.shape) for _, t in self.new),
        }
        metadata |= {key: metadata[key] + more for key, more in added.items() if key in metadata}
        return write_json(work / INDEX, index | {"metadata": metadata, "weight_map": weight_map})

    def _copy_side_files(self, work: Path) -> tuple[dict[str, str], tuple[str, ...]]:
        """Copy all files that are not weights. Returns (sha256 of each, the files left out, such as links out of the
        checkpoint)."""
        root, written, left_out = self.files.root, {}, []
        rewritten = {"config.json", *(s.name for s in self.files.shards)}
        if self.files.index is not None:
            rewritten.add(INDEX)
        for name in visible_files(root):
            path = root / name
            written_anew = name in ("README.md", CERTIFICATE) or Path(name).parts[0] == DIRECTIONS
            if name in rewritten:
                continue
            loose = not path.is_file() or not inside(path, root)
            if written_anew or loose or _WEIGHTS.search(name) or name != utf8(name):
                left_out.append(utf8(name))
                continue
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            written[name] = copy_file(path, work / name)
        return written, tuple(left_out)


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
