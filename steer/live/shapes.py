"""How much compiled code is kept for shapes that do not come again. Imports no torch: it is told before torch looks."""

from __future__ import annotations

import os


def keep_few_shapes() -> None:
    """Bound for how many shapes oneDNN, and what torch has above it, keep compiled code; they look at their first use.

    Of a thousand, as is their default, each takes 0.1 MB, and a chat has another shape at every reply, a batch of them
    at every step.
    """
    for kept in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(kept, "16")
