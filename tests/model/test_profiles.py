"""Profiles on a model: names looked up, all sliders set in one step, and every step taken back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from slow_steering import close_directions, exact, make_dictionary, slow_logits
from tiny_chat import hooks_on, keep_direction

from steer.chat.session import Session
from steer.checkpoint import library
from steer.checkpoint.library import dictionary_place
from steer.core.dictionary_files import save_dictionary
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.profile import Profile
from steer.core.sampler import PRESETS, Sampler
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.errors import MismatchError, SteerError, UsageError
from steer.model.profiles import as_profile, edit_of, sliders_in, use
from steer.model.sliders import Sliders
from steer.model.steered import SteeredModel, load

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")
TEXT = [1, 4, 20, 33, 9, 5]
CALM = close_directions(n=1)[0]
BOLD = Direction("bold", 0, torch.randn(32, generator=torch.Generator().manual_seed(4)), with_mean=0.8)
DICTIONARY = make_dictionary()


@pytest.fixture(scope="module", autouse=True)
def home(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A STEER_HOME with two directions, `d0` and `bold`, and a dictionary with a slider `preach` at site 1."""
    patch = pytest.MonkeyPatch()
    place = tmp_path_factory.mktemp("home")
    patch.setenv("STEER_HOME", str(place))
    (place / "shipped").mkdir()
    patch.setattr(library, "DICTIONARIES", place / "shipped")
    for direction in (CALM, BOLD):
        keep_direction(chat_checkpoint, direction)
    sketch = load(chat_checkpoint).sketch()
    folder = dictionary_place(sketch, "tiny")
    save_dictionary(DICTIONARY, folder)
    (folder / "features.jsonl").write_text("".join(json.dumps({"index": i, "unit": 1.0 + i}) + "\n" for i in range(40)))
    rows = [{"name": "preach", "latents": [3, 9], "units": [1.0, 2.0], "operation": "clamp"}]
    (folder / "sliders.yaml").write_text(yaml.safe_dump(rows))
    header = {"name": "tiny", "site": 1, "norm": DICTIONARY.norm, "sketch": sketch.to_header()}
    (folder / "manifest.json").write_text(json.dumps(header))
    yield place
    patch.undo()


@pytest.fixture(scope="module")
def model64(home: Path, chat_checkpoint: Path) -> SteeredModel:
    """A tiny model, all of it in fp64."""
    return exact(load(chat_checkpoint, dtype=torch.float64))


def profile(*sliders: dict[str, Any], name: str = "noir", **more: Any) -> Profile:
    return Profile.parse({"name": name, "sliders": list(sliders), **more}, "test")


WHOLE = profile(
    {"slider": "d0", "amount": -0.5},
    {"slider": "d0", "amount": 0.4, "operation": "cap", "when": {"first": 2}},
    {"slider": "d0:clamp", "amount": 0.2, "when": {"after": 2}},
    {"slider": "preach", "amount": 1.0, "when": {"while": {"slider": "bold", "above": 0.3}}},
    {"slider": "preach", "amount": 0.0, "when": {"while": {"slider": "bold", "below": 0.3}}, "operation": "scale"},
    {"slider": "L1/8", "amount": 0.5, "range": [-1, 2]},
    {"slider": "bold", "amount": 1.0, "operation": "ablate", "enabled": False},
)


def by_hand(model: SteeredModel) -> list[Slider]:
    """What WHOLE says, written out."""
    known = library.directions_of(model.sketch())
    calm, bold = known["d0"], known["bold"]
    preach = Feature("preach", DICTIONARY, (3, 9), (1.0, 2.0))
    return [
        Slider(calm, "add", -0.5),
        Slider(calm, "cap", 0.4, Schedule(first=2)),
        Slider(calm, "clamp", 0.2, Schedule(after=2)),
        Slider(preach, "clamp", 1.0, Schedule(gate=Gate(bold, above=0.3))),
        Slider(preach, "scale", 0.0, Schedule(gate=Gate(bold, below=0.3))),
        Slider(Feature("L1/8", DICTIONARY, (8,), (9.0,)), "add", 0.5),
    ]


@torch.inference_mode()
def logits(model: SteeredModel) -> torch.Tensor:
    return model.hf(input_ids=torch.tensor([TEXT])).logits[0]


def test_a_profile_does_what_its_sliders_do(model64):
    wanted = slow_logits(model64, TEXT, by_hand(model64), len(TEXT))
    edit = edit_of(model64, WHOLE)
    with model64.steering.applied([edit]):
        torch.testing.assert_close(logits(model64), wanted, rtol=0, atol=1e-10)
    use(model64.sliders, WHOLE)
    torch.testing.assert_close(logits(model64), wanted, rtol=0, atol=1e-10)
    model64.sliders.reset()
    assert hooks_on(model64) == 0


