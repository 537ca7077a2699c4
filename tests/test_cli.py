"""The command as people type it: what it prints, how it ends, and what a mistake leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command, Outcome, command_here, command_outside
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from steer.checkpoint.sketch import sketch_files
from steer.cli.common import stoppable
from steer.core.direction import Direction
from steer.errors import StoppedError

MakeDirection = Callable[..., Direction]


RECIPE = "merge_method: linear\nmodels:\n  - model: {0}\n  - model: {1}\nparameters: {{weight: 1}}\ndtype: float32\n"


@pytest.fixture
def no_bars() -> Iterator[None]:
    """Turns the bars of transformers off, as the command does when it is the first to import it."""
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_pair(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints that can chat, `a` and `b`. Not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate("ab"):
        save_tiny_chat(tiny_llama, folder / name, seed=seed)
    return folder


@pytest.fixture
def folder(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: checkpoints `a` and `b`, and recipes and directions that go with them."""
    shutil.copytree(tiny_pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / "merge.yml").write_text(RECIPE.format("a", "b"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def steer(folder: Path, no_bars: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command's entry point in this process, which has torch loaded already."""
    return command_here(monkeypatch, capfd)


def is_one_line(outcome: Outcome) -> bool:
    """Whether the error is one line; before it a model that was loaded may say what it computes in."""
    err = re.sub(r"\A\S+: computing in .*\n", "", outcome.err)
    return err.startswith("steer: ") and err.count("\n") == 1 and err.endswith("\n")


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder, hidden ones too, with when it was last changed."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture
def refused(steer: Command, folder: Path) -> Callable[..., str]:
    """Runs a command that must fail with one line and leave everything as it was; returns the line."""

    def attempt(*arguments: str, code: int, run: Command = steer) -> str:
        before = tree(folder)
        outcome = run(*arguments)
        assert is_one_line(outcome), outcome.err
        assert (outcome.code, outcome.out) == (code, "")
        assert tree(folder) == before
        return outcome.err

    return attempt


# The command itself


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["frobnicate"], "'frobnicate'"),
        (["fetch", "--nope"], "--nope"),
        (["bake"], "'model'"),
        (["bake", "a", "out", "--strength", "much", "--ablate", "moralizing"], "'--strength'"),
        (["find", "a", "moralizing", "--site", "last"], "'--site'"),
    ],
)
def test_bad_usage_is_one_line_that_points_to_the_help(
    refused: Callable[..., str], arguments: list[str], names: str
) -> None:
    line = refused(*arguments, code=2)
    assert names in line
    assert "--help" in line


