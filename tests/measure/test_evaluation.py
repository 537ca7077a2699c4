"""steer eval: the same items for every arm, paired; killed runs continue; damage is detected; results join."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, command_here, fork
from safetensors.torch import load_file, save_file
from tiny_chat import keep_direction
from tiny_eval import ProgramArm, Weighing, save_by_letters

import steer
from steer.core.direction import Direction
from steer.errors import MismatchError, OutputExistsError, SteerError, UsageError
from steer.measure import arms, damage
from steer.measure.evaluation import evaluate_arms
from steer.measure.probes import capability
from steer.measure.probes.library import probes_named
from steer.measure.probes.probe import Passage, Size
from steer.verbs.eval import compare


def level(shift: float, spread: float = 1.0) -> Callable[[Passage], float]:
    """Scores that differ from item to item by far more than from arm to arm."""
    return lambda p: shift + spread * (sum(map(ord, p.text)) * 7919 % 101 / 101 - 0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    return save_by_letters(tiny_llama, tmp_path_factory.mktemp("tiny") / "merged")


@pytest.fixture(autouse=True)
def little_prose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the tiny checkpoints are letters: a few words are enough. A separate process reads all."""
    if not request.node.get_closest_marker("slow"):
        short = [" ".join(p.split()[:12]) for p in capability.plain_paragraphs()[1]]
        monkeypatch.setattr(capability, "plain_paragraphs", lambda: ([], short))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return command_here(monkeypatch, capfd)


def row(result: dict[str, Any], arm: str, probe: int = 0) -> dict[str, Any]:
    return next(r for r in result["probes"][probe]["summary"] if r["arm"] == arm)


def test_arms_are_compared_item_by_item_with_the_first(tmp_path: Path) -> None:
    made = [ProgramArm("whole", level(0)), ProgramArm("same", level(0)), ProgramArm("worse", level(-0.02))]
    result = evaluate_arms(made, [Weighing()], Size(), tmp_path / "out")
    assert row(result, "worse")["difference"] == pytest.approx(-0.02)
    assert row(result, "worse")["moved"]  # although items differ by fifty times as much
    assert not row(result, "same")["moved"]
    assert row(result, "same")["noise"] > 0
    assert "difference" not in row(result, "whole")
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == result


def test_what_is_done_is_not_asked_again_unless_fresh(tmp_path: Path) -> None:
    first = [ProgramArm("a", level(0)), ProgramArm("b", level(1))]
    whole = evaluate_arms(first, [Weighing()], Size(), tmp_path / "out")
    again = [ProgramArm("a", level(5)), ProgramArm("b", level(6))]
    assert evaluate_arms(again, [Weighing()], Size(), tmp_path / "out") == whole
    assert again[0].made.asked == 0
    more = [*again, ProgramArm("c", level(7))]
    added = evaluate_arms(more, [Weighing(), Weighing("other")], Size(), tmp_path / "out")
    assert [a.made.asked for a in more] == [30, 30, 60]  # the first probe was done for two of them
    assert row(added, "b")["value"] == row(whole, "b")["value"]
    fresh = evaluate_arms(again, [Weighing()], Size(), tmp_path / "out", fresh=True)
    assert row(fresh, "a")["value"] == pytest.approx(5, abs=0.5)


