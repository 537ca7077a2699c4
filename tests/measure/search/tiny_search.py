"""What tests of the search share: a small scope, and traits whose words the tiny model knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from tiny_chat import WORDS

from steer.core.direction import Direction
from steer.measure.search.trials import Scope

SMALL = Scope(topics=4, tokens=12, neutral=3)
MakeDirection = Callable[..., Direction]


def save_trait(path: Path, name: str, shift: int) -> Path:
    """A trait whose instructions and topics are words that the tiny model knows."""
    words = WORDS[shift:] + WORDS[:shift]
    described = {
        "name": name, "summary": "none", "with": " ".join(words[:4]), "without": " ".join(words[4:8]),
        "markers": words[:3], "fit": [" ".join(words[i : i + 3]) for i in range(10)],
        "held_out": [" ".join(words[i : i + 3]) for i in range(20, 26)],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(described))
    return path