def test_no_verb_shows_the_help_and_is_bad_usage(steer: Command) -> None:
    outcome = steer()
    assert outcome.code == 2
    assert "Usage: steer" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["find", "a", "sadness"], ["'sadness'", "moralizing"]),
        (["bake", "a", "out", "--ablate", "sadness"], ["'sadness'", "moralizing"]),
        # Finding the first takes minutes on a real model: the second is looked at before.
        (["bake", "a", "out", "--ablate", "moralizing", "--ablate", "sadness"], ["'sadness'"]),
        (["bake", "a", "out", "--search", "--ablate", "sadness"], ["'sadness'"]),
        (["find", "a", "moralizing", "--site", "99"], ["0 to 2", "99"]),
        (["find", "a", "Be dry."], ["'Be dry.'", "--as"]),
        (["find", "a", "Be dry.", "--opposite", "Be warm."], ["--opposite", "--as NAME"]),
        (["find", "a", "--as", "../dry", "Be dry."], ["expected a name", "'../dry'"]),
        (["find", "a", "moralizing", "--dictionary", "d", "--quick"], ["--dictionary", "--quick"]),
        (["find", "a", "--as", "dry", "moralizing"], ["sentence", "'moralizing'"]),
        (["chat", "a", "--slider", "moralizing=loud"], ["NAME=AMOUNT", "'loud'"]),
        (["chat", "a", "--slider", "moralizing"], ["NAME=AMOUNT", "'moralizing'"]),
        (["chat", "a", "--slider", "=1"], ["NAME=AMOUNT", "'=1'"]),
        (["chat", "a", "--slider", "moralizing=nan"], ["NAME=AMOUNT", "'nan'"]),
        (["chat", "a", "--slider", "moralizing=inf"], ["NAME=AMOUNT", "'inf'"]),
        (["chat", "a", "--slider", "moralizing=-1"], ["'moralizing'", "steer find a moralizing"]),
        (["chat", "a", "--slider", "\udcff=1"], [r"'\udcff'", "steer find"]),
        (["chat", "a", "--system", "Be \udcff."], ["'--system'", "expected UTF-8, found other bytes at 3"]),
        (["find", "a", "\udcff"], [r"'\udcff'", "moralizing"]),
        (["chat", "a", "--temperature", "-1"], ["temperature"]),
        (["bake", "a", "out", "--add", "moralizing=loud"], ["NAME=AMOUNT", "'loud'"]),
        (["bake", "a", "out"], ["nothing to bake"]),
        (["bake", "a", "out", "--ablate", "moralizing", "--strength", "0"], ["strength", "0.0"]),
        (["bake", "a", "out", "--ablate", "moralizing", "--strength", "3"], ["strength", "3.0"]),
        (["bake", "a", "out", "--ablate", "moralizing", "--strength", "nan"], ["strength", "nan"]),
        (["bake", "a", "out", "--ablate", "moralizing", "--blocks", "some"], ["FIRST-LAST", "'some'"]),
        (["bake", "a", "out", "--ablate", "moralizing", "--blocks", "2-1"], ["FIRST-LAST", "2-1"]),
        (["bake", "a", "out", "--ablate", "moralizing", "--blocks", "-1"], ["FIRST-LAST", "'-1'"]),
        (["bake", "a", "out", "--search"], ["--search"]),
        (["serve", "a", "--allow-host", "http://x"], ["--allow-host http://x", "host.docker.internal"]),
        (["serve", "a", "--allow-origin", "*", "--api-key", "k"], ["--allow-origin", "--api-key"]),
        (["serve", "a", "--keep-alive", "loud"], ["keep-alive", "comments"]),
    ],
)
def test_a_name_or_number_that_is_none_is_bad_usage(
    refused: Callable[..., str], arguments: list[str], names: list[str]
) -> None:
    line = refused(*arguments, code=2)
    assert all(n in line for n in names), line


@pytest.mark.slow
def test_in_a_process_of_its_own_a_mistake_is_one_line_too(refused: Callable[..., str]) -> None:
    assert "'loud'" in refused("chat", "a", "--slider", "moralizing=loud", code=2, run=command_outside)
    assert "nowhere" in refused("bake", "nowhere", "out", "--ablate", "moralizing", code=1, run=command_outside)


# Files that are not there, or not what they should be


@pytest.mark.parametrize(
    "arguments",
    [
        ["find", "models/gone", "moralizing"],
        ["bake", "models/gone/deep", "out", "--ablate", "moralizing"],
        ["chat", "./gone"],
        ["ui", "/gone"],
        ["verify", "gone"],
        ["fetch", "./gone"],
        ["merge", "gone.yml", "out"],
        ["find", "a", "gone.yaml"],
        ["bake", "a", "out", "--ablate", "gone.safetensors"],
        ["bake", "a", "out", "--ablate", "gone.yaml"],
    ],
)
def test_a_path_that_leads_nowhere_is_named(refused: Callable[..., str], arguments: list[str]) -> None:
    assert "gone" in refused(*arguments, code=1)


def test_where_a_result_cannot_go_is_said_before_the_work(folder: Path, refused: Callable[..., str]) -> None:
    tensors = load_file(folder / "a" / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))  # the first pass of the model would be another error
    save_file(tensors, folder / "a" / "model.safetensors", metadata={"format": "pt"})
    assert "b: could not be written (Is a directory)" in refused("find", "a", "moralizing", "--out", "b", code=1)
    (folder / "p.yaml").write_text("name: p\nsliders: []\n")
    line = refused("calibrate", "a", "--profile", "p.yaml", "--out", "merge.yml/p", code=1)
    assert "merge.yml/p: could not be written (Not a directory)" in line


def test_a_directory_that_is_no_checkpoint_is_named(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "empty").mkdir()
    assert "empty: expected a directory with a Hugging Face checkpoint" in refused("chat", "empty", code=1)
    assert "expected a certificate" in refused("verify", "a", code=1)


