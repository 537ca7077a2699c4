"""The space that a search for a bake explores: method, place and strength of ablation, and a bias added beside it.

`Space.suggest` turns an Optuna trial into parameters, `Space.edit` turns parameters into an `Edit`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from optuna.trial import BaseTrial
from torch import Tensor

from steer.baking.certificate import Form
from steer.baking.plan import no_constant
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import PLAIN, Kernel, Method, Projection, Strengths
from steer.model.steered import SteeredModel

VERSION = 2
"""Version of the parameters below. A study of another version cannot be continued."""
STRONGEST = 1.6
"""Largest bias tried, as an absolute amount."""
STEPS = 15
"""The blocks are divided into about this many steps; peaks and ranges lie on this grid."""
NEARLY = 0.05
"""If a direction's cosine with the neutral mean is below this, method `projected` leaves it almost unchanged: its
length changes by a thousandth."""
Params = dict[str, Any]
"""Parameter names and values as the study stores them."""


@dataclass(frozen=True, eq=False)
class Space:
    """The edits that a search may choose from. All of them can run as hooks on the live model.

    space = Space.of(direction, model, neutral)
    edit = space.edit(space.unsearched)
    """

    direction: Direction
    blocks: int
    methods: tuple[Projection, ...] = ("plain",)
    neutral: Float[Tensor, "blocks d"] | None = None
    """Neutral means, for the methods that leave them unchanged."""
    can_add: bool = True
    """Whether the baked form can hold a bias after the direction's block."""
    can_keep: bool = True
    """Whether norm-preserving edits are possible both on the live model and in the baked form. In an adapter they are
    not: their rank is too high."""

    @classmethod
    def of(
        cls, direction: Direction, model: SteeredModel, neutral: Float[Tensor, "blocks d"], form: Form = "checkpoint"
    ) -> Space:
        """The space for a direction, its model, the neutral means and the form of the bake. Method `projected` is left
        out if it changes almost nothing, as for directions that were made orthogonal to the neutral mean."""
        mean = neutral[direction.site].double()
        cosine = float((direction.vector.double() @ mean / mean.norm()).abs())
        methods: tuple[Projection, ...] = ("plain", "projected", "biprojected")
        if cosine < NEARLY:
            methods = ("plain", "biprojected")
        can_keep = form == "checkpoint" and model.steering.cannot_keep_norms is None
        anatomy = model.anatomy
        return cls(direction, anatomy.blocks, methods, neutral, no_constant(anatomy, form) is None, can_keep)

    @property
    def step(self) -> int:
        """Blocks from one peak or range to the next."""
        return max(1, round(self.blocks / STEPS))

    @property
    def places(self) -> tuple[str, ...]:
        """Places of ablation: nowhere (a bias alone), every writer including the embedding, a range of blocks at
        constant strengths, or strengths by one kernel for attention and one for MLPs."""
        return ("nowhere", "everywhere", "range", "kernel") if self.can_add else ("everywhere", "range", "kernel")

    @property
    def _last(self) -> int:
        """The last block on the grid."""
        return self.step * ((self.blocks - 1) // self.step)

    def suggest(self, trial: BaseTrial) -> Params:
        """Draw a point with a trial's sampler. Two points can give the same edit, and a point can give none: see `edit`
        and `edit_key`."""
        last = self._last
        where = trial.suggest_categorical("where", self.places)
        if self.can_add:
            trial.suggest_float("bias", -STRONGEST, 0.0, step=0.1)
        if where != "nowhere":
            trial.suggest_categorical("method", self.methods)
            if self.can_keep:
                trial.suggest_categorical("norms", ("free", "kept"))
        if where == "everywhere":
            trial.suggest_float("strength", 0.1, 1.0, step=0.1)
        if where == "range":
            trial.suggest_int("centre", 0, last, step=self.step)
            trial.suggest_int("reach", 0, last, step=self.step)
            trial.suggest_float("attention", 0.0, 1.0, step=0.25)
            trial.suggest_float("mlp", 0.0, 1.0, step=0.25)
        for kind in ("attention", "mlp") if where == "kernel" else ():
            trial.suggest_int(f"{kind} peak", 0, last, step=self.step)
            trial.suggest_int(f"{kind} width", self.step, last + self.step, step=self.step)
            trial.suggest_float(f"{kind} height", 0.0, 1.0, step=0.25)
            trial.suggest_float(f"{kind} floor", 0.0, 0.75, step=0.25)
        return trial.params

    def edit(self, params: Params) -> Edit | None:
        """The edit at a point; None if the point changes nothing."""
        amount = round(params.get("bias", 0.0), 3)
        add = ((self.direction, amount),) if amount else ()
        ablation = self._ablation(params)
        if ablation is None:
            return Edit(add=add) if add else None
        projection, keep = params["method"], params.get("norms") == "kept"
        neutral = None if projection == "plain" else self.neutral
        method = Method(projection, keep, neutral) if keep or neutral is not None else PLAIN
        return Edit((self.direction,), add=add, method=method, **ablation)

    def _ablation(self, params: Params) -> dict[str, Any] | None:
        """Strength and place of the ablation at a point, as fields of Edit; None without one."""
        where = params["where"]
        if where == "everywhere":
            return {"strength": round(params["strength"], 3)}
        if where == "range":
            attention, mlp = params["attention"], params["mlp"]
            centre, reach = params["centre"], params["reach"]
            blocks = (max(0, centre - reach), min(self.blocks - 1, centre + reach))
            if attention != mlp:
                return {"blocks": blocks, "strengths": Strengths(attention, mlp)}
            return {"blocks": blocks, "strength": attention} if attention else None
        if where == "kernel":
            attention, mlp = (self._kernel(params, kind) for kind in ("attention", "mlp"))
            return {"strengths": Strengths(attention, mlp)} if attention or mlp else None
        return None

    @staticmethod
    def _kernel(params: Params, kind: str) -> float | Kernel:
        peak, width, height, floor = (params[f"{kind} {what}"] for what in ("peak", "width", "height", "floor"))
        # The floor is a share of the height, so that every point of the grid is a kernel.
        return Kernel(float(peak), float(width), round(height * floor, 4), height) if height else 0.0

    @property
    def unsearched(self) -> Params:
        """The point of `steer bake --ablate` without search: remove the whole direction from every writer."""
        return self._point("everywhere", strength=1.0)

    def known(self) -> Iterator[Params]:
        """Points to try first, before the sampler has learnt anything: the unsearched bake, then biases at the
        direction's block, ablation in the blocks around it, and both.

        Ablating a direction that is orthogonal to the neutral mean sets its projection to the neutral value, not below.
        On a checkpoint that shows the trait everywhere, only a bias moves the neutral value itself.
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
            yield self._point("range", **near, attention=1.0, mlp=0.0)
            yield self._point("range", **near, attention=0.0, mlp=1.0)
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
    """A string that is equal for edits that do the same."""
    return json.dumps(edit.describe(), sort_keys=True)


def edit_label(edit: Edit) -> str:
    """An edit of one direction in a few words."""
    parts = []
    if edit.ablate:
        method = "" if edit.method.projection == "plain" else f"{edit.method.projection}, "
        method += "norms kept, " if edit.method.norm_preserving else ""
        place = "everywhere" if edit.blocks is None else f"in blocks {edit.blocks[0]}-{edit.blocks[1]}"
        how = f"{edit.strength:g} {place}"
        if s := edit.strengths:
            how = f"attention {_strength(s.attention)}, mlp {_strength(s.mlp)}" + (f" {place}" if edit.blocks else "")
        parts.append(f"{method}ablate {how}")
    parts += [f"bias {amount:+g} at block {d.site}" for d, amount in edit.add]
    return ", ".join(parts)


def _strength(strength: float | Kernel) -> str:
    if not isinstance(strength, Kernel):
        return f"{strength:g}"
    return f"{strength.height:g} at block {strength.peak:g} to {strength.floor:g} in {strength.width:g}"
