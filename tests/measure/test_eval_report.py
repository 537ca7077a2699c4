"""The report of `steer eval`, on results that no model had to make: every shape a run can have, and what it claims."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from synthetic_eval import ARMS, PROBES, synthetic_eval

from steer.measure.eval_report import comparisons, number, verdicts, write_eval_report

PICTURED = ("positions", "prose")
DAMAGED = ("merged", "slid", "baked", "noise 10 %", "noise 30 %", "MLPs in 2 bits", "the slider at 3 times its range")


def row(result: dict[str, Any], probe: str, arm: str) -> dict[str, Any]:
    """The summary of a probe's headline."""
    found = next(p for p in result["probes"] if p["name"] == probe)
    return next(s for s in found["summary"] if s["arm"] == arm)


def outcomes(result: dict[str, Any], arm: str = "slid") -> dict[str, str]:
    return {c.name: c.outcome for c in comparisons(result) if c.arm == arm}


def written(result: dict[str, Any], folder: Path) -> str:
    """The page, every picture of which is whole XML and which loads no other file."""
    page = write_eval_report(result, folder / "eval.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)
    for outside in ("src=", "<link", "@import", "http://localhost", "<script"):
        assert outside not in page
    for leaked in ("None", "nan", "built-in", "undefined"):
        assert leaked not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    return page


def test_the_sign_of_a_difference_is_read_by_what_the_metric_calls_better():
    result = synthetic_eval(shifts={("slid", "positions"): 0.3, ("slid", "prose"): 0.1, ("slid", "moralizing"): -0.7})
    assert outcomes(result) == {
        "capability": "noise", "positions": "better", "positions (margin)": "better", "consequences": "noise",
        "moralizing": "changed", "prose": "worse", "drift": "noise",
    }  # fmt: skip
    by_name = {c.name: c for c in comparisons(result) if c.arm == "slid"}
    assert by_name["positions"].difference[0] > 0
    assert by_name["prose"].difference[0] < 0  # more repetition, which is worse
    assert all(c.difference[1] <= c.difference[0] <= c.difference[2] for c in by_name.values())


def test_differences_are_in_standard_deviations_of_the_first_arm():
    result = synthetic_eval(probes=("consequences",), arms=("merged", "slid"))
    values = [f["value"] for f in result["probes"][0]["arms"]["merged"]["figures"]]
    share = sum(values) / len(values)
    difference = row(result, "consequences", "slid")["difference"]
    found = comparisons(result)[0].difference[0]
    assert found == pytest.approx(difference / (share * (1 - share)) ** 0.5)


def test_a_first_arm_without_spread_is_compared_all_the_same():
    result = synthetic_eval(probes=("consequences",), arms=("merged", "slid"), shifts={("slid", "consequences"): -0.9})
    for figure in result["probes"][0]["arms"]["merged"]["figures"]:
        figure["value"] = 1.0
    assert comparisons(result)[0].difference[0] < 0


def test_the_verdict_says_what_moved_what_did_not_and_what_noise_hides():
    result = synthetic_eval()
    found = dict(verdicts(result))
    assert list(found) == ["slid", "baked"]
    worse, changed, still = found["slid"]
    before, after = row(result, "positions", "merged")["value"], row(result, "positions", "slid")["value"]
    assert worse.startswith(f"Worse: positions {before:.2f} → {after:.2f}, positions (margin) ")
    assert changed.startswith("Changed, which is neither better nor worse: moralizing 0.")
    noise = row(result, "consequences", "slid")["noise"]
    assert "No change beyond noise in 3 of 6 probes: capability (× 1.0" in still
    assert f"consequences ({noise:.3f})" in still


def test_perplexities_are_shown_as_such_and_their_differences_as_factors(tmp_path):
    result = synthetic_eval(probes=("capability",), arms=("merged", "slid"), shifts={("slid", "capability"): 0.5})
    summary = row(result, "capability", "slid")
    summary.update(value=3.0, low=2.0, high=4.0, difference=0.5, difference_low=0.4, difference_high=0.6)
    page = written(result, tmp_path)
    assert "<td>20.09</td><td>7.389 to 54.60</td>" in page
    assert "<td>× 1.65 (× 1.49 to × 1.82)</td>" in page


@pytest.mark.parametrize("arms", [ARMS[:1], ARMS[:2], DAMAGED], ids=len)
def test_any_number_of_arms_has_a_picture_a_section_per_probe_and_every_answer(arms, tmp_path):
    result = synthetic_eval(arms, PICTURED)
    page = written(result, tmp_path)
    for probe in PICTURED:
        assert page.count(f'<h2 id="{probe}">') == 1
    for arm in arms:
        assert page.count(f"says {arm}</div>") == 5 * len(PICTURED)
    # Two pictures, and positions has two metrics by n and by turn.
    assert page.count("<svg") == 2 + 4
    picture = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0]
    for arm in arms[1:] if len(arms) > 2 else ():
        assert picture.count(arm[:25]) >= len(PICTURED)
    assert ("One model, so nothing is compared" in page) == (len(arms) == 1)
    assert ("better →" in picture) == (len(arms) > 1)