def test_a_checkpoint_cut_short_is_named(folder: Path, refused: Callable[..., str]) -> None:
    os.truncate(folder / "a" / "model.safetensors", 3000)
    assert "expected a whole safetensors file, found 3000 bytes" in refused("chat", "a", code=1)
    assert "merge.yml: mergekit failed" in refused("merge", "merge.yml", "out", code=1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a: [1\n", "expected a mergekit recipe in YAML"),
        ("", "does not accept"),
        ("just words\n", "does not accept"),
        (RECIPE.format("a", "b").replace("models", "modles"), "does not accept"),
        (RECIPE.format("a", "gone"), "gone"),
        (RECIPE.format("a", "tunes/gone"), "tunes/gone"),
        (RECIPE.format("a", "b+gone"), "gone"),
        (RECIPE.format("a", "b+a"), "adapter_config.json"),
        (RECIPE.format("nobody/nothing", "b"), "nobody/nothing"),
        (RECIPE.format("a", "b").replace("linear", "magic"), "magic"),
        (RECIPE.format("a", "b").replace("float32", "float7"), "float7"),
        (RECIPE.format("a", "b").replace("weight", "wait"), "weight"),
    ],
)
def test_a_recipe_that_cannot_be_merged_is_one_line(
    folder: Path, refused: Callable[..., str], text: str, names: str
) -> None:
    (folder / "bad.yml").write_text(text)
    line = refused("merge", "bad.yml", "out", code=1)
    assert "bad.yml" in line
    assert names in line


def test_checkpoints_of_two_shapes_do_not_merge(
    folder: Path, refused: Callable[..., str], tiny_llama: Callable[..., Path]
) -> None:
    save_tiny_chat(tiny_llama, folder / "wide", hidden_size=64)
    (folder / "bad.yml").write_text(RECIPE.format("a", "wide"))
    line = refused("merge", "bad.yml", "out", code=1)
    assert "bad.yml: mergekit failed" in line
    assert "64" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"no safetensors at all", "unreadable"), (None, "without one"), (b"", "unreadable")],
)
def test_a_file_that_is_no_direction_is_named(
    folder: Path, refused: Callable[..., str], content: bytes | None, says: str
) -> None:
    file = folder / "moral.safetensors"
    file.write_bytes((folder / "a" / "model.safetensors").read_bytes() if content is None else content)
    line = refused("bake", "a", "out", "--ablate", str(file), code=1)
    assert "moral.safetensors" in line
    assert says in line


# Outputs


