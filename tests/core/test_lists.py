"""One name is a list of one, and not of its letters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chat import keep_direction, save_tiny_chat

import steer
from steer.core.direction import Direction
from steer.core.lists import as_list, evenly


def test_one_name_is_a_list_of_one(make_direction: Callable[..., Direction]) -> None:
    moral = make_direction("moral")
    assert as_list("moral") == ["moral"]
    assert as_list(Path("moral.safetensors")) == [Path("moral.safetensors")]
    assert as_list(moral) == [moral]
    assert as_list(("a", moral)) == ["a", moral]
    assert as_list(n for n in "ab") == ["a", "b"]
    assert as_list(()) == []


def test_a_bake_takes_one_name_alone(
    tiny_llama: Callable[..., Path],
    make_direction: Callable[..., Direction],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    checkpoint = save_tiny_chat(tiny_llama, tmp_path / "m")
    keep_direction(checkpoint, make_direction("moral"))
    steer.bake(checkpoint, tmp_path / "one", ablate="moral")
    steer.bake(checkpoint, tmp_path / "listed", ablate=["moral"])
    name = "model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "listed" / name).read_bytes()
    with pytest.raises(steer.SteerError, match="unknown trait 'nonsense'"):
        steer.bake(checkpoint, tmp_path / "other", ablate="nonsense")


def test_even_picks_are_different_and_have_both_ends() -> None:
    assert evenly("abcdefg", 3) == ["a", "d", "g"]
    for count in range(30):
        for most in range(1, 35):
            picked = evenly(range(count), most)
            assert picked == sorted(set(picked))
            assert len(picked) == min(count, most)
            assert picked[-1:] == ([count - 1] if min(count, most) > 1 else [0] if count else [])
