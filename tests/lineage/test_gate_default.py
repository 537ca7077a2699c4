"""On the tunes that ship: a ruined merge does not pass the gate and is not shown, and one move away passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.checkpoint.merge import read_recipe, with_absolute_paths
from steer.lineage.building import build, building, start
from steer.lineage.lineage import Lineage, Move, Settings
from steer.lineage.proposing import Proposal
from steer.lineage.ratings import standing

RECIPE = Path(__file__).parents[2] / "examples" / "merge" / "default.yml"


@pytest.mark.slow
def test_nobody_reads_the_default_tunes_at_five_times_their_weight(tmp_path: Path) -> None:
    lineage = Lineage.create(tmp_path / "lineage", Settings([]))
    recipe = with_absolute_paths(read_recipe(RECIPE), RECIPE)
    prose = next(entry["model"] for entry in recipe["models"] if entry["model"].endswith("prose"))
    with building(lineage):
        start(lineage, recipe, "the recipe that ships")
        ruined = Proposal("0", Move("method", None, "task_arithmetic", {"weight": 5.0}), "a test")
        ruined, sane = build(lineage, [ruined, Proposal("0", Move("remove", prose), "a test")]).nodes
    assert ruined.gate is not None
    assert any(reason.startswith("capability: perplexity ") for reason in ruined.gate.reasons)
    assert not ruined.passed
    assert sane.passed
    assert list(standing(lineage).ratings) == ["0", sane.id]
