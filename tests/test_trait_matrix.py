"""The cross-effect matrix: its figures on known replies, and the script that measures it, on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_parrot import save_parrot

from steer.core.direction import Direction
from steer.core.trait import Trait
from steer.errors import MismatchError, UsageError
from steer.finding.traits import find_trait
from steer.measure.contrast import Contrast, Reply
from steer.measure.cross_effects import CrossEffect, cross_effects, effects_plot
from steer.measure.scorer import Scorer
from steer.model.steered import load


def scorer_of(shown: str, hidden: str) -> Scorer:
    def replies(word: str) -> tuple[Reply, ...]:
        return tuple(Reply(({"role": "user", "content": str(i)},), (1,), f"{word} and so on") for i in range(4))

    trait = Trait("t", "s", "w", "o")
    return Scorer.train(Contrast(trait, *(replies(w) for w in (shown, hidden, shown, hidden)), ()))


def test_a_cell_is_the_mean_change_of_the_log_odds_in_deviations_of_the_untouched_replies() -> None:
    scorers = {"warm": scorer_of("dear", "cold"), "loud": scorer_of("hey", "hush")}
    untouched = ["dear and on", "cold and on", "so on", "hush dear", "hush cold", "hush"]
    moved = {"warm": [f"{t} dear" for t in untouched], "same": untouched}
    cells = {(e.slider, e.scorer): e for e in cross_effects(untouched, moved, scorers)}
    assert list(cells) == [("warm", "warm"), ("warm", "loud"), ("same", "warm"), ("same", "loud")]
    before, after = (scorers["warm"].log_odds(texts) for texts in (untouched, moved["warm"]))
    warm = cells["warm", "warm"]
    assert warm.change == pytest.approx((after - before).mean() / before.std(ddof=1))
    assert warm.low <= warm.change <= warm.high
    assert warm.certain
    same = cells["same", "warm"]
    assert (same.change, same.low, same.high, same.certain) == (0, 0, 0, False)
    probabilities = scorers["warm"].probabilities(untouched)
    np.testing.assert_allclose(np.log(probabilities / (1 - probabilities)), before, atol=1e-9)


def test_untouched_replies_that_are_all_alike_have_no_unit() -> None:
    (cell,) = cross_effects(["so on"] * 4, {"warm": ["dear"] * 4}, {"warm": scorer_of("dear", "cold")})
    assert math.isnan(cell.change)
    assert not cell.certain
    assert effects_plot([cell]).startswith("<svg")


def test_the_drawing_has_every_name_and_number() -> None:
    effects = [CrossEffect(a, b, 1.25 if a == b else -0.04, -0.3 if a != b else 1.0, 1.5 if a == b else 0.2)
               for a in ("warmth", "slop") for b in ("warmth", "slop", "<b>")]  # fmt: skip
    drawing = effects_plot(effects)
    for text in ("warmth", "slop", "+1.2", "-0.0", "\u00b10.2", "&lt;b&gt;", "slider at +1"):
        assert text in drawing
    assert effects_plot(effects) == drawing


def test_the_script_finds_two_traits_goes_on_where_it_stopped_and_adds_further_sliders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(__file__).parents[1] / "examples" / "traits" / "matrix.py"
    spec: Any = importlib.util.spec_from_file_location("matrix", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    topics = {"fit": ["ba be bi", "bo bu da", "de di do", "du fa fe"], "held_out": ["fi fo fu", "ga ge"]}
    for name, with_, without in (("lies", "ta te ti to tu ", "va ve vi vo vu "),
                                 ("friends", "ka ke ki ko ku ", "ra re ri ro ru ")):  # fmt: skip
        trait = {"name": name, "summary": name, "with": 3 * with_, "without": 3 * without, **topics}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(trait))
    model, out = str(save_parrot(tmp_path / "model")), tmp_path / "out"
    traits = f"{tmp_path}/lies.yaml,{tmp_path}/friends.yaml"
    options = {"traits": traits, "quick": True, "topics": 6}
    script.main(model, out, **options)
    printed = capsys.readouterr().out
    assert "lies on friends" in printed
    result = json.loads((out / "matrix.json").read_text())
    assert [(e["slider"], e["scorer"]) for e in result["effects"]] == [
        ("lies", "lies"), ("lies", "friends"), ("friends", "lies"), ("friends", "friends")]  # fmt: skip
    assert result["missing"] == {}
    for name in ("lies", "friends"):
        low, high = Direction.load(out / "calibrated" / f"{name}.safetensors").calibrated or (0, 0)
        assert low < high
        assert result["sliders"][name]["range"] == [low, high]
    assert "friends" in (out / "matrix.html").read_text()
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and not p.name.startswith("matrix")}
    assert len(times) == 10  # manifest; direction, with range too, figures and replies of each; the untouched replies
    (out / "replies" / "lies.json").unlink()
    (out / "matrix.json").unlink()
    script.main(model, out, **options)
    assert json.loads((out / "matrix.json").read_text()) == result
    assert [p.name for p, t in times.items() if p.stat().st_mtime_ns != t] == ["lies.json"]
    friends = Trait.load(tmp_path / "friends.yaml")
    kept = find_trait(load(model), tmp_path / "lies.yaml", keep=[friends], quick=True).direction
    variant = kept.save(tmp_path / "lies-clean.safetensors")
    script.main(model, out, **options, slider=[variant])
    both = json.loads((out / "matrix.json").read_text())
    assert list(both["sliders"]) == ["lies", "friends", "lies-clean"]
    clean = both["sliders"]["lies-clean"]
    assert (clean["trait"], clean["site"], clean["keep"]["traits"]) == ("lies", kept.site, ["friends"])
    assert len(clean["verdict"]["points"]) == 5
    assert [e for e in both["effects"] if e["slider"] != "lies-clean"] == result["effects"]
    assert sum(e["slider"] == "lies-clean" for e in both["effects"]) == 2
    with pytest.raises(UsageError, match="expected a direction of lies, friends, found 'pride'"):
        script.main(model, out, **options, slider=[replace(kept, name="pride").save(tmp_path / "pride.safetensors")])
    script.main(model, out, **options | {"traits": f"{tmp_path}/lies.yaml", "quick": False})
    assert [json.loads((out / f"{name}.json").read_text())["quick"] for name in ("lies", "friends")] == [False, True]
    full = json.loads((out / "matrix.json").read_text())
    assert full["sliders"]["lies"]["quick"] is False
    assert "full" in (out / "matrix.html").read_text()
    with pytest.raises(MismatchError, match="name another directory"):
        script.main(model, out, **options | {"topics": 7})
    (tmp_path / "lies.yaml").write_text((tmp_path / "lies.yaml").read_text().replace("ta te", "ta to"))
    with pytest.raises(MismatchError, match="expected lies as it is now"):
        script.main(model, out, **options)
