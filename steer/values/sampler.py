"""How a next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from steer.errors import UsageError


@dataclass(frozen=True)
class Sampler:
    """Settings, applied in transformers' order: repetition penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 256
    """Reply length at most, in tokens."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability; 0 drops none."""
    repetition_penalty: float = 1.05
    """Divides the logits of tokens already in the text (Keskar et al. 2019); 1 is off."""
    seed: int = 0
    """Every row of a batch draws from its own stream, seeded by (seed, row's key)."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p < 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, fine in checks.items():
            if not fine:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; see steer chat --help")


CHAT = Sampler(temperature=1.0, min_p=0.1, repetition_penalty=1.02)
"""What the chat uses: little sampling that is still interesting."""
MEASURE = Sampler(max_new_tokens=80, temperature=0.7, top_k=40, repetition_penalty=1.05)
"""What replies that are scored are drawn with."""
