"""What is a name, and that no trait, feature or slider has another."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from steer.core.names import COMMANDS, check_name, is_name
from steer.core.profile import Profile
from steer.core.slider import slider_rows
from steer.core.trait import Trait
from steer.errors import SteerError, UsageError

GOOD = ["moralizing", "a", "moral-latent", "v1.2_b", "Höflichkeit", "честность", "7", "x" * 64]
BAD = [
    "", " ", "a b", "../x", "../../../victim/model", "/abs/olute", "a/b", "L1/2", "a:b", "a\\b", ".", "..", ".hidden",
    "-x", "a\0b", "a\nb", "a\x1b[2J", "x" * 65, "\ud800", "\u202eabc", "quit", "help", "profile", "model.safetensors",
    "noir.YAML", "𝐚" * 64, 3, None, ["a"], True,
]  # fmt: skip

TOPICS = {"fit": [f"fit {n}" for n in range(8)], "held_out": [f"held out {n}" for n in range(4)]}


@pytest.mark.parametrize("name", GOOD)
def test_a_name_is_letters_digits_and_three_marks(name):
    assert check_name(name, "trait") == name


@pytest.mark.parametrize("name", BAD)
def test_paths_commands_and_control_characters_are_no_names(name):
    with pytest.raises(UsageError, match=r"^trait: expected a name") as caught:
        check_name(name, "trait")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", [n for n in BAD if isinstance(n, str)])
def test_a_trait_s_name_is_checked_when_its_file_is_read(tmp_path: Path, name):
    file = tmp_path / "t.yaml"
    raw = {"name": name, "summary": "s", "with": "w", "without": "o", "markers": ["m"]} | TOPICS
    file.write_text(yaml.safe_dump(raw), encoding="utf-8", errors="surrogatepass")
    with pytest.raises(SteerError) as caught:
        Trait.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "merged@noir", "n" * 81])
def test_a_profile_s_name_is_no_path_and_no_model_s(name):
    with pytest.raises(UsageError, match=r"^name: expected at most 80 characters") as caught:
        Profile(name)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "row",
    [
        {"name": "../x", "latents": [1], "units": [1.0]},
        {"name": "quit", "latents": [1], "units": [1.0]},
        {"name": "x", "latents": [-1], "units": [1.0]},
        {"name": "x", "latents": [10**400], "units": [1.0]},
        {"name": "x", "latents": [1], "units": [float("nan")]},
        {"name": "x", "latents": [1], "units": [0]},
        {"name": "x", "latents": [1], "units": [10**400]},
        {"name": "x", "latents": [], "units": []},
        {"name": "x", "latents": [True], "units": [1.0]},
        {"name": "x", "latents": [1], "units": [1.0], "operation": "explode"},
        {"name": "x", "latents": [1], "units": [1.0], "trait": ["a"]},
        {"name": ["x" * 10**5], "latents": [1], "units": [1.0]},
    ],
)
def test_a_row_of_sliders_that_cannot_be_is_one_short_line(tmp_path: Path, row):
    (tmp_path / "sliders.yaml").write_text(yaml.safe_dump([row], allow_unicode=True))
    with pytest.raises(SteerError, match=r"sliders\.yaml: \[0\]: \w+(\[0\])?: expected") as caught:
        slider_rows(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_ships_has_names():
    assert all(is_name(Trait.load(name).name) for name in ("compliance", "moralizing"))
    assert not any(map(is_name, COMMANDS))