def test_every_slider_has_a_name_of_its_own(model64):
    names = [s.name for s, _ in sliders_in(model64, WHOLE)]
    assert names == ["d0", "d0:cap", "d0:clamp", "preach", "preach:scale", "L1/8", "bold:ablate"]
    twice = profile(*[{"slider": "d0", "amount": a} for a in (1.0, 2.0, 3.0)])
    assert [s.name for s, _ in sliders_in(model64, twice)] == ["d0", "d0 (2)", "d0 (3)"]
    sliders = Sliders(model64, live=False)
    use(sliders, twice)
    assert dict(sliders) == {"d0": 1.0, "d0 (2)": 2.0, "d0 (3)": 3.0}
    assert sliders.current is not None
    assert sum(m.amount for m in sliders.current.as_moves()) == 6.0
    assert [m.name for m in sliders.current.as_moves()] == list(sliders)


def test_sliders_that_are_not_enabled_are_known_and_stand_at_nothing(model64):
    sliders = Sliders(model64, live=False)
    use(sliders, WHOLE)
    assert "bold:ablate" not in dict(sliders)
    assert (sliders["bold:ablate"], sliders.slider("bold:ablate").operation) == (0.0, "ablate")
    sliders["bold:ablate"] = 0.5
    assert sliders["bold:ablate"] == 0.5


def test_ranges_are_those_of_the_profile_in_use(model64):
    sliders = Sliders(model64, live=False)
    use(sliders, WHOLE)
    assert sliders.ranges == {"L1/8": (-1.0, 2.0)}
    use(sliders, profile({"slider": "L1/8", "amount": 1.0}, {"slider": "d0", "amount": 1.0, "range": [0, 1]}))
    assert sliders.ranges == {"d0": (0.0, 1.0)}


def test_a_directions_file_is_found_beside_the_profile(model64, tmp_path):
    BOLD.save(tmp_path / "found" / "mine.safetensors")
    rows = [{"slider": "found/mine.safetensors", "amount": 2.0}]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "sliders": rows}))
    edit = edit_of(model64, Profile.load(tmp_path / "p.yaml"))
    assert edit is not None
    bold = Direction.load(tmp_path / "found" / "mine.safetensors")
    wanted = slow_logits(model64, TEXT, [Slider(bold, "add", 2.0)], len(TEXT))
    with model64.steering.applied([edit]):
        torch.testing.assert_close(logits(model64), wanted, rtol=0, atol=1e-10)
    (tmp_path / "found" / "mine.safetensors").unlink()
    with pytest.raises(SteerError, match=r"profile 'p': .*mine\.safetensors: expected a direction file"):
        edit_of(model64, Profile.load(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"slider": "kindness", "amount": 1}], UsageError, "'kindness': expected a direction"),
        ([{"slider": "d0:cup", "amount": 1}], UsageError, "NAME:OPERATION"),
        ([{"slider": "L7/3", "amount": 1}], UsageError, "at site 7"),
        ([{"slider": "d0", "amount": 3, "operation": "ablate"}], SteerError, "0 to 1"),
        ([{"slider": "d0:ablate", "amount": 3}], UsageError, "0 to 1"),
        (
            [{"slider": "bold", "amount": 1, "when": {"while": {"slider": "d0", "above": 0}}}],
            UsageError,
            "gate at its site 0 or before it",
        ),
        ([{"slider": "d0:cap", "amount": 1}, {"slider": "d0:clamp", "amount": 1}], UsageError, "'d0:cap' and 'd0:cl"),
        (
            [
                {"slider": "d0:cap", "amount": 1, "when": {"part": "reply"}},
                {"slider": "d0:cap", "amount": 0, "when": {"first": 3}},
            ],
            UsageError,
            r"'d0:cap' and 'd0:cap \(2\)'",
        ),
    ],
)
def test_a_profile_that_cannot_be_is_one_line_and_changes_nothing(model64, rows, error, message):
    sliders = Sliders(model64)
    use(sliders, profile({"slider": "bold", "amount": 1.0}))
    before, at = logits(model64), dict(sliders)
    with pytest.raises(error, match=message) as caught:
        use(sliders, profile(*rows))
    with pytest.raises(error, match=message):
        edit_of(model64, profile(*rows))
    assert "\n" not in str(caught.value)
    assert rows[0]["amount"] == 3 or str(caught.value).startswith("profile 'noir': ")
    assert dict(sliders) == at
    assert torch.equal(logits(model64), before)
    assert sliders.undo()
    assert not sliders.undo()
    assert hooks_on(model64) == 0


def test_a_direction_of_another_width_is_refused_with_the_profiles_name(model64, tmp_path):
    Direction("wide", 1, torch.ones(64)).save(tmp_path / "wide.safetensors")
    rows = {"name": "p", "sliders": [{"slider": str(tmp_path / "wide.safetensors"), "amount": 1.0}]}
    with pytest.raises(MismatchError, match=r"profile 'p': .*width 64.*width 32"):
        use(Sliders(model64, live=False), Profile.parse(rows, "test"))


