"""What the docstring of every public name says: an example, every argument, and which errors it raises."""

from __future__ import annotations

import inspect

import pytest

import steer

CALLABLE = [name for name in steer.__all__ if callable(getattr(steer, name))]
FUNCTIONS = [name for name in CALLABLE if inspect.isfunction(getattr(steer, name))]


def doc(name: str) -> str:
    return inspect.getdoc(getattr(steer, name)) or ""


@pytest.mark.parametrize("name", CALLABLE)
def test_every_public_name_has_an_example_that_is_python(name: str) -> None:
    lines = [line for line in doc(name).splitlines() if line.startswith(("    ", ">>> "))]
    compile("\n".join(line[4:] for line in lines), name, "exec")
    assert lines


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_explains_all_its_arguments_and_names_its_errors(name: str) -> None:
    assert [p for p in inspect.signature(getattr(steer, name)).parameters if f"`{p}`" not in doc(name)] == []
    assert "Errors:" in doc(name)


@pytest.mark.parametrize(
    "cls", [getattr(steer, n) for n in CALLABLE if n not in FUNCTIONS], ids=lambda cls: cls.__name__
)
def test_every_method_of_a_public_class_is_explained(cls: type) -> None:
    methods = inspect.getmembers(cls, lambda m: inspect.isroutine(m) or isinstance(m, property))
    assert [name for name, method in methods if not name.startswith("_") and not inspect.getdoc(method)] == []