@pytest.mark.parametrize(
    "arguments", [["merge", "merge.yml", "mine"], ["bake", "a", "mine", "--ablate", "moral.safetensors"]]
)
def test_an_output_with_files_in_it_is_left_alone(
    folder: Path, refused: Callable[..., str], make_direction: MakeDirection, arguments: list[str]
) -> None:
    make_direction().save(folder / "moral.safetensors")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    assert "mine: expected a new or empty directory" in refused(*arguments, code=1)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path) -> None:
    """With `merge`; tests/baking/test_bake_faults.py fills disks under bakes."""
    (folder / "small").mkdir()
    # A separate mount namespace: needs no root where users may have one, and goes with the process.
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k tmpfs small"
    if subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    script = f'{mount} && {{ "$@"; code=$?; ls -A small; exit $code; }}'
    command = [*inside, script, "sh", str(Path(sys.executable).with_name("steer")), "merge", "merge.yml", "small/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert is_one_line(outcome), outcome.err
    assert "small/out: could not be written, the disk is full" in outcome.err
    assert (outcome.code, outcome.out) == (1, "")


# Directions and the checkpoints they belong to


def test_a_direction_of_another_width_is_refused_with_both_widths(
    folder: Path, refused: Callable[..., str], make_direction: MakeDirection
) -> None:
    make_direction(width=48).save(folder / "wide.safetensors")
    line = refused("bake", "a", "out", "--ablate", "wide.safetensors", code=1)
    assert "width 48" in line
    assert "width 32" in line


def test_a_direction_of_another_checkpoint_is_refused_unless_forced(
    folder: Path, refused: Callable[..., str], steer: Command, make_direction: MakeDirection
) -> None:
    direction = make_direction()
    direction.provenance.update(sketch=sketch_files(folder / "b").to_header(), checkpoint="the-other")
    direction.save(folder / "d.safetensors")
    line = refused("bake", "a", "out", "--ablate", "d.safetensors", code=1)
    assert "found on the-other" in line
    assert "weights differ from a by" in line
    assert "--force" in line
    assert steer("bake", "a", "out", "--ablate", "d.safetensors", "--force").code == 0
    assert steer("bake", "b", "out-b", "--ablate", "d.safetensors").code == 0


# What works


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout_from_merge_to_verify(
    steer: Command, folder: Path, make_direction: MakeDirection
) -> None:
    make_direction().save(folder / "d.safetensors")
    merged = command_outside("merge", "merge.yml", "merged", "--json")  # the noisiest: imports all it uses
    baked = steer("bake", "merged", "baked", "--ablate", "d.safetensors", "--json")
    verified = steer("verify", "baked", "--json")
    assert {o.err for o in (merged, baked, verified)} == {""}
    assert {o.code for o in (merged, baked, verified)} == {0}
    assert json.loads(merged.out) == {"checkpoint": "merged"}
    summary = json.loads(baked.out)
    assert summary["writers_found"] == summary["writers_edited"] == 7
    assert summary["worst_remaining"] < 1e-5
    assert json.loads(verified.out)["ok"] is True


@pytest.mark.slow
def test_a_merge_that_ctrl_c_stops_says_so_and_leaves_nothing(folder: Path) -> None:
    """SIGTERM stops a bake in tests/baking/test_bake_faults.py and a harvest in test_stop.py."""
    before = tree(folder)
    command = [str(Path(sys.executable).with_name("steer")), "merge", "merge.yml", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(folder.glob(".out.*/*")):  # till it writes
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "steer: stopped\n")
    assert tree(folder) == before


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)])
def test_a_stop_is_one_whatever_a_library_makes_of_it(number: signal.Signals, error: type[BaseException]) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def library() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None

    with pytest.raises(error), stoppable("x"):
        library()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_baked_checkpoint_that_was_changed_fails_to_verify(
    folder: Path, steer: Command, refused: Callable[..., str], make_direction: MakeDirection
) -> None:
    make_direction().save(folder / "d.safetensors")
    assert steer("bake", "a", "baked", "--ablate", "d.safetensors").code == 0
    weights = folder / "baked" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in refused("verify", "baked", code=1)


def test_fetch_of_a_local_checkpoint_is_where_it_is(steer: Command) -> None:
    outcome = steer("fetch", "a", "--json")
    assert json.loads(outcome.out) == {"checkpoint": "a"}


def test_a_bake_knows_the_command_that_made_it(folder: Path, steer: Command, make_direction: MakeDirection) -> None:
    make_direction().save(folder / "d.safetensors")
    assert steer("bake", "a", "baked", "--ablate", "d.safetensors", "--strength", "0.5").code == 0
    certificate = json.loads((folder / "baked" / "steer_certificate.json").read_text())
    assert certificate["command"] == "steer bake a baked --ablate d.safetensors --strength 0.5"


def test_a_card_and_lorebooks_are_read_before_the_model_and_reported(
    steer: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [{"keys": ["truth"], "content": "ba", "name": "sea"}]
    card = {"first_mes": "{{user}} {{persona}} {{frob}}", "nickname": 3, "character_book": {"entries": entries}}
    (folder / "duke.json").write_text(json.dumps({"data": card}))
    (folder / "world.json").write_text(json.dumps({"entries": [{"keys": "hello, truth", "content": "be"}]}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("truth\n/receipt\n"))
    books = ["--lorebook", "world.json", "--max-new-tokens", 2]
    done = steer("chat", "a", "--card", "duke.json", *books, "--user", "Viola", "--persona", "a page")
    assert done.code == 0
    assert done.out.startswith("Viola a page {{frob}}\n")
    assert "lorebook: sea, hello (2 tokens)\n" in done.out
    assert [line for line in done.err.splitlines() if line.startswith("duke.json: ")] == [
        "duke.json: nickname: expected text, found 3; put it in quotes; it counts as empty",
        "duke.json: macros that are not known stay as they are: {{frob}}",
    ]
    lost = steer("chat", "nowhere", "--lorebook", "duke2.json")
    assert (lost.code, "duke2.json: expected a lorebook, found none" in lost.err) == (1, True)
