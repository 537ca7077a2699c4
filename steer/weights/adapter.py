"""An edit as a PEFT LoRA of exactly the rank it needs: the source stays as it is, and without the adapter it is back.

Removing `s` of the subspace `Q` from a writer is `W' = W - s Q (Q^T W) = W + B A` with `B = -s Q` and `A = Q^T W`,
whose rank is the number of directions. A bias loses `s Q (Q^T b)` and gains what is added there: the bias of LoRA's B.
Experts have an A and a B each, side by side in two tensors for all of them. What peft cannot hold is refused; see
`steer.weights.adapter_parts`. The files are written without peft: importing it takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from steer.errors import CheckpointError
from steer.values.edit import Edit
from steer.values.method import Kind
from steer.weights.ablation import Ablation
from steer.weights.adapter_parts import Part, adapter_config, find_parts
from steer.weights.anatomy import Anatomy, Found, Writer
from steer.weights.arithmetic import as_tensor, norm, shadow
from steer.weights.bakeable import bakeable, check_bakeable
from steer.weights.certify import ADAPTER, BiasProof, Certificate, WriterProof
from steer.weights.kept import finish, hub_name, save_directions, save_means, source_name, versions
from steer.weights.quantised import dequantised
from steer.weights.staging import HashingFile, hash_file, staged, write_json
from steer.weights.stream import INDEX, CheckpointFiles, Shard

CONFIG = "adapter_config.json"


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
        return cls(files, anatomy, edit, found, ablation, parts, biases)

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
    with staged(out) as work:
        return _write(plan, work, command, progress)


def _write(
    plan: AdapterPlan, work: Path, command: str | None, progress: Callable[[int, int], None] | None
) -> Certificate:
    files, proofs = plan.files, Proofs([], [])
    tensors = dict(adapter_tensors(plan, proofs))
    sources = hash_sources(files, progress)
    with HashingFile(work / ADAPTER) as f:
        f.write(save(tensors, metadata={"format": "pt"}))
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
    )
    return finish(cert, work, files.root / "README.md", written)


@dataclass
class Proofs:
    """What is measured while an adapter's tensors are made."""

    writers: list[WriterProof]
    biases: list[BiasProof]


