"""Decides, slider by slider and before anything is written, whether a form of output can hold the slider's effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from steer.baking.form import Form
from steer.checkpoint.anatomy import Anatomy
from steer.core.direction import Direction
from steer.core.slider import Slider
from steer.errors import UnsupportedError


@dataclass(frozen=True)
class Verdict:
    """Whether one slider can be baked."""

    slider: str
    operation: str
    ok: bool
    reason: str
    """What the slider becomes, or why it cannot be baked."""

    def __str__(self) -> str:
        return f"{self.slider} ({self.operation}): {'' if self.ok else 'no, '}{self.reason}"


def bakeable(moves: Iterable[Slider], form: Form = "checkpoint", anatomy: Anatomy | None = None) -> list[Verdict]:
    """One verdict for each intervention that has an effect, in their order. Without an anatomy, the limits of an
    architecture are not checked."""
    moves = [m for m in moves if m.acts]
    shares = {m.amount for m in moves if _ablates(m)}
    return [Verdict(m.name, m.operation, *_verdict(m, form, anatomy, shares)) for m in moves]


def check_bakeable(verdicts: Sequence[Verdict], where: str) -> None:
    """Raise UnsupportedError that names every slider that cannot be baked, if there is any."""
    wrong = [v for v in verdicts if not v.ok]
    if wrong:
        why = "; ".join(f"{v.slider!r} ({v.operation}): {v.reason}" for v in wrong)
        raise UnsupportedError(
            f"{where}: {len(wrong)} of {len(verdicts)} sliders cannot be baked: {why}; leave them out and move them "
            "live, or change them"
        )


def _ablates(move: Slider) -> bool:
    return move.operation == "ablate" and isinstance(move.target, Direction) and move.when.always


def _verdict(move: Slider, form: Form, anatomy: Anatomy | None, shares: set[float]) -> tuple[bool, str]:
    """(ok, reason) for one intervention. `shares`: the strengths of all ablations of directions in the edit."""
    if not move.when.always:
        return False, "it acts on some tokens only, and weights act on all of them"
    if move.operation in ("clamp", "cap", "scale"):
        return False, f"{move.operation} depends on what it reads on each token, which no weight of a linear map can do"
    if move.operation == "ablate":
        if not isinstance(move.target, Direction):
            return False, "what a latent's activation is depends on the token; add it, or ablate a direction"
        if form == "gguf":
            return False, "a control vector only adds; bake an adapter or a checkpoint"
        if len(shares) > 1:
            found = ", ".join(f"{s:g}" for s in sorted(shares))
            return False, f"directions are ablated at one strength, found {found}; give all of them one amount"
        return True, "removed from every writer"
    if form == "gguf":
        if move.site == 0:
            return False, "llama.cpp adds control vectors after layers 1 and on, and it acts at site 0"
        return True, f"direction.{move.site} of the control vector"
    if anatomy is None:
        return True, f"a constant after block {move.site}"
    if why := no_constant(anatomy, form):
        return False, why
    return True, f"a bias {'of the adapter ' if form == 'adapter' else ''}in block {move.site}"


def no_constant(anatomy: Anatomy, form: Form) -> str | None:
    """Why a bake of this form cannot add a constant after a block of this architecture; None if it can."""
    layout, name = anatomy.layout, anatomy.architecture
    if layout.mlp_norm is not None:
        return f"{name} has a norm between its MLPs and the residual stream, which no constant passes"
    if layout.mlp_bias is not None:
        return None
    if layout.experts_keys:
        return f"{name} has experts without biases in its MLPs, and no adapter can give them any"
    return f"{name} has no biases in its MLPs; bake an adapter" if form == "checkpoint" else None
