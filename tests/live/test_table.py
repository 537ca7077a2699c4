"""A window's share is worked out once a pass for all modules that have it, and anew for the next."""

from __future__ import annotations

import pytest
import torch

from steer.live.frame import TextPass
from steer.live.program import compiled
from steer.live.table import Window
from steer.values.edit import Edit
from steer.values.move import Move
from steer.values.when import When
from steer.weights.anatomy import Anatomy

LATE = When("reply", after=1, ramp=2)


@pytest.fixture
def anatomy(tiny_llama, tmp_path):
    from transformers import AutoConfig

    return Anatomy.of(AutoConfig.from_pretrained(tiny_llama(tmp_path / "tiny")).to_dict(), "tiny")


def windows(anatomy, *moves: Move) -> list[Window | None]:
    programs = compiled((Edit.of(moves),), anatomy, lambda name: torch.ones(32))
    return [columns.window for program in programs.values() for columns in (*program.added, *program.set)]


def window(when: When) -> Window:
    return Window(torch.tensor(when.window, dtype=torch.float64).view(3, 1, 1, 1))


def test_sites_with_equal_windows_share_one_and_others_do_not(anatomy, make_direction):
    here, there = make_direction("here", site=0), make_direction("there", site=2, seed=8)
    one, two = windows(anatomy, Move(here, "add", 1.0, LATE), Move(there, "clamp", 1.0, When("reply", after=1, ramp=2)))
    assert one is two
    one, two = windows(anatomy, Move(here, "add", 1.0, LATE), Move(there, "add", 1.0, When("reply")))
    assert one is not two


def test_a_pass_gets_its_own_share_at_every_site():
    late, x = window(LATE), torch.zeros(1, 4, 8, dtype=torch.float64)
    text = TextPass(index=torch.tensor([[-1, 0, 1, 2]]))
    first = late.share(text, x)
    assert first.flatten().tolist() == [0.0, 0.0, 0.5, 1.0]
    assert late.share(text, x) is first
    assert late.share(text, x.float()).dtype == torch.float32
    text.index = torch.tensor([[1, 2, 3, 4]])  # as the hooks of a plain model count
    assert late.share(text, x).flatten().tolist() == [0.5, 1.0, 1.0, 1.0]


def test_rows_that_change_places_change_their_shares():
    rows = Window(
        torch.stack([torch.tensor(w.window, dtype=torch.float64) for w in (LATE, When("reply"))], 1)[..., None, None]
    )
    index, x = torch.tensor([[1], [1]]), torch.zeros(2, 1, 8, dtype=torch.float64)
    assert rows.share(TextPass(index=index), x).flatten().tolist() == [0.5, 1.0]
    assert rows.share(TextPass(torch.tensor([1, 0]), index), x).flatten().tolist() == [1.0, 0.5]
