"""`steer traits`: the list, one trait, checks of files, and a file to begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import Command, command_here
from tiny_chat import keep_direction, save_tiny_chat

from steer.core.direction import Direction
from steer.core.trait import Trait, shipped_traits
from steer.files import write_new

MakeDirection = Callable[..., Direction]


@pytest.fixture
def steer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return command_here(monkeypatch, capfd)


def test_the_shelf_lists_every_trait_and_what_its_ends_do(steer: Command) -> None:
    rows = {row["name"]: row for row in steer("traits", "--json").result["traits"]}
    assert tuple(sorted(rows)) == shipped_traits()
    assert rows["moralizing"]["low_end"] == "never lectures"
    assert all("direction" not in row for row in rows.values())
    table = steer("traits").out
    assert all(name in table for name in rows)
    assert "preaches" in table


def test_the_shelf_shows_which_directions_a_model_has(
    steer: Command,
    tiny_llama: Callable[..., Path],
    make_direction: MakeDirection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    model = save_tiny_chat(tiny_llama, tmp_path / "model")
    direction = replace(make_direction("warmth"), provenance={"auroc": [0.5, 0.75, 0.6]})
    file = keep_direction(model, direction.at(1))
    other = next(name for name in shipped_traits() if name != "warmth")
    strange = keep_direction(model, replace(make_direction(other, seed=8), provenance={"auroc": ["x", "y", {}]}))
    rows = {row["name"]: row["direction"] for row in steer("traits", "--model", model, "--json").result["traits"]}
    assert rows.pop("warmth") == {"from": "saved", "file": str(file), "site": 1, "auroc": 0.75}
    assert rows.pop(other) == {"from": "saved", "file": str(strange), "site": 1, "auroc": None}
    assert set(rows.values()) == {None}
    lines = steer("traits", "--model", model).out.splitlines()
    assert next(line for line in lines if line.startswith("warmth")).endswith("saved, site 1, AUROC 0.75")
    missing = steer("traits", "--model", tmp_path / "nowhere")
    assert missing.code == 1
    assert "expected a checkpoint directory" in missing.err


def test_a_trait_is_shown_in_full(steer: Command) -> None:
    shown, trait = steer("traits", "show", "warmth"), Trait.load("warmth")
    for text in (trait.summary, trait.with_instruction, "is warm and caring", f"{len(trait.fit)} for fitting"):
        assert text in shown.out
    assert trait.fit[0] not in shown.out  # the pool's
    own = Trait.load("initiative")
    assert own.held_out[0] in steer("traits", "show", "initiative").out
    found = steer("traits", "show", "initiative", "--json").result
    assert (found["with"], found["fit"], found["pool"]) == (own.with_instruction, list(own.fit), False)
    unknown = steer("traits", "show", "sadness")
    assert unknown.code == 2
    assert "unknown trait 'sadness'" in unknown.err


def test_files_are_checked_line_by_line(steer: Command, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump({"name": "kind", "summary": "s", "with": "Be good."}))
    bad.write_text(yaml.safe_dump({"name": "bad name", "with": "Be bad.", "moods": 1}))
    assert steer("traits", "check", good).code == 0
    done = steer("traits", "check", good, bad, tmp_path / "none.yaml")
    assert done.code == 1
    assert [line.split(": ")[0] for line in done.out.splitlines()] == [str(good), *[str(bad)] * 3,
                                                                       str(tmp_path / "none.yaml")]  # fmt: skip
    files = steer("traits", "check", good, bad, "--json").result["files"]
    assert [len(f["mistakes"]) for f in files] == [0, 3]


def test_a_new_file_can_be_used_as_it_is_and_replaces_none(
    steer: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert steer("traits", "new", "pirate", "--json").result == {"file": "pirate.yaml"}
    trait = Trait.load("pirate.yaml")
    assert (trait.name, trait.markers) == ("pirate", ())
    # With the optional parts, their comment marks taken off, it is read as well.
    whole = Path("pirate.yaml").read_text().replace("# markers:", "markers:").replace("#   - ", "  - ")
    Path("whole.yaml").write_text(whole.replace("# fit:", "fit:").replace("# held_out:", "held_out:"))
    assert [m.partition(": ")[2] for m in Trait.mistakes("whole.yaml")] == [
        "expected at least 4 topics under 'fit', found 1; add some",
        "expected at least 2 topics under 'held_out', found 1; add some",
    ]
    before = Path("pirate.yaml").read_text()
    again = steer("traits", "new", "pirate")
    assert again.code == 1
    assert again.err == ("steer: pirate.yaml: expected no such file, found one; it is not overwritten, name another\n")
    assert Path("pirate.yaml").read_text() == before
    for name, says in (("warmth", "no shipped trait has"), ("../x", "expected a name of"), ("quit", "no command of")):
        refused = steer("traits", "new", name)
        assert refused.code == 2
        assert says in refused.err
    assert "expected a .yaml file" in steer("traits", "new", "sailor", "--out", "sailor.txt").err
    assert steer("traits", "new", "sailor", "--out", "deep/er/mine.yml").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "pirate.yaml", "whole.yaml"]  # nothing unfinished
    assert Trait.load("deep/er/mine.yml").name == "sailor"


def test_a_new_file_follows_no_link_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(Exception, match="expected no such file"):
        write_new(tmp_path / "link.yaml", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["link.yaml"]
    assert write_new(tmp_path / "new.yaml", "\u00e9").read_bytes() == b"\xc3\xa9"
