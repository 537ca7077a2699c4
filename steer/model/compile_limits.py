"""How much compiled code torch and oneDNN keep for shapes that do not come again.

It imports no torch, since the limits have to be set before torch reads them.
"""

from __future__ import annotations

import os


def keep_few_shapes() -> None:
    """Limit for how many shapes oneDNN, and torch above it, keep compiled code, to 16. They read it at their first use.

    The default is a thousand shapes of 0.1 MB each, and a chat has another shape at every reply, a batch of chats at
    every step.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "16")
