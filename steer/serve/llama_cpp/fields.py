"""The fields of a request to llama-server: a sampler, and the scales of its LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.core.sampler import Sampler


def sampling(sampler: Sampler, context: int) -> dict[str, Any]:
    """Return a sampler as the fields of llama-server's /completion. `context`: how far back penalties look, in tokens.

    >>> sampling(Sampler(temperature=0.7, top_k=40, repetition_penalty=1.0), 512)["samplers"]
    ['temperature', 'top_k']
    """
    stages = [*sampler.stages, *(["temperature"] if sampler.temperature == 0 else [])]
    fields = ("temperature", "top_k", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty")
    fields += ("dry_multiplier", "dry_base", "dry_allowed_length", "xtc_probability", "xtc_threshold")
    breakers = {"dry_sequence_breakers": list(b)} if (b := sampler.dry_sequence_breakers) else {}
    return {name: getattr(sampler, name) for name in fields} | {
        "samplers": ["typ_p" if stage == "typical_p" else stage for stage in stages],
        "repeat_penalty": sampler.repetition_penalty,
        "repeat_last_n": context,
        "dry_penalty_last_n": sampler.dry_range or context,
        **breakers,
        "logit_bias": [[token, False if bias <= -100 else bias] for token, bias in sampler.logit_bias],
    }


def differences(sampler: Sampler) -> list[str]:
    """Return a line for each stage that llama.cpp computes otherwise than the other engines."""
    lines = [
        f"{name}: llama.cpp counts the tokens of the prompt too, not of the reply alone"
        for name in ("frequency_penalty", "presence_penalty")
        if getattr(sampler, name)
    ]
    if sampler.dry_multiplier and not sampler.dry_sequence_breakers:
        lines.append("dry_sequence_breakers: llama.cpp has at least one, and uses its own")
    return lines


def lora(scales: Mapping[int, float]) -> dict[str, Any]:
    """Return the field of a request that sets the scale of every LoRA; an empty list leaves them as at the start."""
    return {"lora": [{"id": id, "scale": scale} for id, scale in scales.items()]}