def test_chance_stands_in_words_and_in_the_plots(tmp_path):
    page = written(synthetic_eval(probes=("positions",)), tmp_path)
    assert "A reader that knows nothing of the text scores 0.25." in page
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[2:]
    assert ["chance" in p for p in plots] == [True, True, False, False]  # the margin has no chance level


def test_where_in_a_chat_an_arm_becomes_worse_is_said(tmp_path):
    result = synthetic_eval(("merged", "slid"), ("drift",), items=200)
    for figure in result["probes"][0]["arms"]["slid"]["figures"]:
        figure["value"] += 2.0 * (figure["turn"] >= 40)
    page = written(result, tmp_path)
    (turn,) = re.findall(r"<li>slid: perplexity becomes worse from message (\d+) on", page)
    assert int(turn) == 40
    assert "merged: perplexity becomes worse" not in page


def test_a_probe_that_was_not_asked_says_why_and_one_without_signal_is_no_verdict(tmp_path):
    why = "the endpoint gives no log-probabilities"
    result = synthetic_eval(probes=("positions", "consequences"), skipped={("slid", "positions"): why})
    result["probes"][1]["signal"] = {"status": "none", "line": "no signal at this size; chance is 0.5"}
    page = written(result, tmp_path)
    assert f"slid was not asked: {why}" in page
    assert "<b>No signal at this size; chance is 0.5.</b>" in page
    assert "consequences *" in page
    slid = " ".join(dict(verdicts(result))["slid"])
    assert "Not compared: positions." in slid
    assert "No signal at this size, so nothing can be said: consequences." in slid
    assert "positions (0." in dict(verdicts(result))["baked"][0]


def test_a_run_that_could_ask_nothing_says_so(tmp_path):
    result = synthetic_eval(skipped={(a, p): "no reply came" for a in ARMS for p in PROBES})
    page = written(result, tmp_path)
    assert "No probe could be asked" in page
    assert "<svg" not in page
    assert page.count("was not asked: no reply came") == len(ARMS) * len(PROBES)


def test_figures_that_are_not_numbers_leave_gaps(tmp_path):
    result = synthetic_eval(probes=("positions", "drift"))
    for probe in result["probes"]:
        for figure in probe["arms"]["slid"]["figures"][::2]:
            figure["value"] = None
    for name in ("value", "low", "high", "difference", "difference_low", "difference_high", "p", "p_corrected"):
        row(result, "positions", "slid")[name] = None
    row(result, "positions", "slid")["moved"] = False
    page = written(result, tmp_path)
    assert "<td>–</td><td>– to –</td>" in page


def test_names_and_answers_of_strangers_stay_text(tmp_path):
    arm = "$x^$ <b>loud</b> \x1b[31m 漢字 " + "long " * 20
    result = synthetic_eval(("merged", "other", arm), ("consequences",))
    result["probes"][0]["arms"][arm]["examples"][0]["answered"] = "<script>alert(1)</script>"
    result["probes"][0]["arms"][arm]["notes"] = ["<i>cut</i>"]
    page = written(result, tmp_path)
    assert "&lt;script&gt;" in page
    assert "<b>loud" not in page
    assert "&lt;i&gt;cut" in page


def test_a_difference_far_off_the_scale_stands_at_its_edge_with_its_number(tmp_path):
    result = synthetic_eval(probes=("capability",), arms=("merged", "slid"), shifts={("slid", "capability"): 40.0})
    page = written(result, tmp_path)
    far = comparisons(result)[0].difference[0]
    assert far < -50
    assert f">{far:+.0f}<" in page


def test_a_probe_that_is_not_judged_is_marked_in_the_picture_whether_it_moved_or_not(tmp_path):
    for shift in (0.0, -0.75):
        page = written(synthetic_eval(shifts={("slid", "moralizing"): shift}), tmp_path)
        assert ">moralizing †<" in page
        assert "† not judged: right is higher" in page
        assert "prose †" not in page


def test_the_axis_says_what_makes_an_item_hard(tmp_path):
    result = synthetic_eval(probes=("positions",))
    result["probes"][0]["n"] = "moves of the thing"
    assert ">moves of the thing<" in written(result, tmp_path)


def test_the_same_result_gives_the_same_page(tmp_path):
    a, b = (write_eval_report(synthetic_eval(probes=("consequences",)), tmp_path / n).read_bytes() for n in ("a", "b"))
    assert a == b


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.50"), (-0.0001, "0.00"), (12.34, "12.3"), (456.7, "457"), (2e9, "2.0e+09")],
)
def test_figures_are_short(value, text):
    assert number(value) == text
