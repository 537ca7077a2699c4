"""What a search for a bake may choose: method, where and how strongly to ablate, and a bias beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.method import PLAIN, Kernel, Method, Projection, Strengths
from steer.weights.bakeable import Form, no_constant

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from steer.live.model import SteeredModel

VERSION = 2
"""Of the parameters below. A study of another version is another study."""
STRONGEST = 1.6
"""The bias furthest from 0, as an amount."""
STEPS = 15
"""Blocks are searched in about so many steps."""
NEARLY = 0.05
"""A direction whose cosine with the neutral mean is below this is the same after `projected`: its length changes by a
thousandth."""
Params = dict[str, Any]
"""Names and values as the study holds them."""


@dataclass(frozen=True, eq=False)
class Space:
    """The edits that a search may choose from. All of them can run as hooks on the live model."""

    direction: Direction
    blocks: int
    methods: tuple[Projection, ...] = ("plain",)
    neutral: Float[Tensor, "blocks d"] | None = None
    """Neutral means, where a method spares them."""
    can_add: bool = True
    """Whether what is baked can hold a bias after the direction's block."""
    can_keep: bool = True
    """Whether norms can be kept: on the live model, and in what is baked, which an adapter's low rank is too little
    for."""

    @classmethod
    def of(
        cls, direction: Direction, model: SteeredModel, neutral: Float[Tensor, "blocks d"], form: Form = "checkpoint"
    ) -> Space:
        """For a direction of a checkpoint. `projected` is left out where it changes next to nothing, as it does for
        directions that were found orthogonal to the neutral mean."""
        mean = neutral[direction.site].double()
        cosine = float((direction.vector.double() @ mean / mean.norm()).abs())
        methods: tuple[Projection, ...] = ("plain", "biprojected")
        if cosine >= NEARLY:
            methods = ("plain", "projected", "biprojected")
        can_keep = form == "checkpoint" and model.steering.cannot_keep_norms is None
        anatomy = model.anatomy
        return cls(direction, anatomy.blocks, methods, neutral, no_constant(anatomy, form) is None, can_keep)

    @property
    def step(self) -> int:
        """Blocks from one peak or range to the next."""
        return max(1, round(self.blocks / STEPS))

    @property
    def places(self) -> tuple[Literal["nowhere", "everywhere", "range", "kernel"], ...]:
        """Where it may ablate: nowhere (a bias alone), every writer with the embedding, a range of blocks at constant
        strengths, or by a kernel for attention and one for MLPs."""
        return ("nowhere", "everywhere", "range", "kernel") if self.can_add else ("everywhere", "range", "kernel")

    @property
    def _last(self) -> int:
        """The last block on the grid."""
        return self.step * ((self.blocks - 1) // self.step)

    def suggest(self, trial: BaseTrial) -> Params:
        """A point by a trial's sampler. It may be the same edit as another, or none: see `edit` and `key`."""
        last = self._last
        where = trial.suggest_categorical("where", self.places)
        if self.can_add:
            trial.suggest_float("bias", -STRONGEST, 0.0, step=0.1)
        if where == "nowhere":
            return trial.params
        trial.suggest_categorical("method", self.methods)
        if self.can_keep:
            trial.suggest_categorical("norms", ("free", "kept"))
        if where == "everywhere":
            trial.suggest_float("strength", 0.1, 1.0, step=0.1)
            return trial.params
        if where == "range":
            trial.suggest_int("centre", 0, last, step=self.step)
            trial.suggest_int("reach", 0, last, step=self.step)
            trial.suggest_float("attention", 0.0, 1.0, step=0.25)
            trial.suggest_float("mlp", 0.0, 1.0, step=0.25)
            return trial.params
        for kind in ("attention", "mlp"):
            trial.suggest_int(f"{kind} peak", 0, last, step=self.step)
            trial.suggest_int(f"{kind} width", self.step, last + self.step, step=self.step)
            trial.suggest_float(f"{kind} height", 0.0, 1.0, step=0.25)
            trial.suggest_float(f"{kind} floor", 0.0, 0.75, step=0.25)
        return trial.params

    def edit(self, params: Params) -> Edit | None:
        """The edit at a point; None where it changes nothing."""
        amount = round(params.get("bias", 0.0), 3)
        add = ((self.direction, amount),) if amount else ()
        where = params["where"]
        if where == "nowhere":
            return Edit(add=add) if add else None
        method = self._method(params["method"], params.get("norms") == "kept")
        ablate = (self.direction,)
        if where == "everywhere":
            return Edit(ablate, round(params["strength"], 3), None, add, method=method)
        if where == "range":
            attention, mlp = params["attention"], params["mlp"]
            centre, reach = params["centre"], params["reach"]
            blocks = (max(0, centre - reach), min(self.blocks - 1, centre + reach))
            if attention == mlp:
                if attention:
                    return Edit(ablate, attention, blocks, add, method=method)
                return Edit(add=add) if add else None
            return Edit(ablate, 1.0, blocks, add, method=method, strengths=Strengths(attention, mlp))
        attention, mlp = (self._kernel(params, kind) for kind in ("attention", "mlp"))
        if not attention and not mlp:
            return Edit(add=add) if add else None
        return Edit(ablate, 1.0, None, add, method=method, strengths=Strengths(attention, mlp))

    def _method(self, projection: Projection, keep: bool) -> Method:
        if projection == "plain":
            return Method(norm_preserving=True) if keep else PLAIN
        return Method(projection, keep, self.neutral)

    @staticmethod
    def _kernel(params: Params, kind: str) -> float | Kernel:
        peak, width, height, floor = (params[f"{kind} {what}"] for what in ("peak", "width", "height", "floor"))
        # The floor is a share of the height, so that every point of the grid is a kernel.
        return Kernel(float(peak), float(width), round(height * floor, 4), height) if height else 0.0

    @property
    def unsearched(self) -> Params:
        """What `steer bake --ablate` does: the whole direction out of every writer."""
        return self._point("everywhere", strength=1.0)

    def known(self) -> Iterator[Params]:
        """Points worth a trial before anything is learnt, the unsearched bake first: biases at the direction's block,
        ablation in the blocks around it, and both.

        A direction that is orthogonal to the neutral mean goes to its neutral value when it is ablated, not below: on
        a checkpoint that shows the trait everywhere it is the bias that moves the neutral value itself.
        """
        centre = min(self.step * round(self.direction.site / self.step), self._last)
        reach = min(self.step * max(1, round(self.blocks / 5 / self.step)), self._last)
        near: Params = {"centre": centre, "reach": reach}
        yield self.unsearched
        if self.can_add:
            yield from (self._point("nowhere", bias) for bias in (-0.6, -0.4, -0.8))
            yield self._point("range", -0.4, **near, attention=0.5, mlp=0.5)
            yield self._point("range", -0.2, **near, attention=1.0, mlp=1.0)
        yield self._point("range", **near, attention=1.0, mlp=1.0)
        yield self._point("range", **near, attention=1.0, mlp=1.0, method="biprojected", norms="kept")
        if not self.can_add:
            yield self._point("everywhere", strength=0.5)
            yield self._point("range", **near, attention=0.5, mlp=0.5)
            for kind, other in (("attention", "mlp"), ("mlp", "attention")):
                one: Params = {kind: 1.0, other: 0.0}
                yield self._point("range", **near, **one)
            fewer = reach // self.step // 2 * self.step
            yield self._point("range", centre=centre, reach=fewer, attention=1.0, mlp=1.0)

    def _point(
        self, where: str, bias: float = 0.0, *, method: str = "plain", norms: str = "free", **others: Any
    ) -> Params:
        out: Params = {"where": where} | ({"bias": bias} if self.can_add else {})
        if where == "nowhere":
            return out
        return out | {"method": method} | ({"norms": norms} if self.can_keep else {}) | others


def edit_key(edit: Edit) -> str:
    """Equal for edits that do the same."""
    return json.dumps(edit.describe(), sort_keys=True)


def edit_label(edit: Edit) -> str:
    """An edit of one direction in a few words."""
    parts = []
    if edit.ablate:
        method = "" if edit.method.projection == "plain" else f"{edit.method.projection}, "
        method += "norms kept, " if edit.method.norm_preserving else ""
        place = "everywhere" if edit.blocks is None else f"in blocks {edit.blocks[0]}-{edit.blocks[1]}"
        if edit.strengths is None:
            how = f"{edit.strength:g} {place}"
        else:
            kinds = ("attention", "mlp")
            told = [f"{kind} {_strength(getattr(edit.strengths, kind))}" for kind in kinds]
            how = ", ".join(told) + (f" {place}" if edit.blocks else "")
        parts.append(f"{method}ablate {how}")
    parts += [f"bias {amount:+g} at block {d.site}" for d, amount in edit.add]
    return ", ".join(parts)


def _strength(strength: float | Kernel) -> str:
    if not isinstance(strength, Kernel):
        return f"{strength:g}"
    return f"{strength.height:g} at block {strength.peak:g} to {strength.floor:g} in {strength.width:g}"
