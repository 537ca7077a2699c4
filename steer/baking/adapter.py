"""Bakes an edit as a LoRA adapter: which modules and parameters it changes, their factors, and the files.

`AdapterPlan` lists the targets of the adapter and computes their factors; `checks` verifies the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from steer.baking.certificate import BiasProof, Proofs, hub_name
from steer.baking.journal import Journal
from steer.baking.plan import Plan
from steer.checkpoint.anatomy import Writer
from steer.checkpoint.projection import DTYPES, norm, read_tensor, shadow
from steer.checkpoint.reader import ADAPTER, INDEX, CheckpointFiles, Shard
from steer.checkpoint.staging import hash_file, write_bytes, write_json
from steer.core.edit import Edit
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
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Model types in which peft refuses to change modules of the name `out_proj`."""
_FACTORS = ".factors-"
"""Prefix of the temporary files that hold finished targets until all are finished."""
GROUP = 1 << 30
"""Bytes of weights to read for each of these files, about."""


@dataclass(frozen=True)
class Target:
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
    """Number of directions removed. 1 for a target that only adds, because that is peft's lowest rank."""
    site: int | None = None
    """Site of the add that it carries; None without one."""
    bias: bool = False
    """Whether it changes the bias of a Linear."""

    @property
    def names(self) -> tuple[str, str]:
        """Names of the tensors A `[rank, in]` and B `[out, rank]`; the change of the weight is `B A`."""
        name = f"{self.key}.lora_embedding_%s" if self.kind == "embedding" else f"{self.key}.lora_%s.weight"
        return name % "A", name % "B"


