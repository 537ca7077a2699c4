"""Profiles: what is written is what is read, and a file that is none says in one line what is wrong where."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.core.direction import Direction
from steer.core.profile import SIZE_LIMIT, GateSpec, Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import PRESETS, Sampler
from steer.core.small_files import shown
from steer.errors import SteerError, UsageError

NOIR = """\
name: noir
notes: |
  A pirate who reads detective novels.
  Rain: "always".
sampler: plain
sliders:
  - slider: moralizing
    amount: -0.5
  - slider: L14/123
    amount: 1
    operation: clamp
    when: {part: reply, first: 40, after: 10, ramp: 20, while: {slider: compliance, above: 0.3, below: 2}}
    range: [-1.5, 1.0]
    enabled: false
"""
GOOD: dict[str, Any] = {"name": "noir", "sliders": [{"slider": "moralizing", "amount": -0.5}]}


def slider(**changes: object) -> dict[str, Any]:
    """A profile's data with one slider that is changed so."""
    return GOOD | {"sliders": [GOOD["sliders"][0] | changes]}


def refused(path: Path, content: bytes | str) -> str:
    """The one line with which a file is refused."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SteerError) as caught:
        Profile.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 900
    return message


@pytest.fixture
def noir(tmp_path: Path) -> Profile:
    (tmp_path / "noir.yaml").write_text(NOIR)
    return Profile.load(tmp_path / "noir.yaml")


def test_every_key_of_a_file_is_read(noir: Profile, tmp_path: Path) -> None:
    assert noir.name == "noir"
    assert noir.notes == 'A pirate who reads detective novels.\nRain: "always".\n'
    assert (noir.sampler, noir.preset) == (PRESETS["plain"], "plain")
    assert noir.folder == tmp_path
    when = ScheduleSpec("reply", first=40, after=10, ramp=20, gate=GateSpec("compliance", 0.3, 2.0))
    assert noir.sliders == (
        ProfileSlider("moralizing", -0.5),
        ProfileSlider("L14/123", 1.0, "clamp", when, (-1.5, 1.0), enabled=False),
    )


def test_saved_and_loaded_again_it_is_equal_and_reads_well(noir: Profile, tmp_path: Path) -> None:
    place = noir.save(tmp_path / "new" / "copy.yaml")
    assert Profile.load(place) == noir
    text = place.read_text()
    assert "notes: |\n" in text
    assert "range: [-1.5, 1.0]" in text
    assert [p.name for p in place.parent.iterdir()] == ["copy.yaml"]
    assert Profile.load(Profile.load(place).save(place)) == noir
    assert place.read_text() == text


@pytest.mark.parametrize(
    "profile",
    [
        Profile("bare"),
        Profile("unter Räubern 🏴‍☠️", notes="Zeile\n\tzwei  \n\n", sliders=(ProfileSlider("no", 1e-07),)),
        Profile("x: [y] # z", notes=" leading\nspace"),
        Profile("null", sliders=(ProfileSlider("123", -1e30, "scale"), ProfileSlider("~", 0.5, "ablate"))),
        Profile("own", sampler=Sampler(), preset=None),
        Profile("own", sampler=Sampler(top_k=40, seed=7, dry_sequence_breakers=("\n", "#")), preset=None),
        Profile("calm", sampler=replace(PRESETS["near-greedy"], temperature=2.5), preset="near-greedy"),
        Profile("banned", sampler=replace(PRESETS["wild"], logit_bias=((5, -100.0), (7, 2.5))), preset="wild"),
        Profile("w", sliders=(ProfileSlider("a", 1, when=ScheduleSpec()),)),
        Profile("w", sliders=(ProfileSlider("a", 1, when=ScheduleSpec(ramp=3, gate=GateSpec("b", below=-0.5))),)),
    ],
    ids=lambda p: p.name,
)
def test_the_round_trip_is_exact_through_yaml_and_through_plain_data(profile: Profile, tmp_path: Path) -> None:
    assert Profile.load(profile.save(tmp_path / "a.yaml")) == profile
    assert Profile.parse(profile.dump(), "data") == profile
    assert yaml.safe_load(yaml.safe_dump(profile.dump())) == profile.dump()


def test_a_sampler_is_a_preset_or_what_differs_from_one() -> None:
    assert Profile.parse({"name": "a"}, "p").sampler == PRESETS["plain"]
    assert Profile.parse({"name": "a", "sampler": "greedy"}, "p").sampler == PRESETS["greedy"]
    wild = Profile.parse({"name": "a", "sampler": {"preset": "wild", "top_k": 9}}, "p")
    assert (wild.sampler, wild.preset) == (replace(PRESETS["wild"], top_k=9), "wild")
    assert wild.dump()["sampler"] == {"preset": "wild", "top_k": 9}
    own = Profile.parse({"name": "a", "sampler": {"temperature": 1, "logit_bias": {"5": -100}}}, "p")
    assert (own.sampler, own.preset) == (Sampler(temperature=1, logit_bias=((5, -100.0),)), None)


def test_keys_left_empty_count_as_absent() -> None:
    empty = {"name": "a", "notes": None, "sampler": None, "sliders": None}
    assert Profile.parse(empty, "p") == Profile("a")
    row = {"slider": "x", "amount": 1, "operation": None, "when": {"while": None}, "range": None, "enabled": None}
    assert Profile.parse({"name": "a", "sliders": [row]}, "p").sliders == (
        ProfileSlider("x", 1.0, when=ScheduleSpec()),
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (GOOD | {"slider": []}, r"expected keys among name, .*found 'slider'; did you mean 'sliders'\?"),
        (GOOD | {7: 1}, "found 7; take it out"),
        (slider(ammount=1), r"sliders\[0\]: .*found 'ammount'; did you mean 'amount'\?"),
        (slider(when={"frist": 1}), r"sliders\[0\]: when: .*found 'frist'; did you mean 'first'\?"),
        (slider(when={"while": {"slider": "a", "abvoe": 1}}), r"when: while: .*'abvoe'; did you mean 'above'\?"),
        (GOOD | {"sampler": {"temprature": 1}}, r"sampler: .*found 'temprature'; did you mean 'temperature'\?"),
        ({"sliders": []}, "name: expected a value, found none; add it"),
        ({"name": "a", "sliders": [{"slider": "b"}]}, r"sliders\[0\]: amount: expected a value, found none"),
        ({"name": "a", "sliders": [{"amount": 1}]}, r"sliders\[0\]: slider: expected a value, found none"),
        (GOOD | {"name": False}, "name: expected text, found False; put it in quotes"),
        (GOOD | {"name": "  "}, "name: expected text, found none"),
        (GOOD | {"name": "a\x1b[2J"}, r"name: .*found the character '\\x1b'"),
        (GOOD | {"notes": ["a"]}, "notes: expected text"),
        (GOOD | {"notes": "half \ud83d"}, r"notes: .*'\\ud83d'"),
        (GOOD | {"sliders": {"a": 1}}, "sliders: expected a list"),
        (GOOD | {"sliders": ["moralizing"]}, r"sliders\[0\]: expected a mapping with slider, .*found 'moralizing'"),
        (GOOD | {"sampler": "tame"}, "sampler: .*greedy, plain.*'tame'"),
        (GOOD | {"sampler": {"preset": ["plain"]}}, "sampler: preset: expected one of"),
        (GOOD | {"sampler": 3}, "sampler: expected a mapping"),
        (GOOD | {"sampler": {"top_p": 2}}, "sampler: top_p: .*found 2"),
        (GOOD | {"sampler": {"min_p": "0.1"}}, "sampler: min_p: .*found '0.1'"),
        (GOOD | {"sampler": {"temperature": 10**400}}, "sampler: temperature: expected a finite number"),
        (GOOD | {"sampler": {"logit_bias": [[5, 10**400]]}}, "sampler: "),
        (GOOD | {"sampler": {"order": ["dice"]}}, r"sampler: order\[0\]: .*'dice'"),
        (slider(slider=["a"]), "slider: expected text"),
        (slider(slider="a\nb"), r"slider: .*'\\n'"),
        (slider(amount="1"), "amount: expected a finite number, found '1'"),
        (slider(amount=True), "amount: .*found True"),
        (slider(amount=float("nan")), "amount: .*found nan"),
        (slider(amount=-float("inf")), "amount: .*found -inf"),
        (slider(amount=10**400), "amount: expected a finite number"),
        (slider(amount=2, operation="ablate"), "ablate takes an amount from 0 to 1"),
        (slider(operation="remove"), "operation: expected one of add, ablate, clamp, cap, scale, found 'remove'"),
        (slider(operation=["add"]), "operation: expected one of"),
        (slider(range=[1, -1]), "range: .*LOW <= HIGH"),
        (slider(range=[1]), r"range\[1\]: expected a value, found none"),
        (slider(range="ab"), "range: expected"),
        (slider(range=[0, None]), r"range\[1\]: .*found None"),
        (slider(range=[0, 10**400]), r"range\[1\]: .*finite"),
        (slider(enabled="yes"), "enabled: expected true or false, found 'yes'"),
        (slider(when="reply"), "when: expected a mapping"),
        (slider(when={"part": "prompt"}), "when: .*found 'prompt'"),
        (slider(when={"first": 0}), "when: first: "),
        (slider(when={"ramp": 1.5}), "when: ramp: .*found 1.5"),
        (slider(when={"after": 10**5000}), "when: after: expected a number below 9.2"),
        (slider(when={"first": 5, "after": 5}), "first > after"),
        (slider(when={"while": {"above": 1}}), "when: while: slider: expected a value, found none"),
        (slider(when={"while": {"slider": "a"}}), "above, below or both"),
        (slider(when={"while": {"slider": "a", "above": 2, "below": 1}}), "above < below"),
        (slider(when={"while": {"slider": "a", "above": "x"}}), "when: while: above: .*'x'"),
        ([GOOD], "expected a mapping with name, notes, sampler, sliders"),
        (None, "expected a mapping"),
    ],
    ids=shown,
)
def test_what_is_no_profile_is_one_line_that_names_the_key(data: Any, says: str) -> None:
    with pytest.raises(SteerError, match=says) as caught:
        Profile.parse(data, "noir.yaml")
    message = str(caught.value)
    assert message.startswith("noir.yaml: ")
    assert "\n" not in message
    assert len(message) < 700
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name: a\nname: b\n", "the key 'name' a second time in line 2"),
        ("name: a\nsliders:\n  - {slider: x, amount: 1, amount: 2}\n", "'amount' a second time in line 3"),
        ("name: &n a\nnotes: *n\n", "anchor or alias"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: [*c, *c]\n", "anchor or alias"),
        ("<<: {name: a}\n<<: {name: b}\n", "'<<' a second time"),
        ("name: " + "[" * 5000, "more than 32 levels"),
        ("- " * 5000 + "x", "more than 32 levels"),
        ("- a\n" * 60_000, "more than 50,000 values"),
        ("name: [1", "in YAML"),
        ("name: !!python/object/apply:os.system ['true']", "in YAML"),
        ("name: 2024-13-45", "in YAML"),
        ("name: a\nsliders:\n- {slider: x, amount: " + "9" * 5000 + "}", "in YAML"),
        ("name: a\nsliders:\n- {slider: x, amount: 0x" + "f" * 9000 + "}", "amount: expected a finite number"),
        ("name: a\nsliders:\n- {slider: x, amount: .nan}", "amount: "),
        ("name: a\nsliders:\n- {slider: x, amount: 1e-3}", "found '1e-3'; write one such as"),
        ("? [a, b]\n: c\n", "in YAML"),
        ('name: "\\ud83d"', "half a surrogate pair"),
        (b"name: \xff\xfe\n", "not UTF-8 at 6"),
        (b"\x00\x01", "in YAML"),
        ("", "expected a mapping"),
        ("--- a\n--- b\n", "in YAML"),
        ("name: " + "a" * SIZE_LIMIT, "at most 1,000,000 bytes"),
    ],
    ids=lambda v: shown(v)[:30],
)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, content: bytes | str, says: str) -> None:
    assert says in refused(tmp_path / "noir.yaml", content)


def test_a_path_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"absent\.yaml: expected a profile, found none; check the path"):
        Profile.load(tmp_path / "absent.yaml")
    with pytest.raises(SteerError, match="found a directory"):
        Profile.load(tmp_path)


def test_no_damage_to_a_file_gets_past_the_one_line(tmp_path: Path) -> None:
    rng = random.Random(5)
    file = tmp_path / "noir.yaml"
    messages: list[str] = []
    for _ in range(400):
        data = bytearray(NOIR.encode())
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *b"{}[]:&*!|'\"\\\n\t-#"))
        file.write_bytes(bytes(data))
        try:
            Profile.load(file)
        except SteerError as e:
            messages.append(str(e))
    assert 100 < len(messages) < 400
    assert not any("\n" in m for m in messages)


def test_a_file_that_cannot_be_written_leaves_what_was_there(noir: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SteerError, match=r"could not be written .*; name another place") as caught:
        noir.save(tmp_path / "file" / "noir.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "taken.yaml").mkdir()
    with pytest.raises(SteerError, match="could not be written"):
        noir.save(tmp_path / "taken.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "noir.yaml", "taken.yaml"]


def test_a_replaced_file_keeps_its_permissions_and_its_link(noir: Profile, tmp_path: Path) -> None:
    file, link = tmp_path / "noir.yaml", tmp_path / "link.yaml"
    file.chmod(0o640)
    link.symlink_to(file)
    replace(noir, notes="").save(link)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert Profile.load(file).notes == ""


def test_ranges_go_to_a_slider_by_its_place_or_its_name(noir: Profile) -> None:
    ranged = noir.with_ranges({0: (-2, 2), "L14/123": (0.0, 0.5)})
    assert [s.range for s in ranged.sliders] == [(-2.0, 2.0), (0.0, 0.5)]
    assert [replace(s, range=None) for s in ranged.sliders] == [replace(s, range=None) for s in noir.sliders]
    assert noir.sliders[0].range is None
    for key in (2, "compliance"):
        with pytest.raises(UsageError, match="expected one slider"):
            noir.with_ranges({key: (0, 1)})
    twice = replace(noir, sliders=noir.sliders[:1] * 2)
    with pytest.raises(UsageError, match="found 2 among moralizing, moralizing"):
        twice.with_ranges({"moralizing": (0, 1)})
    with pytest.raises(UsageError, match="LOW <= HIGH"):
        noir.with_ranges({0: (1, 0)})


def test_files_of_directions_are_relative_to_the_profile_wherever_it_goes(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away" / "deep"
    home.mkdir()
    sliders = (
        ProfileSlider("dirs/duke.safetensors", 1),
        ProfileSlider("moralizing", 1, when=ScheduleSpec(gate=GateSpec("duke.safetensors", above=0))),
        ProfileSlider(str(tmp_path / "fixed.safetensors"), 1),
    )
    profile = Profile.load(Profile("p", sliders=sliders).save(home / "p.yaml"))
    assert profile.sliders == sliders
    assert profile.file_of("dirs/duke.safetensors") == home / "dirs" / "duke.safetensors"
    assert profile.file_of("moralizing") is None
    assert profile.files() == ["dirs/duke.safetensors", "duke.safetensors", str(tmp_path / "fixed.safetensors")]
    moved = Profile.load(profile.save(away / "p.yaml"))
    assert moved.files()[:2] == ["../../home/dirs/duke.safetensors", "../../home/duke.safetensors"]
    for old, new in zip(profile.files(), moved.files(), strict=True):
        was, now = profile.file_of(old), moved.file_of(new)
        assert was is not None
        assert now is not None
        assert was.resolve() == now.resolve()
    assert Profile.load(moved.save(home / "back.yaml")) == profile


def test_a_plan_becomes_a_when_with_its_gate(make_direction: Any) -> None:
    gate: Direction = make_direction("compliance")
    when = ScheduleSpec("reply", first=9, after=2, ramp=3, gate=GateSpec("compliance", above=0.5)).on(gate)
    assert (when.part, when.first, when.after, when.ramp) == ("reply", 9, 2, 3)
    assert when.gate is not None
    assert (when.gate.on, when.gate.above, when.gate.below) == (gate, 0.5, None)
    assert ScheduleSpec().on(None).always


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProfileSlider("a", float("nan")),
        lambda: ProfileSlider("", 1),
        lambda: GateSpec("a"),
        lambda: ScheduleSpec(first=-1),
        lambda: Profile("a", preset="tame"),
        lambda: Profile("a\nb"),
    ],
)
def test_values_made_in_python_are_checked_as_well(make: Any) -> None:
    with pytest.raises(UsageError):
        make()
