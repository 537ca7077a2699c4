"""Bakes an edit as a LoRA adapter: which modules and parameters it changes, their factors, and the files.

`AdapterPlan` lists the parts of the adapter and computes their factors; `adapter_check` verifies the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from steer.baking.certificate import ADAPTER, BiasProof, Proofs, WriterProof, hub_name
from steer.baking.journal import Journal
from steer.baking.plan import Plan
from steer.checkpoint.ablation import as_tensor, norm, shadow
from steer.checkpoint.anatomy import Writer
from steer.checkpoint.reader import INDEX, CheckpointFiles, Shard
from steer.checkpoint.staging import HashingFile, hash_file, write_json
from steer.core.edit import Edit
from steer.core.method import Kind
from steer.errors import CheckpointError, UnsupportedError
from steer.files import sync

CONFIG = "adapter_config.json"
CONFIG_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "lora_dropout", "bias", "lora_bias", "fan_in_fan_out", "target_modules", "target_parameters"),
}
"""All keys of adapter_config.json. With another key, such as `use_rslora`, peft would compute something else."""
PREFIX = "base_model.model."
"""Prefix of the names of an adapter's tensors."""
_PARTS = ".factors-"
"""Prefix of the temporary files that hold finished parts until all are finished."""
_GROUP = 1 << 30
"""Bytes of weights to read for each of these files, about."""


@dataclass(frozen=True)
class Part:
    """One module or parameter that the adapter changes."""

    kind: Literal["linear", "parameter", "embedding", "experts", "expert biases"]
    """`parameter` is a Linear whose weight is named instead of the module: peft takes the name of a Linear beside
    experts for the name of the experts."""
    path: str
    """Path of the live module or parameter."""
    key: str
    """Prefix of the names of its tensors in the adapter."""
    writers: tuple[Writer, ...]
    """The writers on disk that it corresponds to: one, or one for each expert."""
    rank: int
    """Number of directions removed. 1 for a part that only adds, because that is peft's lowest rank."""
    site: int | None = None
    """Site of the add that it carries; None without one."""
    bias: bool = False
    """Whether it changes the bias of a Linear."""

    @property
    def a(self) -> str:
        """Name of the tensor A, `[rank, in]`; the change is `W + B A`."""
        return f"{self.key}.lora_embedding_A" if self.kind == "embedding" else f"{self.key}.lora_A.weight"

    @property
    def b(self) -> str:
        """Name of the tensor B, `[out, rank]`."""
        return f"{self.key}.lora_embedding_B" if self.kind == "embedding" else f"{self.key}.lora_B.weight"

    @property
    def b_bias(self) -> str:
        """Name of the tensor with the change of a Linear's bias."""
        return f"{self.key}.lora_B.bias"


