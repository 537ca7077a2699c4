"""What the probes that tell stories share: their words and sentences in `items/`, and small talk that fills turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from steer.core.small_files import read_yaml
from steer.measure.probes.probe import Chat


@cache
def written(name: str) -> Any:
    """Return what `items/NAME.yaml` says."""
    return read_yaml(Path(__file__).parent / "items" / f"{name}.yaml", "the items of a probe")


def small_talk(rng: random.Random, messages: int) -> Chat:
    """Return an even number of messages about nothing, the user's first."""
    return exchanged(rng.sample(written("small_talk"), messages // 2))


def exchanged(pairs: Sequence[Sequence[str]]) -> Chat:
    """Return exchanges, each a message of the user and the reply to it, as a chat."""
    return tuple(message for pair in pairs for message in zip(("user", "assistant"), pair, strict=True))


def narrated(sentences: list[str]) -> Chat:
    """Return a story as a chat: user and assistant tell it in turns, three sentences each, the assistant last."""
    parts = [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)]
    if len(parts) % 2:
        parts.append("Go on.")
    return tuple((("user", "assistant")[i % 2], part) for i, part in enumerate(parts))
