"""Files that are replaced whole or not at all, and JSON of strangers that is one line whatever it holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from steer.errors import CheckpointError, OutputExistsError, SteerError
from steer.files import JSON_DEPTH, locked, parse_json, read_json_object, replacing, write_atomic

NOT_JSON = {
    "nothing": (b"", "no JSON"),
    "torn": (b'{"a": [1, 2', "no JSON"),
    "a list": (b"[]", "of another kind"),
    "a number": (b"1e400", "of another kind"),
    "deep brackets": (b"[" * 100_000, "nested over"),
    "deep and closed": (b'{"a":' * 90 + b"1" + b"}" * 90, "nested over"),
    "a number of thousands of digits": (b'{"a": ' + b"9" * 5_000 + b"}", "no JSON"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "half a surrogate"),
    "bytes": (b'{"a": "\xff"}', "not UTF-8 at 7"),
    "another encoding": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize(("data", "found"), NOT_JSON.values(), ids=NOT_JSON)
def test_a_file_without_a_json_object_is_an_error_of_one_line(tmp_path: Path, data: bytes, found: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"config\.json: expected .*{found}.*; mend the file") as e:
        read_json_object(tmp_path / "config.json")
    assert "\n" not in str(e.value)


def test_what_is_no_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        read_json_object(tmp_path / "config.json")
    with pytest.raises(SteerError, match="could not be read"):
        read_json_object(tmp_path)
    (tmp_path / "link").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(CheckpointError, match="found a device or a pipe"):
            read_json_object(tmp_path / name)


def test_json_within_the_limits_is_read() -> None:
    deep = b"[" * (JSON_DEPTH - 1) + b"]" * (JSON_DEPTH - 1)
    assert parse_json(deep) is not None
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": NaN}')["a"] == "\U0001f600"


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    file = write_atomic(tmp_path / "new" / "a.json", "first")
    os.chmod(file, 0o640)

    class Stop(BaseException):
        """As Ctrl-C comes."""

    def stopped() -> None:
        with replacing(file) as part:
            part.write_text("sec")
            raise Stop

    with pytest.raises(Stop):
        stopped()
    assert file.read_text() == "first"
    write_atomic(file, b"second")
    assert (file.read_text(), os.stat(file).st_mode & 0o777) == ("second", 0o640)
    assert os.listdir(tmp_path / "new") == ["a.json"]


def test_the_data_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(fd: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def replaced(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomic(tmp_path / "a", b"data")
    assert done == ["file", "name", "folder"]


def test_a_link_is_followed_and_one_laid_at_the_temporary_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("first")
    (tmp_path / "link").symlink_to("real")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with replacing(tmp_path / "link") as part:
        planted = part
        part.write_text("x")
    planted.symlink_to(victim)
    write_atomic(tmp_path / "link", "second")
    assert ((tmp_path / "real").read_text(), victim.read_text()) == ("second", "mine")
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_process_left_beside_a_file_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as part:
        part.write_text("x")
    own = str(os.getpid())
    dead, live = (part.with_name(part.name.replace(own, pid)) for pid in (str(2**22 + 1), "1"))
    dead.write_text("half")
    live.write_text("half")
    write_atomic(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", live.name])


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerError, match="could not be written"):
        write_atomic(tmp_path / "file" / "below", b"data")


def test_two_processes_are_distinguished_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with (
        locked(folder, "is at work"),
        pytest.raises(OutputExistsError, match="s: is at work"),
        locked(folder, "is at work"),
    ):
        pass
    with locked(tmp_path / "s", "is at work"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(SteerError, match="file: could not be written, File exists"), locked(tmp_path / "file", ""):
        pass
