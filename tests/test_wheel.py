"""A wheel, as `pip install` brings it: its verbs in an empty directory, with every file that ships."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from steer.checkpoint.shipped import RECIPE, present
from steer.errors import SteerError

ROOT = Path(__file__).parents[1]
LOCAL = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "models")
"""What is no part of the repository."""
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
PAGE = """
from streamlit.testing.v1 import AppTest
from steer.cli import live
page = AppTest.from_file(str(live.PAGE), default_timeout=100).run()
assert not page.exception and not page.error, page
print(*[b.label for b in page.button])
"""
MODELS = """
from steer.checkpoint.fetch import PACKAGED
from steer.checkpoint.merge import read_recipe, recipe_models
from steer.verbs.demo import RECIPE
for name in recipe_models(read_recipe(RECIPE)):
    model, _, adapter = name.partition("+")
    assert model in PACKAGED, model
    for file in ("adapter_config.json", "adapter_model.safetensors") if adapter else ():
        print(RECIPE.parent / adapter / file)
"""

pytestmark = pytest.mark.alone
Run = Callable[..., str]


def _has_setuptools() -> bool:
    """Whether this environment has a setuptools that can build the project; else pip gets one."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository without what was built in it before, which setuptools would pack as well."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "steer", ignore=LOCAL))


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    isolated = ["--no-build-isolation"] if _has_setuptools() else []
    _run(*pip, "wheel", "--no-deps", *isolated, "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    _run(*pip, "install", "--no-deps", "--target", folder / "installed", wheel, cwd=folder)
    return folder / "installed"


@pytest.fixture
def env(installed: Path, tmp_path: Path) -> dict[str, str]:
    """What makes Python find the wheel before the checkout, with nothing of the user's."""
    (tmp_path / "user").mkdir()
    home = {"HOME": str(tmp_path / "user"), "STEER_HOME": str(tmp_path / "home"), "BROWSER": "true"}
    return home | {"PYTHONPATH": str(installed), "STEER_MODEL": ""}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The working directory."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def python(installed: Path, empty: Path, env: dict[str, str]) -> Run:
    """Runs code with the wheel, in that directory."""
    guard = f"import steer; assert steer.__file__.startswith({str(installed)!r}), steer.__file__\n"
    return lambda code: _run(sys.executable, "-c", guard + code, cwd=empty, env=env)


def files(folder: Path) -> dict[Path, bytes]:
    """What is in a folder, without what Python compiled."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
    return {p.relative_to(folder): p.read_bytes() for p in found}


def test_the_command_answers(installed: Path, empty: Path, env: dict[str, str]) -> None:
    text = _run(sys.executable, installed / "bin" / "steer", "--help", cwd=empty, env=env)
    assert all(f" {verb} " in text for verb in ("merge", "chat", "ui", "demo"))


def test_every_file_that_ships_is_inside_the_package(installed: Path, python: Run) -> None:
    found = python("from steer.checkpoint.shipped import *; print(DICTIONARIES, RECIPE, sep='\\n')").split("\n")
    dictionaries, recipe = Path(found[0]), Path(found[1])
    assert dictionaries.is_relative_to(installed / "steer")
    assert recipe.is_relative_to(installed / "steer")
    assert files(dictionaries) == files(ROOT / "dictionaries")
    assert recipe.read_bytes() == (ROOT / "examples" / "merge" / "default.yml").read_bytes()
    assert files(recipe.parent / "tunes") == files(ROOT / "examples" / "merge" / "tunes")
    assert sorted(p.name for p in recipe.parent.iterdir()) == ["default.yml", "tunes"]


def test_no_file_of_the_package_is_left_out(installed: Path, source: Path) -> None:
    packed = files(installed / "steer").keys()
    assert {p for p in packed if p.parts[0] != "shipped"} == files(source / "steer").keys()
    assert {p.name for p in installed.iterdir() if p.suffix != ".dist-info"} == {"bin", "steer"}


def test_the_default_merge_and_the_demo_find_their_models(installed: Path, python: Run) -> None:
    found = [Path(line) for line in python(MODELS).splitlines()]
    assert len(found) == 8
    assert all(p.is_file() and p.is_relative_to(installed) for p in found)


def test_the_shipped_traits_are_found_by_name(python: Run) -> None:
    code = "from steer.checkpoint import library\nprint(*[p.stem for p in library.direction_files()])\n"
    shipped = sorted(p.stem for p in (ROOT / "dictionaries").glob("*/directions/*.safetensors"))
    assert {"compliance", "moralizing"} <= set(shipped)
    assert python(code).split() == shipped
    assert python("from steer.core.trait import Trait; print(Trait.load('moralizing').name)") == "moralizing\n"


def test_the_page_is_drawn(python: Run) -> None:
    assert python(PAGE) == "Get the default merge\n"


def test_the_page_is_served(installed: Path, empty: Path, env: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, installed / "bin" / "steer", "ui", "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=empty, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2) as answer:
                    assert answer.read() == b"ok"
                break
            except OSError:
                assert server.poll() is None, "the page's server has ended"
                time.sleep(0.1)
        else:
            pytest.fail("the page's server did not start within a minute")
    finally:
        server.terminate()
        server.wait(20)
    assert list(empty.iterdir()) == []


@pytest.mark.skipif(not _has_setuptools(), reason="no setuptools 77 here to make a source distribution with")
def test_a_source_distribution_has_what_the_wheel_needs(source: Path, tmp_path: Path) -> None:
    _run(sys.executable, "-c", SDIST, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {Path(*Path(m.name).parts[1:]) for m in tar if m.isfile()}
    assert {Path("setup.py"), Path("pyproject.toml"), Path("examples/merge/default.yml")} <= names
    for folder in ("steer", "dictionaries", "examples/merge/tunes"):
        assert {folder / name for name in files(source / folder)} <= names


def test_what_was_not_installed_is_reported_in_a_line(tmp_path: Path) -> None:
    assert present(RECIPE) == RECIPE
    with pytest.raises(SteerError, match=r"gone: expected what ships with steer, found none; install steer again$"):
        present(tmp_path / "gone")