def adapter_tensors(plan: AdapterPlan, proofs: Proofs) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the adapter by name, one part of the source in memory at a time."""
    make = _Factory(plan, proofs)
    makers = {
        "linear": make.linear,
        "parameter": make.linear,
        "embedding": make.embedding,
        "experts": make.experts,
        "expert biases": make.expert_biases,
    }
    for part in plan.parts:
        for name, tensor in makers[part.kind](part):
            yield name, tensor.contiguous().clone()  # no two may share their memory in the file


class _Factory:
    """Makes the tensors of parts; A is `[rank, in]` and B `[out, rank]`, as in `W + B A`."""

    def __init__(self, plan: AdapterPlan, proofs: Proofs) -> None:
        self.plan, self.proofs = plan, proofs
        self.shifts = plan.edit.biases()

    def linear(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        (writer,) = part.writers
        weight, dtype = self._read(writer.tensor)
        width, other = weight.shape[writer.axis], weight.shape[1 - writer.axis]
        if self.plan.ablation.strength(writer) > 0:
            a, b = self._factors(writer, weight, writer.axis, dtype, f"{part.key}.lora_A.weight")
        else:  # an add alone: peft knows no rank 0
            a, b = torch.zeros(1, other, dtype=dtype), torch.zeros(width, 1, dtype=dtype)
        yield f"{part.key}.lora_A.weight", a
        yield f"{part.key}.lora_B.weight", b
        if self.plan.biases:
            name = f"{part.key}.lora_B.bias"
            bias = self._bias_change(writer, part.site, width, dtype, name)
            if part.site is not None:
                self.proofs.biases.append(BiasProof(name, part.site, True, float(bias.double().norm())))
            yield name, bias

    def embedding(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        (writer,) = part.writers
        weight, dtype = self._read(writer.tensor)
        a, b = self._factors(writer, weight, writer.axis, dtype, f"{part.key}.lora_embedding_A")
        yield f"{part.key}.lora_embedding_A", a
        yield f"{part.key}.lora_embedding_B", b

    def experts(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        stacks = []
        for writer in part.writers:
            weight, dtype = self._read(writer.tensor)
            stack = weight if writer.stacked else weight[None]
            axis = writer.axis - 1 if writer.stacked else writer.axis
            stacks.append(self._factors(writer, stack, axis, dtype, f"{part.key}.lora_A.weight"))
        # Experts are told apart first in A's rows and last in B's columns; B is the same for all of them.
        a, b = torch.cat([s[0] for s in stacks]), stacks[0][1]
        yield f"{part.key}.lora_A.weight", a.reshape(-1, a.shape[-1])
        yield f"{part.key}.lora_B.weight", b[:, :, None].expand(-1, -1, a.shape[0]).reshape(b.shape[0], -1)

    def expert_biases(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        (writer,) = part.writers
        assert writer.bias is not None
        bias, dtype = self._read(writer.bias)
        a, b = torch.zeros(0, bias.shape[1], dtype=dtype), torch.zeros(bias.shape[0], 0, dtype=dtype)
        if self.plan.ablation.strength(writer) > 0:
            q, strength = self.plan.ablation.subspace(writer), self.plan.ablation.strength(writer)
            wide = bias.double()
            a, b = q.T.to(dtype), (-strength * wide @ q).to(dtype)
            left = (wide + b.double() @ a.double()) @ q
            key, before = f"{part.key}.lora_A.weight", float((wide @ q).norm())
            self._prove(writer, writer.bias, key, dtype, before, float(left.norm()), norm(bias))
        if part.site is not None:
            shift = self.shifts[part.site].to(dtype)
            a, b = torch.cat([a, shift[None]]), torch.cat([b, torch.ones(len(b), 1, dtype=dtype)], dim=1)
            name = f"{part.key}.lora_A.weight"
            self.proofs.biases.append(BiasProof(name, part.site, True, float(a.double().norm())))
        yield f"{part.key}.lora_A.weight", a
        yield f"{part.key}.lora_B.weight", b

    def _factors(
        self, writer: Writer, weight: Float[Tensor, "*experts out in"], axis: int, dtype: torch.dtype, key: str
    ) -> tuple[Float[Tensor, "*experts k in"], Float[Tensor, "d k"]]:
        """A for the weight, or for each of a stack, and B; proves what is left."""
        q, strength = self.plan.ablation.subspace(writer), self.plan.ablation.strength(writer)
        matrices = weight if weight.ndim == 3 else weight[None]
        casts = torch.stack([shadow(m, q, axis) for m in matrices]).double()
        a, b = casts.to(dtype), (-strength * q).to(dtype)
        left = casts + (q.T @ b.double()) @ a.double()
        before, after = float(casts.norm()), float(left.norm())
        size = max(norm(weight) ** 2 - (2 * strength - strength**2) * before**2, 0.0) ** 0.5
        self._prove(writer, writer.tensor, key, dtype, before, after, size)
        return (a if weight.ndim == 3 else a[0]), b

    def _bias_change(
        self, writer: Writer, site: int | None, width: int, dtype: torch.dtype, key: str
    ) -> Float[Tensor, " d"]:
        change = torch.zeros(width, dtype=torch.float64)
        strength = self.plan.ablation.strength(writer)
        if writer.bias in self.plan.files.tensors and strength > 0:
            assert writer.bias is not None
            q, bias = self.plan.ablation.subspace(writer), self._read(writer.bias)[0].double()
            change -= strength * q @ (q.T @ bias)
            after = float((q.T @ (bias + change.to(dtype).double())).norm())
            self._prove(writer, writer.bias, key, dtype, float((q.T @ bias).norm()), after, norm(bias))
        return (change if site is None else change + self.shifts[site]).to(dtype)

    def _prove(
        self, writer: Writer, name: str, key: str, dtype: torch.dtype, before: float, after: float, size: float
    ) -> None:
        bias, strength = name == writer.bias, self.plan.ablation.strength(writer)
        axis = len(self.plan.files.tensors[name].shape) - 1 if bias else writer.axis
        code = "F64" if dtype == torch.float64 else "F32"
        proof = WriterProof(name, writer.kind, writer.block, axis, bias, code, strength, before, after, size, key)
        if not proof.holds:  # nan holds nothing either
            raise CheckpointError(
                f"{self.plan.files.root}: {name} puts {after:.3g} of {before:.3g} into the ablated directions under "
                "the adapter; expected finite weights, check the source"
            )
        self.proofs.writers.append(proof)

    def _read(self, name: str) -> tuple[Tensor, torch.dtype]:
        """A tensor, and the dtype of its LoRA: peft computes in fp32 where weights are narrower."""
        info = self.plan.files.tensors[name]
        return as_tensor(self.plan.files.read(info), info.dtype, info.shape), (
            torch.float64 if info.dtype == "F64" else torch.float32
        )


def hash_sources(files: CheckpointFiles, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """sha256 of the source's weights, its index and its config.

    Errors: CheckpointError for a shard that is no longer as its header was read.
    """
    done, total = 0, sum(s.size for s in files.shards)
    out = {}
    for shard in files.shards:
        out[shard.name] = hash_file(shard.path)
        stat = shard.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(f"{shard.path}: changed while it was read; wait until it is finished, run again")
        done += shard.size
        if progress:
            progress(done, total)
    names = ["config.json", *([INDEX] if files.index is not None else [])]
    return out | {name: hash_file(files.root / name) for name in names}
