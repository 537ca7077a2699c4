"""Chat templates that are chosen in place of a checkpoint's own: those that ship, and files."""

from __future__ import annotations

import os
from pathlib import Path

from steer.errors import UsageError

FILE = "chat_template.jinja"
"""The file of a checkpoint's own template."""
VARIABLE = "STEER_CHAT_TEMPLATE"
"""The environment variable of `--chat-template`."""
TEMPLATES = Path(__file__).with_name("templates")
"""The folder of the templates that ship."""


def shipped_templates() -> list[str]:
    """Return the names of the templates that ship."""
    return sorted(f.stem for f in TEMPLATES.glob("*.jinja"))


def chosen_template(chosen: str | Path | None = None) -> str | None:
    """Return the text of a template, by the name of one that ships or the path of a file; by default that of
    $STEER_CHAT_TEMPLATE, or None without it.

    Errors: UsageError for neither, for a file that cannot be read, and for an empty one.
    """
    chosen = chosen or os.environ.get(VARIABLE)
    if not chosen:
        return None
    names = shipped_templates()
    place = TEMPLATES / f"{chosen}.jinja" if str(chosen) in names else Path(chosen).expanduser()
    where = f"--chat-template {chosen}"
    try:
        text = place.read_text(encoding="utf-8-sig")  # a mark of the byte order would be the first token of every chat
    except FileNotFoundError as e:
        raise UsageError(f"{where}: expected a file, or one of {', '.join(names)}, found neither") from e
    except OSError as e:
        raise UsageError(f"{where}: could not be read, {e.strerror}; check the path and its permissions") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{where}: expected a template in UTF-8, found other bytes; convert it") from e
    if not text.strip():
        raise UsageError(f"{where}: expected a template, found an empty file; name another")
    return text
