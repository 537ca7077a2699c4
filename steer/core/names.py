"""Names of traits, directions and features. A name must work as a file's name, a word in the chat and a key in YAML."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from steer.core.small_files import shown
from steer.errors import UsageError

COMMANDS = frozenset(
    ("help", "sliders", "undo", "redo", "reset", "reread", "receipt", "profile", "save", "clear", "quit", "good", "bad")
)
"""Commands of the terminal chat: `/quit` leaves, so a slider named `quit` could not be moved."""
LATENT = re.compile(r"L(\d{1,9})/(\d{1,9})", re.ASCII)
"""Address of a dictionary's latent: `L14/123` is site and index. No name can contain the slash."""
_NAME = re.compile(r"\w[\w.-]{0,63}")
_BYTES = 200  # file systems allow 255 for a file's name, its ending included
_FILES = (".safetensors", ".gguf", ".yaml", ".yml", ".json")


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name.encode()) > _BYTES:
        raise ValueError(
            f"expected a name of at most 64 letters, digits, '_', '.' and '-', found {shown(name)}; rename it"
        )
    if name in COMMANDS:
        raise ValueError(f"expected a name that is no command of the chat, found {name!r}; rename it")
    if name.lower().endswith(_FILES):
        raise ValueError(f"expected a name, found that of a file, {name!r}; take its ending off")
    return name


Name = Annotated[str, Field(strict=True), AfterValidator(_checked)]
"""A letter or digit, then letters, digits, `_`, `.` and `-`, at most 64 characters. Letters may be of any script.
Paths, names with a file's ending and commands of the chat are refused."""


def check_name(name: Any, where: str) -> str:
    """Return `name` if it is a valid `Name`. Errors: UsageError that begins with `where`."""
    try:
        return _checked(name)
    except ValueError as e:
        raise UsageError(f"{where}: {e}") from None


def is_name(name: Any) -> bool:
    """Whether `check_name` accepts it."""
    try:
        return bool(_checked(name))
    except ValueError:
        return False