def test_a_run_that_was_killed_while_it_wrote_its_first_file_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = (
        "import os, signal, sys\nfrom steer.files import replacing\n"
        "with replacing(sys.argv[1]) as part:\n    part.touch()\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed, out / "run.json"]).returncode == -signal.SIGKILL
    (left,) = out.iterdir()
    evaluate_arms([ProgramArm("a", level(0))], [Weighing()], Size(), out)
    assert not left.exists()


def test_an_output_of_another_run_or_other_files_is_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate_arms([ProgramArm("a", level(0))], [Weighing()], Size(), out)
    with pytest.raises(OutputExistsError, match="found one with seed 0, not 1"):
        evaluate_arms([ProgramArm("a", level(0))], [Weighing()], Size(seed=1), out)
    with pytest.raises(OutputExistsError, match="another first model"):
        evaluate_arms([ProgramArm("z", level(0))], [Weighing()], Size(), out)
    assert len(list((out / "parts").iterdir())) == 1
    evaluate_arms([ProgramArm("z", level(0))], [Weighing()], Size(), out, fresh=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mum.txt").write_text("Dear mum")
    for fresh in (False, True):
        with pytest.raises(OutputExistsError, match=r"found to-mum\.txt"):
            evaluate_arms([ProgramArm("a", level(0))], [Weighing()], Size(), tmp_path / "letters", fresh=fresh)
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["to-mum.txt"]
    with pytest.raises(OutputExistsError, match="found a file"):
        evaluate_arms([ProgramArm("a", level(0))], [Weighing()], Size(), tmp_path / "letters" / "to-mum.txt")


def test_a_probe_that_fails_for_one_arm_is_skipped_there_alone(tmp_path: Path) -> None:
    def fails(passage: Passage) -> float:
        raise SteerError("broken: found NaN")

    class Unable(Weighing):
        needs = frozenset({"divergences"})

    made = [ProgramArm("whole", level(0)), ProgramArm("broken", fails), ProgramArm("nan", lambda p: float("nan"))]
    result = evaluate_arms(made, [Weighing(), Unable("unable")], Size(), tmp_path / "out")
    parts = result["probes"][0]["arms"]
    assert parts["broken"]["skipped"] == "weighing: broken: found NaN"
    assert "30 of 30 figures left out" in parts["nan"]["skipped"]
    assert parts["whole"]["skipped"] is None
    assert [r["arm"] for r in result["probes"][0]["summary"]] == ["whole"]
    assert "expected a model that gives divergences" in result["probes"][1]["arms"]["whole"]["skipped"]


def test_a_probe_that_moves_for_no_damaged_arm_says_so_with_its_chance(tmp_path: Path) -> None:
    arms = [ProgramArm("whole", level(0.5)), ProgramArm("noise", level(0.5), control=True)]
    result = evaluate_arms(arms, [Weighing(chance=0.5)], Size(), tmp_path / "a")
    assert result["probes"][0]["signal"]["line"] == "no signal at this size; chance is 0.5"
    arms = [ProgramArm("whole", level(0.5)), ProgramArm("noise", level(0.3), control=True)]
    result = evaluate_arms(arms, [Weighing(chance=0.5)], Size(), tmp_path / "b")
    signal = result["probes"][0]["signal"]
    assert (signal["status"], signal["moved"], signal["chance"]) == ("signal", ["noise"], 0.5)
    result = evaluate_arms(arms[:1], [Weighing(chance=0.5)], Size(), tmp_path / "c")
    assert result["probes"][0]["signal"]["line"] == "whole is no better than chance at this size; chance is 0.5"


def test_damage_that_no_arm_shows_alone_may_be_detected_from_all_of_them_together(tmp_path: Path) -> None:
    # Twelve probes each with their headline: a p-value has to be below 0.004 for an arm to have moved.
    def damaged(number: int, shift: float) -> ProgramArm:
        def weigh(passage: Passage) -> float:
            return level(0.5)(passage) + level(shift, 0.25)(Passage(f"{passage.text} of {number}"))

        return ProgramArm(f"damage {number}", weigh, control=True)

    probes = [Weighing(f"p{i}", chance=0.5) for i in range(12)]
    for shift, status in ((-0.06, "signal"), (0.0, "none")):
        made = [ProgramArm("whole", level(0.5)), *(damaged(i, shift) for i in range(6))]
        result = evaluate_arms(made, probes, Size(quick=True), tmp_path / f"{shift}")
        signal = result["probes"][0]["signal"]
        assert (signal["moved"], signal["status"]) == ([], status)
        assert (signal["together"] < 0.05) == (status == "signal")


def test_p_values_are_corrected_for_the_number_of_probes(tmp_path: Path) -> None:
    rows = []
    for number in (1, 10):
        made = [ProgramArm("a", level(0)), ProgramArm("b", lambda p: level(0)(p) + level(0.03, 0.1)(p))]
        result = evaluate_arms(
            made, [Weighing(f"p{i}") for i in range(number)], Size(quick=True), tmp_path / f"o{number}"
        )
        rows.append(row(result, "b"))
    assert rows[0]["p"] == rows[1]["p"] > 0.001
    assert rows[1]["p_corrected"] == pytest.approx(10 * rows[0]["p_corrected"])
    assert (rows[0]["moved"], rows[1]["moved"]) == (True, False)


def test_two_arms_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="all with different names"):
        evaluate_arms([ProgramArm("a", level(0))] * 2, [Weighing()], Size(), tmp_path / "out")


def test_every_kind_of_arm_of_real_checkpoints(
    place: Path, tmp_path: Path, make_direction: Callable[..., Direction], tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    keep_direction(place, make_direction("kindness"))
    other = save_by_letters(tiny_llama, tmp_path / "merged", seed=1)
    profile = tmp_path / "kind.yaml"
    profile.write_text("name: kind\nsliders:\n- {slider: kindness, amount: 2.0, when: {part: reply, after: 1}}\n")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    loads: list[str] = []
    monkeypatch.setattr(arms, "load", lambda place, **more: loads.append(str(place)) or steer.load(place, **more))
    result = steer.evaluate(
        place, against=[other], profiles=[profile], sliders=[{"kindness": 2.0}, {"kindness": 0.0}],
        probes=["capability"], out=tmp_path / "out", quick=True, damage=True, dtype="float32",
    )  # fmt: skip
    names = [a["name"] for a in result["arms"]]
    assert names == ["merged", "kind", "kindness=2", "kindness=0", "kindness -0.3", "merged (2)",
                     "noise 0.03", "noise 0.1", "noise 0.3", "MLPs in 2 bits", "past its context"]  # fmt: skip
    assert loads == [str(place), str(other)] + [str(place)] * 5  # damaged ones are loaded anew, no two at once
    values = {r["arm"]: r["value"] for r in result["probes"][0]["summary"]}
    assert values["kindness=0"] == values["merged"]
    assert len({round(v, 6) for v in values.values()}) == len(names) - 1
    assert values["kind"] != values["kindness=2"]  # its schedule is honoured
    assert result["probes"][0]["signal"]["status"] == "signal"
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert {a["dtype"] for a in result["arms"]} == {"float32"}


def test_a_slider_is_moved_three_times_as_far_as_its_calibrated_range(
    place: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    keep_direction(place, make_direction("kindness"))
    profile = tmp_path / "kind.yaml"
    profile.write_text("name: kind\nsliders:\n- {slider: kindness, amount: 1.0, range: [-2.0, 0.5]}\n")
    run: dict[str, Any] = {"probes": ["capability"], "quick": True, "dtype": "float32"}
    damaged = steer.evaluate(place, profiles=[profile], damage=True, out=tmp_path / "a", **run)
    sliders = steer.evaluate(place, sliders=[{"kindness": -6.0}], out=tmp_path / "b", **run)
    values = {r["arm"]: r["value"] for r in damaged["probes"][0]["summary"]}
    assert values["kindness -6"] == row(sliders, "kindness=-6")["value"]
    assert "kindness -6" in [a["name"] for a in damaged["arms"] if a["control"]]


def test_damage_is_as_large_as_it_says(place: Path) -> None:
    whole, noisy, coarse = (steer.load(place, dtype="float32") for _ in range(3))
    damage.add_noise(noisy, share=0.3)
    damage.round_mlps(coarse, bits=2)
    for name, weight in whole.hf.state_dict().items():
        change = noisy.hf.state_dict()[name] - weight
        if weight.ndim > 1:
            assert float(change.norm() / weight.norm()) == pytest.approx(0.3, rel=0.05)
        else:
            assert not change.any()
        rounded = coarse.hf.state_dict()[name]
        if ".mlp." in name:
            assert all(len(group.unique()) <= 4 for group in rounded.reshape(-1, 16 if weight.shape[1] % 32 else 32))
            assert not torch.equal(rounded, weight)
        else:
            assert torch.equal(rounded, weight)


def test_stretched_positions_are_those_of_tokens_farther_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stretched = (steer.load(place, dtype="float32") for _ in range(2))
    monkeypatch.setattr(damage, "FAR", 16)
    damage.stretch_positions(stretched)
    factor = whole.context // 16
    assert factor > 1
    ids = torch.arange(1, 11)[None]
    apart = whole.hf(ids, position_ids=torch.arange(10)[None] * factor).logits
    assert torch.allclose(stretched.hf(ids).logits, apart, atol=1e-5)
    assert not torch.allclose(whole.hf(ids).logits, apart, atol=1e-3)


def test_a_live_model_is_an_arm_too_and_is_left_as_it_was(
    place: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    keep_direction(place, make_direction("kindness"))
    model = steer.load(place, dtype="float32")
    model.sliders["kindness"] = 5.0
    live = steer.evaluate(model, sliders=[{"kindness": 1}], probes=["capability"], quick=True, out=tmp_path / "live")
    disk = steer.evaluate(place, sliders=[{"kindness": 1}], probes=["capability"], quick=True, out=tmp_path / "disk",
                          dtype="float32")  # fmt: skip
    assert model.sliders["kindness"] == 5.0
    for a, b in zip(live["probes"][0]["summary"], disk["probes"][0]["summary"], strict=True):
        assert a["value"] == pytest.approx(b["value"], abs=1e-6)
    with pytest.raises(UsageError, match="damage: expected a checkpoint on disk"):
        steer.evaluate(model, damage=True, out=tmp_path / "no")


def test_a_run_that_is_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    asked: list[str] = []

    def interrupted(passage: Passage) -> float:
        asked.append(passage.text)
        if len(asked) == 40:
            raise KeyboardInterrupt
        return level(1)(passage)

    def arms() -> list[ProgramArm]:
        return [ProgramArm("a", level(0)), ProgramArm("b", interrupted)]

    with pytest.raises(KeyboardInterrupt):
        evaluate_arms(arms(), [Weighing(), Weighing("other")], Size(), tmp_path / "out")
    assert not (tmp_path / "out" / "eval.json").exists()
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 3
    result = evaluate_arms(arms(), [Weighing(), Weighing("other")], Size(), tmp_path / "out")
    assert len(asked) == 40 + 30
    assert row(result, "b", 1)["items"] == 30


def test_an_arm_that_is_the_same_model_as_another_is_not_asked_and_says_so(tmp_path: Path) -> None:
    first, twin = ProgramArm("whole", level(0)), ProgramArm("twin", level(0))
    twin.key = first.key
    result = evaluate_arms([first, twin], [Weighing()], Size(), tmp_path / "out")
    assert (first.made.asked, twin.made.asked) == (30, 0)
    assert row(result, "twin")["value"] == row(result, "whole")["value"]
    assert [a["about"] for a in result["arms"]] == ["whole", "twin; the same model as whole"]


def test_a_run_that_could_ask_nothing_fails_and_keeps_its_reasons(
    tmp_path: Path, tiny_llama: Callable[..., Path], command: Command
) -> None:
    broken = save_by_letters(tiny_llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({k: torch.full_like(w, math.nan) for k, w in weights.items()}, broken / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    made = command("eval", broken, "--probes", "capability", "--out", tmp_path / "out", "--dtype", "float32", "--json")
    assert made.code == 1
    assert "expected figures of one probe at least, found none" in made.err.splitlines()[-1]
    assert "found NaN" in made.result["probes"][0]["arms"]["broken"]["skipped"]
    assert (tmp_path / "out" / "eval.html").is_file()


def test_in_a_short_context_probes_ask_less_and_say_so(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    names = ["characters", "moralizing", "prose", "capability"]
    limited: dict[int, list[list[str]]] = {}
    for context in (1100, 400, 40):  # tokens are letters
        place = save_by_letters(tiny_llama, tmp_path / f"of {context}", max_position_embeddings=context)
        result = steer.evaluate(place, probes=names, quick=True, out=tmp_path / f"{context}", dtype="float32")
        parts = [part for probe in result["probes"] for part in probe["arms"].values()]
        limited[context] = [[n for n in part["notes"] if f"{context} tokens" in n] for part in parts]
        for part in parts:
            assert part["figures"] or "expected items" in part["skipped"]
    assert limited[1100] == [[], [], [], []]
    assert limited[400] == [["late replies after 4 of 12 messages: the context has 400 tokens"], [], [], []]
    assert [len(notes) for notes in limited[40]] == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    place: Path, tmp_path: Path, make_direction: Callable[..., Direction], forkserver: ForkServerContext
) -> None:
    keep_direction(place, make_direction("kindness"))
    out = tmp_path / "out"
    run = fork(forkserver, _evaluated, place, out)
    while run.is_alive() and len(list(out.glob("parts/*.json"))) < 2:
        time.sleep(0.01)
    run.kill()
    run.join()
    done = {p: p.stat().st_mtime_ns for p in out.glob("parts/*.json")}
    assert done
    assert not (out / "eval.json").exists()
    went_on = _evaluated(place, out)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    whole = _evaluated(place, tmp_path / "whole")
    assert [r["value"] for r in went_on["probes"][0]["summary"]] == [r["value"] for r in whole["probes"][0]["summary"]]


def _evaluated(place: Path, out: Path) -> dict[str, Any]:
    sliders = [{"kindness": amount} for amount in (1.0, 2.0, 3.0)]
    return steer.evaluate(place, sliders=sliders, probes=["capability"], quick=True, out=out)


def test_a_checkpoint_that_cannot_be_loaded_does_not_lose_the_others(
    place: Path, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    broken = save_by_letters(tiny_llama, tmp_path / "broken")
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 9'))
    more: dict[str, Any] = {"probes": ["capability"], "quick": True, "dtype": "float32", "out": tmp_path / "out"}
    result = steer.evaluate(place, against=[broken], **more)
    assert "broken" in result["probes"][0]["arms"]["broken"]["skipped"]
    assert [r["arm"] for r in result["probes"][0]["summary"]] == ["merged"]
    save_by_letters(tiny_llama, broken, seed=3)  # mended, it is asked
    assert steer.evaluate(place, against=[broken], **more)["probes"][0]["arms"]["broken"]["skipped"] is None


def test_another_profile_checkpoint_or_template_is_another_part(
    place: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    keep_direction(place, make_direction("kindness"))
    loader = arms.Loader({})
    source = arms.Source(loader, place)

    def key(amounts: dict[str, float]) -> dict[str, Any]:
        return arms.LocalArm("x", "x", source, arms.edit_of_amounts(amounts)).key

    assert key({"kindness": 1}) == key({"kindness": 1})
    assert key({"kindness": 1}) != key({"kindness": 2})
    assert key({"kindness": 1}) != key({"kindness:cap": 1})
    assert key({"kindness": 0}) == key({})
    before = key({})
    keep_direction(place, make_direction("kindness", seed=9))
    assert key({"kindness": 1})["edit"] != arms.edit_key(None)
    weights = place / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
    try:
        assert arms.LocalArm("x", "x", arms.Source(loader, place)).key != before
    finally:
        weights.write_bytes(bytes(data))


def test_results_of_two_days_join_and_are_refused_where_items_differ(tmp_path: Path) -> None:
    days = [tmp_path / day / "eval.json" for day in ("monday", "friday", "saturday", "sunday")]
    for file, shift, items, seed in zip(days, (0, 0.1, 0, 0), (30, 30, 29, 30), (0, 0, 0, 1), strict=True):
        evaluate_arms([ProgramArm("m", level(shift))], [Weighing(items=items)], Size(seed=seed), file.parent)
    joined = compare(days[:2], tmp_path / "joined")
    assert [a["name"] for a in joined["arms"]] == ["monday: m", "friday: m"]
    assert row(joined, "friday: m")["difference"] == pytest.approx(0.1)
    assert json.loads((tmp_path / "joined" / "eval.json").read_text()) == joined
    with pytest.raises(MismatchError, match="expected the items of weighing"):
        compare([days[0], days[2]])
    with pytest.raises(MismatchError, match="expected seed 0"):
        compare([days[0], days[3]])
    evaluate_arms([ProgramArm("m", level(0))], [Weighing("other")], Size(), tmp_path / "other")
    with pytest.raises(MismatchError, match="expected a probe that"):
        compare([days[0], tmp_path / "other"])
    whole = json.loads(days[0].read_text())
    probe = whole["probes"][0]
    part = probe["arms"]["m"]
    figures = [part["figures"][0] | change for change in ({"value": "0.5"}, {"value": 1e300}, {"n": 10**400})]
    for broken in (
        {"probes": 3}, {"arms": [{}]}, {"arms": []}, {"probes": [{"name": "weighing"}]}, {"seed": "0"}, {"seed": -1},
        {"probes": [probe | {"arms": {}}]}, {"probes": [probe | {"metrics": []}]}, {"arms": [{"name": ["m"]}]},
        *({"probes": [probe | {"arms": {"m": part | {"figures": [f]}}}]} for f in figures),
    ):  # fmt: skip
        days[0].write_text(json.dumps(whole | broken))
        with pytest.raises(SteerError, match=r"monday/eval\.json: expected a result of steer eval, found another") as e:
            compare(days[:2])
        assert "\n" not in str(e.value)
    days[0].write_text("{}")
    with pytest.raises(SteerError, match="steer: expected a value, found none"):
        compare(days[:2])
    for more in (probe["metrics"][0], part["figures"][0], whole):  # of a later version
        more["new"] = 1
    days[0].write_text(json.dumps(whole))
    assert row(compare(days[:2]), "friday: m") == row(joined, "friday: m")


def test_the_command_line(place: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "run"
    made = command("eval", place, "--probes", "capability", "--quick", "--out", out, "--dtype", "float32", "--json")
    assert made.code == 0
    assert made.result == json.loads((out / "eval.json").read_text())
    assert "capability: perplexity" in made.err
    assert "capability" in command("eval", place, "--probes", "capability", "--quick", "--out", out).out
    assert command("eval", "--compare", out / "eval.json", out).code == 0
    for arguments, code, says in [
        ((place, "--out", out, "--quick", "--seed", "3"), 1, "found one with seed 0, not 3"),
        ((place, "--probes", "capability,moods"), 2, "found 'moods'"),
        ((place, "--slider", "kindness"), 2, "expected NAME=AMOUNT"),
        ((place, "--slider", "unheard-of=1"), 2, "unheard-of"),
        ((), 2, "expected a model"),
        ((place, "--compare", out, out), 2, "expected no model beside it"),
        ((tmp_path / "nowhere",), 1, "nowhere"),
        ((place, "--slider", "kindness=1,kindness=2"), 2, "slider 'kindness': expected one amount, found 1 and 2"),
        ((place, "--probes", ""), 2, "found ''"),
        ((place, "--lm-eval", ""), 2, "found ''"),
        ((place, "--seed", "-1"), 2, "seed: expected 0 or more, found -1"),
        ((place, "--model-name", "x"), 2, "expected --url beside them"),
        (("--compare", out, out, "--probes", "capability"), 2, "expected no --probes beside it"),
        (("--url", "http://127.0.0.1:9", "--against", place), 2, "expected no --against beside it"),
        (("--url", "127.0.0.1:9", "--out", tmp_path / "u"), 1, "127.0.0.1:9: expected the address of a server"),
        (("--url", "http://127.0.0.1:9", "--timeout", "nan", "--out", tmp_path / "v"), 2, "found nan"),
    ]:
        refused = command("eval", *arguments)
        assert (refused.code, refused.err.count("\n")) == (code, 1), refused.err
        assert says in refused.err


def test_replies_that_probes_ask_for_in_any_case_are_written_together(tmp_path: Path) -> None:
    asked: list[int] = []

    class Writes(ProgramArm):
        def reader(self) -> Any:
            reader: Any = super().reader()
            reader.abilities = frozenset({"logprobs", "replies"})

            def replies(chats: Sequence[Any], *, tokens: int, seeds: Sequence[int], **_: Any) -> list[str]:
                asked.append(len(chats))
                return [f"{chat[-1][1]} {seed}" for chat, seed in zip(chats, seeds, strict=True)]

            reader.replies = replies
            return reader

    probes = probes_named(["moralizing", "compliance", "prose"])
    result = evaluate_arms([Writes("a", level(0))], probes, Size(quick=True), tmp_path / "out")
    assert asked == [sum(len(p.openings(Size(quick=True))) for p in probes)]
    for probe, found in zip(probes, result["probes"], strict=True):
        first = probe.openings(Size(quick=True))[0]
        assert f"{first.chat[-1][1]} {first.seed}" in found["arms"]["a"]["examples"][0]["answered"]
    asked.clear()
    more = [*probes, *probes_named(["characters"])]
    evaluate_arms([Writes("a", level(0))], more, Size(quick=True), tmp_path / "out")
    assert asked[0] == len(more[-1].openings(Size(quick=True)))  # what is done is not written again
