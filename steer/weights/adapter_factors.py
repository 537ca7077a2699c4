"""The tensors of an adapter, made from a source's weights one part at a time, with the proofs of what they leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import CheckpointError
from steer.weights.adapter_parts import Part
from steer.weights.anatomy import Writer
from steer.weights.arithmetic import as_tensor, norm, shadow
from steer.weights.certify import BiasProof, WriterProof

if TYPE_CHECKING:
    from steer.weights.adapter import AdapterPlan


@dataclass
class Proofs:
    """What is measured while an adapter's tensors are made."""

    writers: list[WriterProof] = field(default_factory=list)
    biases: list[BiasProof] = field(default_factory=list)


def adapter_tensors(plan: AdapterPlan, parts: Sequence[Part], proofs: Proofs) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of these parts of the adapter by name, one part of the source in memory at a time."""
    make = _Factory(plan, proofs)
    makers = {
        "linear": make.linear,
        "parameter": make.linear,
        "embedding": make.embedding,
        "experts": make.experts,
        "expert biases": make.expert_biases,
    }
    for part in parts:
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
