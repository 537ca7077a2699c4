"""The forms of output that a bake can write. Imports nothing of the package."""

from __future__ import annotations

from typing import Literal, get_args

Form = Literal["checkpoint", "adapter", "gguf"]
"""A whole checkpoint, a PEFT LoRA for the source, or a llama.cpp control vector."""
FORMS: tuple[Form, ...] = get_args(Form)
