"""A window's share is worked out once a pass for all modules that have it, and anew for the next."""

from __future__ import annotations

import pytest
import torch

from steer.checkpoint.anatomy import Anatomy
from steer.core.edit import Edit
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.model.steering.low_rank import ForwardContext, ReplyWindow
from steer.model.steering.module_edits import module_edits

LATE = Schedule("reply", after=1, ramp=2)


@pytest.fixture
def anatomy(tiny_llama, tmp_path):
    from transformers import AutoConfig

    return Anatomy.of(AutoConfig.from_pretrained(tiny_llama(tmp_path / "tiny")).to_dict(), "tiny")


def windows(anatomy, *moves: Slider) -> list[ReplyWindow | None]:
    programs = module_edits((Edit.of(moves),), anatomy, lambda name: torch.ones(32))
    return [columns.window for program in programs.values() for columns in (*program.added, *program.set)]


def window(when: Schedule) -> ReplyWindow:
    return ReplyWindow(torch.tensor(when.window, dtype=torch.float64).view(4, 1, 1, 1))


def test_sites_with_equal_windows_share_one_and_others_do_not(anatomy, make_direction):
    here, there = make_direction("here", site=0), make_direction("there", site=2, seed=8)
    one, two = windows(
        anatomy,
        Slider(here, "add", 1.0, LATE),
        Slider(there, "clamp", 1.0, Schedule("reply", after=1, ramp=2)),
    )
    assert one is two
    one, two = windows(anatomy, Slider(here, "add", 1.0, LATE), Slider(there, "add", 1.0, Schedule("reply")))
    assert one is not two


def test_a_pass_gets_its_own_share_at_every_site():
    late, x = window(LATE), torch.zeros(1, 4, 8, dtype=torch.float64)
    text = ForwardContext(index=torch.tensor([[-1, 0, 1, 2]]))
    first = late.share(text, x)
    assert first.flatten().tolist() == [0.0, 0.0, 0.5, 1.0]
    assert late.share(text, x) is first
    assert late.share(text, x.float()).dtype == torch.float32
    text.index = torch.tensor([[1, 2, 3, 4]])  # as the hooks of a plain model count
    assert late.share(text, x).flatten().tolist() == [0.5, 1.0, 1.0, 1.0]


def test_rows_that_change_places_change_their_shares():
    rows = ReplyWindow(
        torch.stack([torch.tensor(w.window, dtype=torch.float64) for w in (LATE, Schedule("reply"))], 1)[
            ..., None, None
        ]
    )
    index, x = torch.tensor([[1], [1]]), torch.zeros(2, 1, 8, dtype=torch.float64)
    assert rows.share(ForwardContext(index=index), x).flatten().tolist() == [0.5, 1.0]
    assert rows.share(ForwardContext(torch.tensor([1, 0]), index), x).flatten().tolist() == [1.0, 0.5]