class AdapterPlan(Plan):
    """The bake of an adapter."""

    form = "adapter"

    def __init__(self, source: Path, edit: Edit) -> None:
        super().__init__(source, edit)
        self.parts = self._find_parts()
        self.biases = any(p.kind == "linear" and p.bias for p in self.parts)
        """Whether the adapter changes the bias of every Linear that it changes."""
        self.untie_to_merge = any(p.kind == "embedding" for p in self.parts) and self.head_is_embedding
        """Whether it changes an embedding that is the LM head too. As an adapter it leaves the head unchanged; merged
        into the shared tensor, it would change the head as well."""
        self.adds = {p.path: p.site for p in self.parts if p.site is not None}
        self.total = sum(s.size for s in self.files.shards)

    def _find_parts(self) -> list[Part]:
        """The parts of the adapter, in the order of the writers.

        Errors: UnsupportedError for an edit that no adapter can hold.
        """
        if self.edit.ablate and self.edit.method.norm_preserving:
            raise self._refusal("keeping the norms scales every column of a weight, which has no low rank")
        parts: dict[tuple[str, str], Part] = {}
        for writer in self.found.writers:
            site = writer.block if writer.kind == "mlp" and writer.block in self.shifts else None
            rank = self.ablation.subspace(writer).shape[1] if self.ablation.strength(writer) > 0 else 0
            for part in self._parts_of(writer, rank, site) if rank or site is not None else ():
                earlier = parts.get((part.path, part.kind))
                parts[part.path, part.kind] = replace(part, writers=(*earlier.writers, writer)) if earlier else part
        with_bias = next((p for p in parts.values() if p.bias), None)
        not_linear = next((p for p in parts.values() if p.kind != "linear"), None)
        if with_bias is not None and not_linear is not None:
            what, do = f"{not_linear.kind} {not_linear.path}", ""
            if all(p.kind in ("linear", "embedding") for p in parts.values()):
                do = f"leave the embedding out with blocks 0-{self.anatomy.blocks - 1}, or "
            raise self._refusal(f"peft changes the bias of {with_bias.path} in no adapter that changes the {what}", do)
        return list(parts.values())

    def _refusal(self, why: str, do: str = "") -> UnsupportedError:
        return UnsupportedError(
            f"{self.anatomy.where}: an adapter cannot hold this edit, as {why}; {do}bake a checkpoint"
        )

    def _parts_of(self, writer: Writer, rank: int, site: int | None) -> list[Part]:
        """The parts that one writer needs. `rank`: directions to remove; `site`: where it carries an add."""
        layout, biased = self.anatomy.layout, writer.bias in self.files.tensors
        path = layout.base + writer.tensor.removeprefix(self.found.base)
        if parameter := self._stack(writer, path):
            module, out = parameter.rpartition(".")[0], []
            if rank:
                # With two changed parameters in one module, peft wraps the first in the second.
                key = f"{PREFIX}{module}.base_layer" if biased else PREFIX + module
                out.append(Part("experts", parameter, key, (writer,), rank))
            if biased:
                path = f"{module}.{str(writer.bias).rpartition('.')[2]}"
                count = rank + (site is not None)
                out.append(Part("expert biases", path, PREFIX + module, (writer,), count, site))
            return out
        path = path.removesuffix(".weight")
        if writer.kind == "embedding":
            return [Part("embedding", path, PREFIX + path, (writer,), rank)]
        if writer.kind == "mlp" and layout.experts_keys:
            return [Part("parameter", f"{path}.weight", PREFIX + path, (writer,), rank)]
        bias = site is not None or (biased and rank > 0)
        return [Part("linear", path, PREFIX + path, (writer,), max(rank, 1), site, bias)]

    def _stack(self, writer: Writer, path: str) -> str | None:
        """Path of the live parameter that holds all experts, for a writer that is one expert or all of them; None for
        other writers. `path`: the live path of the writer itself."""
        layout = self.anatomy.layout
        if writer.stacked or writer.block is None or not layout.experts_keys:
            return path if writer.stacked else None
        block = f"{self.anatomy.block_module(writer.block)}."
        parts = [part for form in layout.mlp for part in form]
        experts = [re.escape(p.weight).replace(r"\{\}", r"\d+") for p in parts if "{}" in p.weight]
        if not any(re.fullmatch(pattern, path.removeprefix(block)) for pattern in experts):
            return None
        return block + next(p.weight for p in parts if p.stacked)

    def changes(self) -> list[str]:
        edited = [w for p in self.parts for w in p.writers if self.ablation.strength(w) > 0]
        lines = []
        for kind in get_args(Kind):
            writers = [w for w in self.found.writers if w.kind == kind]
            names = list(dict.fromkeys(p.kind for p in self.parts for w in p.writers if w.kind == kind))
            lines.append(f"  {kind}: {len({w.tensor for w in edited if w.kind == kind})} of {len(writers)} changed"
                         f"{', as ' + ', '.join(names) if names else ''}")  # fmt: skip
        ranks = ", ".join(map(str, sorted({p.rank for p in self.parts})))
        lines.append(f"  adapter: {len(self.parts)} targets, rank {ranks}{', with biases' if self.biases else ''}")
        count = len({w.tensor for w in edited})
        return [*lines, f"  coverage: {count} of {len(self.found.writers)} writers changed"]

    def write(
        self, work: Path, journal: Journal, written: dict[str, str], advance: Callable[[int], None]
    ) -> dict[str, Any]:
        tensors, proofs = self._factors(work, journal)
        sources = hash_sources(self.files, journal, advance)
        with HashingFile(work / ADAPTER) as f:
            f.write(save(tensors, metadata={"format": "pt"}))
        for path in work.glob(f"{_PARTS}*"):
            path.unlink()
        base = hub_name(self.files.root) or str(self.files.root.resolve())
        written |= {ADAPTER: f.sha256, CONFIG: write_json(work / CONFIG, self.config(base))}
        return {
            "writers": proofs.writers,
            "biases": proofs.biases,
            "tensors": {t.name: [t.file, t.dtype, list(t.shape)] for t in Shard.open(work / ADAPTER).tensors},
            "source_files": sources,
            "untie_to_merge": self.untie_to_merge,
        }

    def config(self, base: str) -> dict[str, Any]:
        """Contents of adapter_config.json. `base` is the hub name or directory of the base model."""
        (rank, _), *_ = Counter(p.rank for p in self.parts).most_common(1)
        ranks = {p.path: p.rank for p in self.parts if p.rank != rank}
        parameters = [p.path for p in self.parts if p.kind not in ("linear", "embedding")]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,  # a scale of 1, because B contains the strength
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "lora_dropout": 0.0,
            "bias": "none",
            "lora_bias": self.biases,
            "fan_in_fan_out": self.anatomy.layout.attention.axis == 1,
            "target_modules": [p.path for p in self.parts if p.kind in ("linear", "embedding")],
            "target_parameters": parameters or None,
        }

    def _factors(self, work: Path, journal: Journal) -> tuple[dict[str, Tensor], Proofs]:
        """All tensors of the adapter and their proofs. Tensors that a killed bake finished are read from its files."""
        tensors: dict[str, Tensor] = {}
        proofs = Proofs()
        read = accumulate(sum(self.files.tensors[w.tensor].nbytes for w in part.writers) for part in self.parts)
        for number, group in groupby(zip(self.parts, read, strict=True), key=lambda pair: pair[1] // _GROUP):
            name = f"{_PARTS}{number}.safetensors"
            if finished := journal.finished.get(name):
                tensors |= load_file(work / name)
                proven = Proofs.of(finished)
            else:
                proven = Proofs()
                computed = dict(self.tensors([part for part, _ in group], proven))
                with HashingFile(work / name) as f:
                    f.write(save(computed))
                sync(work / name)
                journal.record(name, written=f.sha256, **asdict(proven))
                tensors |= computed
            proofs.extend(proven)
        return tensors, proofs

    def tensors(self, parts: Sequence[Part], proofs: Proofs) -> Iterator[tuple[str, Tensor]]:
        """Compute the tensors of these parts of the adapter as (name, tensor), and add what is measured to `proofs`.
        The weights of one part are in memory at a time."""
        for part in parts:
            a, b = self._expert_biases(part, proofs) if part.kind == "expert biases" else self._weights(part, proofs)
            out = {part.a: a, part.b: b}
            if part.kind == "linear" and self.biases:
                out[part.b_bias] = self._bias_change(part, proofs)
            for name, tensor in out.items():
                yield name, tensor.contiguous().clone()  # tensors in one file must not share memory

    def _weights(self, part: Part, proofs: Proofs) -> tuple[Float[Tensor, "k in"], Float[Tensor, "d k"]]:
        """A and B of a weight, or of all experts' weights in peft's layout for stacked parameters."""
        stack: list[Tensor] = []
        for writer in part.writers:
            dtype, strength = self._dtype(writer.tensor), self.ablation.strength(writer)
            if not strength:  # only an add: peft has no rank 0, so the factors are zeros
                shape = self.files.tensors[writer.tensor].shape
                zeros = torch.zeros(1, shape[1 - writer.axis], dtype=dtype)
                return zeros, torch.zeros(shape[writer.axis], 1, dtype=dtype)
            weight, q = self._read(writer.tensor), self.ablation.subspace(writer)
            matrices, axis = (weight, writer.axis - 1) if writer.stacked else (weight[None], writer.axis)
            casts = torch.stack([shadow(matrix, q, axis) for matrix in matrices]).double()
            a, b = casts.to(dtype), (-strength * q).to(dtype)
            before, after = float(casts.norm()), float((casts + (q.T @ b.double()) @ a.double()).norm())
            size = max(norm(weight) ** 2 - (2 * strength - strength**2) * before**2, 0.0) ** 0.5
            self._prove(proofs, writer, writer.tensor, part.a, before, after, size)
            stack.append(a)
        # The expert is the outer index in A's rows and the inner index in B's columns; B is the same for all experts.
        experts = torch.cat(stack)
        return experts.flatten(0, 1), b[:, :, None].expand(-1, -1, len(experts)).flatten(1)

    def _expert_biases(self, part: Part, proofs: Proofs) -> tuple[Float[Tensor, "k d"], Float[Tensor, "experts k"]]:
        """A and B of a stack of experts' biases: the ablation, and a row for an add."""
        (writer,) = part.writers
        name = str(writer.bias)
        bias, dtype = self._read(name), self._dtype(name)
        a, b = torch.zeros(0, bias.shape[1], dtype=dtype), torch.zeros(bias.shape[0], 0, dtype=dtype)
        if (strength := self.ablation.strength(writer)) > 0:
            q, wide = self.ablation.subspace(writer), bias.double()
            a, b = q.T.to(dtype), (-strength * wide @ q).to(dtype)
            after = float(((wide + b.double() @ a.double()) @ q).norm())
            self._prove(proofs, writer, name, part.a, float((wide @ q).norm()), after, norm(bias))
        if part.site is not None:
            shift = self.shifts[part.site].to(dtype)
            a, b = torch.cat([a, shift[None]]), torch.cat([b, torch.ones(len(b), 1, dtype=dtype)], dim=1)
            proofs.biases.append(BiasProof(part.a, part.site, True, float(a.double().norm())))
        return a, b

    def _bias_change(self, part: Part, proofs: Proofs) -> Float[Tensor, " d"]:
        """The change of a Linear's bias: the ablation of the bias, and the vector that an add puts there."""
        (writer,) = part.writers
        name, dtype = str(writer.bias), self._dtype(writer.tensor)
        change, strength = torch.zeros(self.anatomy.width, dtype=torch.float64), self.ablation.strength(writer)
        if name in self.files.tensors and strength > 0:
            q, bias = self.ablation.subspace(writer), self._read(name).double()
            change -= strength * q @ (q.T @ bias)
            after = float((q.T @ (bias + change.to(dtype).double())).norm())
            self._prove(proofs, writer, name, part.b_bias, float((q.T @ bias).norm()), after, norm(bias))
        if part.site is None:
            return change.to(dtype)
        change = (change + self.shifts[part.site]).to(dtype)
        proofs.biases.append(BiasProof(part.b_bias, part.site, True, float(change.double().norm())))
        return change

    def _prove(
        self, proofs: Proofs, writer: Writer, name: str, key: str, before: float, after: float, size: float
    ) -> None:
        """Record what remains of the directions in a tensor; raise CheckpointError if that is too much."""
        bias, strength = name == writer.bias, self.ablation.strength(writer)
        axis = len(self.files.tensors[name].shape) - 1 if bias else writer.axis
        code = "F64" if self._dtype(writer.tensor) == torch.float64 else "F32"
        proof = WriterProof(name, writer.kind, writer.block, axis, bias, code, strength, before, after, size, key)
        if not proof.holds:
            raise CheckpointError(
                f"{self.files.root}: {name} puts {after:.3g} of {before:.3g} into the ablated directions under "
                "the adapter; expected finite weights, check the source"
            )
        proofs.writers.append(proof)

    def _read(self, name: str) -> Tensor:
        info = self.files.tensors[name]
        return as_tensor(self.files.read(info), info.dtype, info.shape)

    def _dtype(self, name: str) -> torch.dtype:
        """Dtype of the factors of a tensor: peft computes in fp32 if the weights are narrower."""
        return torch.float64 if self.files.tensors[name].dtype == "F64" else torch.float32


def hash_sources(
    files: CheckpointFiles, journal: Journal | None = None, advance: Callable[[int], None] = lambda n: None
) -> dict[str, str]:
    """sha256 of the source's weights, index and config. Hashes that the journal knows are not computed again.

    Errors: CheckpointError for a shard that changed since its header was read.
    """
    out = {}
    for shard in files.shards:
        noted = None if journal is None else journal.finished.get(shard.name)
        out[shard.name] = noted["read"] if noted else hash_file(shard.path)
        stat = shard.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(f"{shard.path}: changed while it was read; wait until it is finished, run again")
        if journal is not None and not noted:
            journal.record(shard.name, read=out[shard.name])
        advance(shard.size)
    names = ["config.json", *([INDEX] if files.index is not None else [])]
    return out | {name: hash_file(files.root / name) for name in names}
