"""The shape of the package: folders import downwards only, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors", "files", "jobs", "plain_text", "progress"},
    {"core"},
    {"checkpoint"},
    {"baking", "model"},
    {"measure"},
    {"sae"},
    {"finding", "lineage"},
    {"verbs", "serve"},
    {"chat"},
    {"page"},
    {"cli"},
]
"""From low to high. Folders of one layer do not import each other, the modules at the top of steer/ do."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
    for path in (ROOT / "steer").rglob("*.py")
}


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
                # `from steer import model` names a folder just as `import steer.model` does.
                yield from (f"{base}.{a.name}" for a in node.names)


def violations(source: str, module: str) -> list[str]:
    """What a module imports of a higher layer, or of another folder in the same layer."""
    here = module.split(".")[1]

    def wrong(dotted: str) -> bool:
        there = dotted.split(".")[1] if "." in dotted else ""
        if there not in LEVEL:  # `import steer`, whose names come from everywhere
            return True
        return there != here and (LEVEL[there] > LEVEL[here] or (LEVEL[there] == LEVEL[here] > 0))

    return [name for name in imports(source, module) if wrong(name)]


def test_a_lower_folder_imports_no_higher_one() -> None:
    found = {module: violations(source, module) for module, source in MODULES.items() if module != "steer"}
    assert {module: names for module, names in found.items() if names} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside of functions and for type checkers alone are counted too, those of `steer/__init__.py` as well."""
    graph: dict[str, set[str]] = {}
    for module, source in MODULES.items():
        names = {name if name in MODULES else name.rpartition(".")[0] for name in imports(source, module)}
        graph[module] = names - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(reversed(e.args[1])))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from steer.model.steered import load", ["steer.model.steered.load"]),
        ("import steer.measure", ["steer.measure"]),
        ("from steer import model", ["steer.model"]),
        ("from ..sae import documents", ["steer.sae.documents"]),
        ("def f():\n    from steer.cli.main import main", ["steer.cli.main.main"]),
        ("import steer", ["steer"]),
        ("from steer.core.edit import Edit\nfrom steer.errors import SteerError\nfrom .reader import x", []),
        ("import steering_vectors", []),
    ],
)
def test_the_rule_sees_every_way_to_import(source: str, found: list[str]) -> None:
    assert violations(source, "steer.baking.bake") == found


def test_every_folder_has_its_place_in_the_order() -> None:
    folders = {p.parent.name for p in (ROOT / "steer").glob("*/*.py")}
    assert folders | {m.split(".")[1] for m in MODULES if m.count(".") == 1} == set(LEVEL)


def test_no_folder_has_the_name_of_a_public_function() -> None:
    """Importing `steer.bake.x` would put the folder where the function `steer.bake` was."""
    import steer

    assert not {p.parent.name for p in (ROOT / "steer").glob("*/__init__.py")} & set(steer.__all__)
