"""A stage's directory is complete or absent."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from steer.checkpoint import staging
from steer.checkpoint.staging import DirectFile, check_output, copy_file, hash_file, staged, write_bytes, write_json
from steer.errors import OutputExistsError, SteerError


def _interrupted(out: Path, error: BaseException) -> None:
    with staged(out) as work:
        (work / "half").write_text("half")
        raise error


def _overtaken(out: Path) -> None:
    with staged(out) as work:
        (work / "a").write_text("second")
        out.mkdir()
        (out / "a").write_text("first")  # another process was faster


def _leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_output_appears_whole_at_the_end_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as work:
        write_json(work / "a.json", {"x": 1})
        assert work.parent == out.parent
        assert not out.exists()
    assert (out / "a.json").read_text() == '{\n  "x": 1\n}\n'
    assert _leftovers(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        _interrupted(tmp_path / "out", error())
    assert _leftovers(tmp_path) == []


def test_an_empty_directory_is_replaced_through_a_symlink_too(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with staged(tmp_path / "link") as work:
        (work / "a").write_text("a")
    assert (tmp_path / "empty" / "a").read_text() == "a"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling"])
def test_what_exists_is_refused_and_not_touched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(OutputExistsError, match="remove it or name another output"):
        check_output(out)
    with pytest.raises(OutputExistsError), staged(out):
        pytest.fail("must not start")
    assert _leftovers(tmp_path) == ["out"]


def test_of_two_runs_into_one_output_one_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as work:
        (work / "a").write_text("first")
        with pytest.raises(OutputExistsError, match="being written"), staged(out):
            pytest.fail("must not start")
    assert (out / "a").read_text() == "first"

    late = tmp_path / "late"
    with pytest.raises(OutputExistsError):
        _overtaken(late)
    assert (late / "a").read_text() == "first"
    assert _leftovers(tmp_path) == ["late", "out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from steer.checkpoint.staging import staged
with staged(Path(sys.argv[1])) as work:
    (work / "half").write_text("half")
    (work / "deep").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_process_left_is_found_only_by_who_asks_for_it(tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(_leftovers(tmp_path)) == 1
    with staged(out, resume=resume) as work:
        assert _leftovers(work) == (["deep", "half"] if resume else [])
        (work / "whole").write_text("whole")
    assert _leftovers(out) == (["deep", "half", "whole"] if resume else ["whole"])
    assert _leftovers(tmp_path) == ["out"]


def test_a_live_process_s_directory_is_kept_and_the_second_is_refused(tmp_path: Path) -> None:
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True); sys.stdin.read()")
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "here\n"
    with pytest.raises(OutputExistsError, match="is being written"), staged(tmp_path / "out", resume=True):
        pytest.fail("must not start")
    first.communicate("")
    assert first.returncode == 0
    assert _leftovers(tmp_path) == ["out"]
    assert _leftovers(tmp_path / "out") == ["deep", "half"]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536, 1_000_003])
@pytest.mark.parametrize("direct", [True, False])
def test_a_direct_file_holds_what_was_written_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool
) -> None:
    monkeypatch.setattr(staging, "CHUNK", 65536)
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    data = random.Random(0).randbytes(size)
    f = DirectFile(tmp_path / "a")
    try:
        for at in range(0, size, 70_001):
            f.write(memoryview(data)[at : at + 70_001])
        f.sync()
        assert (tmp_path / "a").read_bytes() == data
    finally:
        f.close()
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "a")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission denied")],
)
def test_a_full_or_read_only_disk_is_one_line(tmp_path: Path, number: int, sentence: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(SteerError, match=sentence) as caught:
        _interrupted(out, OSError(number, os.strerror(number)))
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _leftovers(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SteerError, match="name another output"), staged(tmp_path / "file" / "out"):
        pytest.fail("must not start")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unreadable_source_beside_the_output_is_named_itself(tmp_path: Path) -> None:
    source = tmp_path / "source" / "config.json"
    denied = PermissionError(errno.EACCES, "Permission denied", str(source))
    with pytest.raises(SteerError, match=r"source/config\.json: could not be used"):
        _interrupted(tmp_path / "out", denied)


def test_hashes_are_those_of_the_bytes_on_disk(tmp_path: Path) -> None:
    digest = write_bytes(tmp_path / "a", b"abc")
    assert digest == hash_file(tmp_path / "a") == copy_file(tmp_path / "a", tmp_path / "b")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"")


def _staging_of(out: Path) -> Path:
    return out.parent / f".{out.name}.steer-{socket.gethostname()}"


def test_a_link_in_place_of_the_temporary_directory_is_never_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years")
    _staging_of(tmp_path / "out").symlink_to(victim)
    with pytest.raises(SteerError, match="found a link"), staged(tmp_path / "out"):
        pass
    assert (victim / "thesis.tex").read_text() == "years"


def test_a_temporary_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    place = _staging_of(tmp_path / "out")
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(SteerError, match="only you can write"), staged(tmp_path / "out", resume=True):
        pass
    place.chmod(0o700)
    with staged(tmp_path / "out", resume=True) as work:
        assert work.stat().st_mode & 0o777 == 0o700
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_ctrl_c_keeps_what_a_next_run_can_go_on_with(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "out", resume=True) as work:
            (work / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with staged(tmp_path / "out", resume=True) as work:
        assert (work / "half").read_text() == "half"
