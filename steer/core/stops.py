"""Stop strings, looked for in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string in a text begins; None if there is none."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found, default=None)


def begun(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
