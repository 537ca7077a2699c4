"""The sliders that come with a dictionary: sliders.yaml beside its weights, a row each."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.values.dictionary_files import SLIDERS
from steer.values.move import OPERATIONS
from steer.values.names import is_name
from steer.values.small_files import read_yaml, shown, stamp


def slider_rows(place: Path) -> list[dict[str, Any]]:
    """The rows of a dictionary's sliders.yaml, none without that file: name, latents and a unit each, perhaps an
    operation. Read once as long as the file stays the same.

    Errors: SteerError, one line that names the file, for anything else.
    """
    file = place / SLIDERS
    return _rows(file, stamp(file)) if file.is_file() else []


@lru_cache(maxsize=64)
def _rows(file: Path, stamp: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = read_yaml(file, "sliders", aliases=True) or []
    for row in rows if isinstance(rows, list) else [rows]:
        if not _is_slider(row):
            raise SteerError(
                f"{file}: expected a list of sliders with name, latents and a unit each, found {shown(row)}; "
                "mend the file, or make it again with steer find"
            )
    return rows


def _is_slider(row: Any) -> bool:
    if not isinstance(row, dict) or not is_name(row.get("name")):
        return False
    latents, units = row.get("latents"), row.get("units")
    if not isinstance(latents, list) or not isinstance(units, list) or not 0 < len(latents) == len(units):
        return False
    if not isinstance(row.get("trait", ""), str) or row.get("operation", "add") not in OPERATIONS:
        return False
    return all(type(i) is int and 0 <= i < 2**31 for i in latents) and all(map(_is_unit, units))


def _is_unit(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30 and value != 0 and math.isfinite(value)