class AdapterPlan(Plan):
    """The bake of an adapter."""

    form = "adapter"

    def __init__(self, source: Path | CheckpointFiles, edit: Edit, *, edit_mtp: bool = False) -> None:
        super().__init__(source, edit, edit_mtp=edit_mtp)
        self.targets = self._find_targets()
        self.biases = any(t.kind == "linear" and t.bias for t in self.targets)
        """Whether the adapter changes the bias of every Linear that it changes."""
        self.untie_to_merge = any(t.kind == "embedding" for t in self.targets) and self.head_is_embedding
        """Whether it changes an embedding that is the LM head too. As an adapter it leaves the head unchanged; merged
        into the shared tensor, it would change the head as well."""
        self.adds = {t.path: t.site for t in self.targets if t.site is not None}
        self.total = sum(s.size for s in self.files.shards)

    def _find_targets(self) -> list[Target]:
        """The targets of the adapter, in the order of the writers.

        Errors: UnsupportedError for an edit that no adapter can hold.
        """
        if self.edit.ablate and self.edit.method.norm_preserving:
            raise self._refusal("keeping the norms scales every column of a weight, which has no low rank")
        targets: dict[tuple[str, str], Target] = {}
        for writer in self.found.writers:
            site = writer.block if writer.kind == "mlp" and writer.block in self.shifts else None
            rank = self.ablation.subspace(writer).shape[1] if self.ablation.strength(writer) > 0 else 0
            for target in self._targets_of(writer, rank, site) if rank or site is not None else ():
                earlier = targets.get((target.path, target.kind))
                targets[target.path, target.kind] = (
                    replace(target, writers=(*earlier.writers, writer)) if earlier else target
                )
        with_bias = next((t for t in targets.values() if t.bias), None)
        not_linear = next((t for t in targets.values() if t.kind != "linear"), None)
        if with_bias is not None and not_linear is not None:
            what, do = f"{not_linear.kind} {not_linear.path}", ""
            if all(t.kind in ("linear", "embedding") for t in targets.values()):
                do = f"leave the embedding out with blocks 0-{self.anatomy.blocks - 1}, or "
            raise self._refusal(f"peft changes the bias of {with_bias.path} in no adapter that changes the {what}", do)
        return list(targets.values())

    def _refusal(self, why: str, do: str = "") -> UnsupportedError:
        return UnsupportedError(
            f"{self.anatomy.where}: an adapter cannot hold this edit, as {why}; {do}bake a checkpoint"
        )

    def _targets_of(self, writer: Writer, rank: int, site: int | None) -> list[Target]:
        """The targets that one writer needs. `rank`: directions to remove; `site`: where it carries an add."""
        layout, biased, path = self.anatomy.layout, writer.bias in self.files.tensors, writer.live
        if not writer.adaptable:
            raise self._refusal(f"peft takes {path}, whose experts are stored [in, out], for the transpose")
        if writer.live_stack:
            module, out = path.rpartition(".")[0], []
            if rank:
                # With two changed parameters in one module, peft wraps the first in the second.
                key = f"{PREFIX}{module}.base_layer" if biased else PREFIX + module
                out.append(Target("experts", path, key, (writer,), rank))
            if biased:
                path = f"{module}.{str(writer.bias).rpartition('.')[2]}"
                count = rank + (site is not None)
                out.append(Target("expert biases", path, PREFIX + module, (writer,), count, site))
            return out
        path = path.removesuffix(".weight")
        if writer.kind == "embedding":
            return [Target("embedding", path, PREFIX + path, (writer,), rank)]
        if layout.model_type in _MAMBA and path.endswith(".out_proj"):
            raise self._refusal(f"peft refuses modules of the name out_proj in models of type {layout.model_type}")
        if writer.kind == "mlp" and layout.has_experts:
            return [Target("parameter", f"{path}.weight", PREFIX + path, (writer,), rank)]
        bias = site is not None or (biased and rank > 0)
        return [Target("linear", path, PREFIX + path, (writer,), max(rank, 1), site, bias)]

    def changes(self, writers: Sequence[Writer]) -> str:
        kinds = dict.fromkeys(t.kind for t in self.targets if any(w in writers for w in t.writers))
        return f", as {', '.join(kinds)}" if kinds else ""

    def notes(self) -> list[str]:
        ranks = ", ".join(map(str, sorted({t.rank for t in self.targets})))
        return [f"  adapter: {len(self.targets)} targets, rank {ranks}{', with biases' if self.biases else ''}"]

    def write(self, journal: Journal, advance: Callable[[int], None]) -> dict[str, Any]:
        work = journal.work
        tensors, proofs = self._factors(journal)
        sources = hash_sources(self.files, journal, advance)
        digest = write_bytes(work / ADAPTER, save(tensors, metadata={"format": "pt"}))
        for path in work.glob(f"{_FACTORS}*"):
            path.unlink()
        base = hub_name(self.files.root) or str(self.files.root.resolve())
        return {
            "writers": proofs.writers,
            "biases": proofs.biases,
            "tensors": {t.name: [t.file, t.dtype, list(t.shape)] for t in Shard.open(work / ADAPTER).tensors},
            "source_files": sources,
            "files": {ADAPTER: digest, CONFIG: write_json(work / CONFIG, self.config(base))},
            "untie_to_merge": self.untie_to_merge,
        }

    def config(self, base: str) -> dict[str, Any]:
        """Contents of adapter_config.json. `base` is the hub name or directory of the base model."""
        (rank, _), *_ = Counter(t.rank for t in self.targets).most_common(1)
        ranks = {t.path: t.rank for t in self.targets if t.rank != rank}
        parameters = [t.path for t in self.targets if t.kind not in ("linear", "embedding")]
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
            "fan_in_fan_out": self.anatomy.layout.fan_in_first,
            "target_modules": [t.path for t in self.targets if t.kind in ("linear", "embedding")],
            "target_parameters": parameters or None,
        }

    def _factors(self, journal: Journal) -> tuple[dict[str, Tensor], Proofs]:
        """All tensors of the adapter and their proofs. Tensors that a killed bake finished are read from its files."""
        tensors: dict[str, Tensor] = {}
        proofs = Proofs()
        read = accumulate(sum(self.files.tensors[w.tensor].nbytes for w in target.writers) for target in self.targets)
        for number, group in groupby(zip(self.targets, read, strict=True), key=lambda pair: pair[1] // GROUP):
            name = f"{_FACTORS}{number}.safetensors"
            if finished := journal.finished.get(name):
                tensors |= load_file(journal.work / name)
                proven = Proofs.of(finished)
            else:
                proven = Proofs()
                computed = dict(self.tensors([target for target, _ in group], proven))
                digest = write_bytes(journal.work / name, save(computed))
                sync(journal.work / name)
                journal.record(name, written=digest, **asdict(proven))
                tensors |= computed
            proofs.writers += proven.writers
            proofs.biases += proven.biases
        return tensors, proofs

    def tensors(self, targets: Sequence[Target], proofs: Proofs) -> Iterator[tuple[str, Tensor]]:
        """Compute the tensors of these targets of the adapter as (name, tensor), and add what is measured to `proofs`.
        The weights of one target are in memory at a time."""
        for target in targets:
            factors = self._expert_biases if target.kind == "expert biases" else self._weights
            out = dict(zip(target.names, factors(target, proofs), strict=True))
            if target.kind == "linear" and self.biases:
                name = f"{target.key}.lora_B.bias"
                out[name] = self._bias_change(target, name, proofs)
            for name, tensor in out.items():
                yield name, tensor.contiguous().clone()  # tensors in one file must not share memory

    def _weights(self, target: Target, proofs: Proofs) -> tuple[Tensor, Tensor]:
        """A `[k, in]` and B `[out, k]` of a weight, or of all experts' weights in peft's layout for stacked ones."""
        stack: list[Tensor] = []
        for writer in target.writers:
            code, strength = self._dtype(writer.tensor), self.ablation.strength(writer)
            dtype = DTYPES[code]
            if not strength:  # only an add: peft has no rank 0, so the factors are zeros
                shape = self.files.tensors[writer.tensor].shape
                zeros = torch.zeros(1, shape[1 - writer.axis], dtype=dtype)
                return zeros, torch.zeros(shape[writer.axis], 1, dtype=dtype)
            weight, q = read_tensor(self.files, writer.tensor), self.ablation.subspace(writer)
            matrices, axis = (weight, writer.axis - 1) if writer.stacked else (weight[None], writer.axis)
            casts = torch.stack([shadow(matrix, q, axis) for matrix in matrices]).double()
            a, b = casts.to(dtype), (-strength * q).to(dtype)
            before, after = float(casts.norm()), float((casts + (q.T @ b.double()) @ a.double()).norm())
            size = max(norm(weight) ** 2 - (2 * strength - strength**2) * before**2, 0.0) ** 0.5
            proofs.writers.append(self.proof(writer, writer.tensor, code, before, after, size, target.names[0]))
            stack.append(a)
        # The expert is the outer index in A's rows and the inner index in B's columns; B is the same for all experts.
        experts = torch.cat(stack)
        return experts.flatten(0, 1), b[:, :, None].expand(-1, -1, len(experts)).flatten(1)

    def _expert_biases(self, target: Target, proofs: Proofs) -> tuple[Tensor, Tensor]:
        """A `[k, d]` and B `[experts, k]` of a stack of experts' biases: the ablation, and a row for an add."""
        (writer,) = target.writers
        name, (key, _) = str(writer.bias), target.names
        bias, code = read_tensor(self.files, name), self._dtype(name)
        dtype = DTYPES[code]
        a, b = torch.zeros(0, bias.shape[1], dtype=dtype), torch.zeros(bias.shape[0], 0, dtype=dtype)
        if (strength := self.ablation.strength(writer)) > 0:
            q, wide = self.ablation.subspace(writer), bias.double()
            a, b = q.T.to(dtype), (-strength * wide @ q).to(dtype)
            after = float(((wide + b.double() @ a.double()) @ q).norm())
            proofs.writers.append(self.proof(writer, name, code, float((wide @ q).norm()), after, norm(bias), key))
        if target.site is not None:
            shift = self.shifts[target.site].to(dtype)
            a, b = torch.cat([a, shift[None]]), torch.cat([b, torch.ones(len(b), 1, dtype=dtype)], dim=1)
            proofs.biases.append(BiasProof(key, target.site, True, float(a.double().norm())))
        return a, b

    def _bias_change(self, target: Target, key: str, proofs: Proofs) -> Float[Tensor, " d"]:
        """The change of a Linear's bias: the ablation of the bias, and the vector that an add puts there."""
        (writer,) = target.writers
        name, code = str(writer.bias), self._dtype(writer.tensor)
        dtype = DTYPES[code]
        change, strength = torch.zeros(self.anatomy.width, dtype=torch.float64), self.ablation.strength(writer)
        if name in self.files.tensors and strength > 0:
            q, bias = self.ablation.subspace(writer), read_tensor(self.files, name).double()
            change -= strength * q @ (q.T @ bias)
            after = float((q.T @ (bias + change.to(dtype).double())).norm())
            proofs.writers.append(self.proof(writer, name, code, float((q.T @ bias).norm()), after, norm(bias), key))
        if target.site is None:
            return change.to(dtype)
        change = (change + self.shifts[target.site]).to(dtype)
        proofs.biases.append(BiasProof(key, target.site, True, float(change.double().norm())))
        return change

    def _dtype(self, name: str) -> str:
        """Dtype of the factors of a tensor: peft computes in fp32 if the weights are narrower."""
        return "F64" if self.files.tensors[name].dtype == "F64" else "F32"


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
