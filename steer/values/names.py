"""Names of traits, directions and features: what is a file's name, a word in the chat and a key in YAML at once."""

from __future__ import annotations

import re
from typing import Any

from steer.errors import UsageError
from steer.values.small_files import shown

COMMANDS = frozenset(
    ("help", "sliders", "undo", "redo", "reset", "reread", "receipt", "profile", "save", "clear", "quit")
)
"""The terminal chat's own words: `/quit` leaves, so a slider of that name could not be moved."""
LATENT = re.compile(r"L(\d{1,9})/(\d{1,9})", re.ASCII)
"""How a latent of a dictionary is addressed: `L14/123`, site and index. The slash keeps it apart from every name."""
_NAME = re.compile(r"\w[\w.-]{0,63}")
_BYTES = 200  # a file's name holds 255, its ending included
_FILES = (".safetensors", ".gguf", ".yaml", ".yml", ".json")


def check_name(name: Any, where: str) -> str:
    """`name`, if it is one: a letter or digit, then letters, digits, `_`, `.` and `-`, 64 at most. Letters may be of
    any script. No path, no file's ending and no command of the chat is a name.

    Errors: UsageError that begins with `where`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name.encode()) > _BYTES:
        raise UsageError(
            f"{where}: expected a name of at most 64 letters, digits, '_', '.' and '-', found {shown(name)}; rename it"
        )
    if name in COMMANDS:
        raise UsageError(f"{where}: expected a name that is no command of the chat, found {name!r}; rename it")
    if name.lower().endswith(_FILES):
        raise UsageError(f"{where}: expected a name, found that of a file, {name!r}; take its ending off")
    return name


def is_name(name: Any) -> bool:
    """Whether `check_name` takes it."""
    try:
        check_name(name, "")
    except UsageError:
        return False
    return True
