"""What weights can hold of what sliders do, said slider by slider before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from steer.errors import UnsupportedError
from steer.values.direction import Direction
from steer.values.move import Move
from steer.weights.anatomy import Anatomy

Form = Literal["checkpoint", "adapter", "gguf"]
"""What a bake writes: a whole checkpoint, a PEFT LoRA for the source, a llama.cpp control vector."""
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Verdict:
    """Whether one slider can be baked."""

    slider: str
    operation: str
    ok: bool
    reason: str
    """What it becomes, or why it cannot."""

    def __str__(self) -> str:
        return f"{self.slider} ({self.operation}): {'' if self.ok else 'no, '}{self.reason}"


def bakeable(moves: Iterable[Move], form: Form = "checkpoint", anatomy: Anatomy | None = None) -> list[Verdict]:
    """One verdict for each move that moves anything, in their order. Without an anatomy nothing is said of what
    this architecture has no place for."""
    moves = [m for m in moves if not m.neutral]
    shares = {m.amount for m in moves if _ablates(m)}
    return [Verdict(m.name, m.operation, *_verdict(m, form, anatomy, shares)) for m in moves]


def check_bakeable(verdicts: Sequence[Verdict], where: str) -> None:
    """Raise UnsupportedError naming every slider that cannot be baked, if there is one."""
    wrong = [v for v in verdicts if not v.ok]
    if wrong:
        told = "; ".join(f"{v.slider!r} ({v.operation}): {v.reason}" for v in wrong)
        raise UnsupportedError(
            f"{where}: {len(wrong)} of {len(verdicts)} sliders cannot be baked: {told}; leave them out and move them "
            "live, or change them"
        )


def _ablates(move: Move) -> bool:
    return move.operation == "ablate" and isinstance(move.target, Direction) and move.when.always


def _verdict(move: Move, form: Form, anatomy: Anatomy | None, shares: set[float]) -> tuple[bool, str]:
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