def test_an_empty_profile_moves_nothing_and_takes_everything_back(model64):
    assert edit_of(model64, profile()) is None
    sliders = Sliders(model64)
    use(sliders, WHOLE)
    assert hooks_on(model64) > 0
    use(sliders, profile())
    assert (dict(sliders), sliders.current, hooks_on(model64)) == ({}, None, 0)


def test_what_stands_can_be_saved_and_used_again(model64, tmp_path):
    sliders = Sliders(model64, live=False)
    use(sliders, WHOLE)
    saved = as_profile("copy", sliders, PRESETS["wild"]).save(tmp_path / "copy.yaml")
    again, other = Profile.load(saved), Sliders(model64, live=False)
    use(other, again)
    assert dict(other) == dict(sliders)
    assert other.ranges == sliders.ranges
    assert again.preset == "wild"
    assert sliders.current is not None
    assert other.current is not None
    for mine, theirs in zip(sliders.current.as_moves(), other.current.as_moves(), strict=True):
        assert (mine.name, mine.operation, mine.amount) == (theirs.name, theirs.operation, theirs.amount)
        assert mine.when.window == theirs.when.window
    with model64.steering.applied([sliders.current]):
        wanted = logits(model64)
    with model64.steering.applied([other.current]):
        torch.testing.assert_close(logits(model64), wanted, rtol=0, atol=1e-10)


# Undo


def test_every_change_is_taken_back_and_done_again(model64):
    sliders = Sliders(model64)
    states: list[tuple[dict[str, float], torch.Tensor]] = []

    def change(what: Callable[[], object]) -> None:
        what()
        states.append((dict(sliders), logits(model64)))

    change(lambda: None)
    change(lambda: sliders.put(CALM, 1.0))
    change(lambda: use(sliders, WHOLE))
    change(lambda: sliders.__setitem__("L1/8", -1.0))
    change(lambda: sliders.put(Slider(CALM, "ablate"), 0.5))  # the name d0 means something else now
    change(lambda: sliders.__delitem__("d0"))
    change(lambda: use(sliders, profile({"slider": "d0", "amount": 2.0, "when": {"part": "reply"}})))
    change(sliders.reset)
    for at, seen in reversed(states[:-1]):
        assert sliders.undo()
        assert dict(sliders) == at
        assert torch.equal(logits(model64), seen)
    assert not sliders.undo()
    assert hooks_on(model64) == 0
    for at, seen in states[1:]:
        assert sliders.redo()
        assert dict(sliders) == at
        assert torch.equal(logits(model64), seen)
    assert not sliders.redo()


def test_a_change_that_changes_nothing_or_fails_is_no_step(model64):
    sliders = Sliders(model64, live=False)
    sliders.put(CALM, 1.0)
    sliders["d0"] = 1.0
    sliders.put(Slider(BOLD, "clamp"))
    with pytest.raises(UsageError):
        sliders["d0"] = float("nan")
    assert sliders.undo()
    assert dict(sliders) == {}
    assert not sliders.undo()


def test_a_new_change_ends_what_could_be_done_again(model64):
    sliders = Sliders(model64, live=False)
    sliders.put(CALM, 1.0)
    sliders["d0"] = 2.0
    assert sliders.undo()
    sliders["d0"] = 3.0
    assert not sliders.redo()
    assert sliders.undo()
    assert dict(sliders) == {"d0": 1.0}


def test_a_switch_of_profile_in_mid_reply_is_felt_by_the_next_token_and_undone(model64):
    model64.end_token_ids = frozenset()
    session = Session(model64, sampler=Sampler(max_new_tokens=6, temperature=0, repetition_penalty=1.0))

    def reply(at: dict[int, Callable[[], object]]) -> list[str]:
        session.clear()
        pieces, out = session.reply("hello friend"), []
        for i in range(6):
            at.get(i, lambda: None)()
            out.append(next(pieces))
        pieces.close()
        return out

    plain = reply({})
    # An amount that changes the token right after the move, found by trying: greedy choices have margins.
    for amount in (-9.0, 9.0, -30.0, 30.0):
        strong = profile({"slider": "d0", "amount": amount})
        switched = reply({3: lambda strong=strong: use(session.sliders, strong)})
        assert switched[:3] == plain[:3]
        assert session.sliders.undo()
        if switched[3] != plain[3]:
            break
    else:
        pytest.fail("no amount changed the next token")
    assert reply({3: lambda: session.sliders.redo(), 4: lambda: session.sliders.undo()})[:4] == switched[:4]
    assert dict(session.sliders) == {}
    assert reply({}) == plain
    assert hooks_on(model64) == 0
