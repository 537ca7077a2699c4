"""How far a model in llama-server, which may be quantised, reads its sliders as the original does.

The original writes replies to prompts that finding did not see. Both give the log-probability of each of their tokens,
without and with each slider. What a slider changes in the original is compared with what its LoRA changes in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from steer.core.sampler import PRESETS
from steer.core.trait import NeutralPrompts, Trait, shipped_traits
from steer.errors import UsageError
from steer.model.decode import decode
from steer.serve.llama_cpp.engine import LlamaCppEngine
from steer.serve.scoring import prompt_tokens

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

REPLIES, TOKENS = 6, 32
"""Replies for each slider, and tokens of each at most: about 20 requests a second on two cores."""
FAR = 0.5
"""Distance from which a warning says that a slider does something else: half of its effect is wrong."""


@dataclass(frozen=True)
class SliderFit:
    """One slider of the model in llama-server beside the original's. Log-probabilities are natural, one a token."""

    slider: str
    tokens: int
    """Tokens that were compared."""
    plain: float
    """Mean absolute difference of log-probabilities without sliders, in nats: what the weights' type costs."""
    change: float
    """Root mean square of the slider's effect in the original, in nats."""
    slope: float
    """Least-squares factor from its effect in the original to its effect in the other; 1 is the same."""
    distance: float
    """Root mean square of the difference of both changes, as a share of `change`; 0 is the same."""

    @property
    def warning(self) -> str | None:
        """Why the slider should not be trusted there, in one line; None if it should."""
        if self.distance <= FAR:
            return None
        return (
            f"{self.slider}: {self.distance:.0%} of its effect is not its effect in the original "
            f"(slope {self.slope:.2f}); use a finer type, as Q8_0, or find it on what you run"
        )

    def as_json(self) -> dict[str, Any]:
        """The numbers and the warning, for JSON."""
        return asdict(self) | {"warning": self.warning}


def measure_fit(
    model: SteeredModel,
    engine: LlamaCppEngine,
    replies: int = REPLIES,
    tokens: int = TOKENS,
    advance: Callable[[int], None] = lambda n: None,
) -> list[SliderFit]:
    """Return the fit of every slider that is a LoRA. `model`: the original, loaded. `replies`: for each slider.
    `advance`: called with the number of tokens that llama-server has scored.

        engine = LlamaCppEngine(describe("merged"), url="http://127.0.0.1:8080", place=Path("merged"))
        print(measure_fit(load("merged"), engine)[0].distance)

    Errors: UsageError if nothing can be compared; those of `LlamaCppEngine.logprobs`.
    """
    neutral, out = engine.adapters.scales(None), []
    for adapter in engine.adapters.adapters:
        if adapter.slider is None or adapter.edit is None:
            continue
        rows: list[np.ndarray] = []
        for text in _prompts(adapter.slider.partition(":")[0])[:replies]:
            ids = model.prompt_ids([{"role": "user", "content": text}])
            with model.untouched():
                greedy = replace(PRESETS["greedy"], max_new_tokens=tokens)
                reply = [step.tokens[0] for step in decode(model, [ids], greedy)]
            whole = [*ids, *reply]
            scored = [
                [t.logprob or 0.0 for t in prompt_tokens(model, whole, edit, 0)[len(ids) - 1 :]]
                for edit in (None, adapter.edit)
            ]
            for scales in (neutral, neutral | {adapter.id: 1.0}):
                scored.append(engine.logprobs(whole, len(ids), scales))
                advance(len(reply))
            rows.append(np.array(scored))
        joined = np.concatenate(rows, axis=1)
        joined = joined[:, np.isfinite(joined).all(0)]
        out.append(_fit(adapter.slider, joined))
    return out


def _fit(slider: str, rows: np.ndarray) -> SliderFit:
    """`rows`: `[4, tokens]`, the original's log-probabilities without and with the slider, then the other's."""
    wanted, found = rows[1] - rows[0], rows[3] - rows[2]
    change = math.sqrt(float((wanted**2).mean())) if rows.shape[1] else 0.0
    if change == 0:
        raise UsageError(f"slider {slider!r}: expected it to change the original's replies, found no change; omit it")
    distance = math.sqrt(float(((found - wanted) ** 2).mean())) / change
    plain = float(np.abs(rows[2] - rows[0]).mean())
    return SliderFit(slider, rows.shape[1], plain, change, float(found @ wanted / (wanted @ wanted)), distance)


def _prompts(name: str) -> Sequence[str]:
    """Return prompts that finding the direction of this name did not see."""
    return Trait.load(name).held_out if name in shipped_traits() else NeutralPrompts.load().held_out
