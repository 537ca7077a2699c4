"""The folder rule: a lower folder never imports a higher one, and no file outgrows its reason to exist."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["values", "weights", "live", "features", "measure", "chat", "page"]
"""From low to high. The modules at the top of steer/, and app.py, are above them all."""
SHARED = {"errors", "files", "plain_text", "progress"}
"""Modules at the top of steer/ that anything may import, and that import nothing else of it."""
FILES = sorted([*(ROOT / "steer").rglob("*.py"), ROOT / "app.py"])
LONGEST = 350


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names below `steer` that a module imports, wherever in the file, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "steer")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            if base.split(".")[0] == "steer":
                # `from steer import live` names a folder just as `import steer.live` does.
                yield from (f"{base}.{a.name}" for a in node.names)


def height(dotted: str) -> int:
    """How high the module or folder of a dotted name below `steer` stands."""
    part = dotted.split(".")[1] if "." in dotted else ""
    if part in SHARED:
        return -1
    return LAYERS.index(part) if part in LAYERS else len(LAYERS)


def violations(source: str, module: str) -> list[str]:
    return [name for name in imports(source, module) if height(name) > height(module)]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts) if parts[0] == "steer" else "steer.app"


def test_a_lower_folder_imports_no_higher_one() -> None:
    found = {_module(p): violations(p.read_text(encoding="utf-8"), _module(p)) for p in FILES}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from steer.live.model import load", ["steer.live.model.load"]),
        ("import steer.measure", ["steer.measure"]),
        ("from steer import live", ["steer.live"]),
        ("from ..features import find", ["steer.features.find"]),
        ("def f():\n    from steer.cli import main", ["steer.cli.main"]),
        ("import steer", ["steer"]),
        ("from steer.values.edit import Edit\nfrom steer.errors import SteerError\nfrom .stream import x", []),
        ("import steering_vectors", []),
    ],
)
def test_the_rule_sees_every_way_to_import(source: str, found: list[str]) -> None:
    assert violations(source, "steer.weights.bake") == found


def test_no_source_file_is_long() -> None:
    lines = {_module(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert {module: n for module, n in lines.items() if n > LONGEST} == {}


def test_every_folder_has_its_place_in_the_order() -> None:
    folders = {p.parent.name for p in (ROOT / "steer").glob("*/*.py")}
    assert folders == set(LAYERS)
