"""`steer eval`: what a merge, a slider or a bake cost, and what it changed, measured without a judge model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from steer.checkpoint.fetch import resolve
from steer.checkpoint.staging import check_output
from steer.core.profile import Profile
from steer.core.validation import error_line
from steer.errors import CheckpointError, MismatchError, UsageError
from steer.files import read_json_object, without_nan, write_atomic_json
from steer.measure.arms import Loader, LocalArm, Source, damaged_arms, edit_of_amounts, edit_of_profile
from steer.measure.endpoint import EndpointArm
from steer.measure.eval_report import write_eval_report
from steer.measure.evaluation import REPORT, RESULTS, Arm, compared, evaluate_arms
from steer.measure.lm_eval_tasks import tasks_named
from steer.measure.probes.library import probes_named
from steer.measure.probes.probe import Probe, Size
from steer.model.steered import SteeredModel

Say = Callable[[str], None]


def evaluate(
    model: str | Path | SteeredModel,
    *,
    against: Sequence[str | Path] = (),
    profiles: Sequence[Profile | str | Path] = (),
    sliders: Sequence[Mapping[str, float]] = (),
    probes: Sequence[str] | None = None,
    out: str | Path = "eval",
    quick: bool = False,
    seed: int = 0,
    fresh: bool = False,
    damage: bool = False,
    lm_eval: Sequence[str] = (),
    say: Say = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model and what changes it, on the same items; write OUT/eval.json and its report
    OUT/eval.html, and return what the first holds.

        steer.evaluate("merged", sliders=[{"moralizing": -1}], against=["calm"], quick=True)

    `model`: the first arm, which the others are compared with. `against`: other checkpoints. `profiles` and `sliders`:
    the first model under each of them. `probes`: some of the probes, by name. `damage`: also the first model damaged on
    purpose, so that a probe which misses that is reported. `lm_eval`: tasks of EleutherAI's lm-eval, by name or YAML
    file, which lm-eval runs on the same arms. `out`: a new directory, or one of the same run, which then goes on;
    `fresh`: measure again there. `quick`: fewer items. `seed`: of the items and the replies. `say`: called with a line
    when a probe has measured an arm. `options`: as `steer.load` takes them.
    Errors: UsageError for unknown probes and sliders, OutputExistsError if `out` holds another run, those of
    `steer.load`. A probe that fails for one arm is skipped there, with its reason in the result.
    """
    chosen = [*probes_named(probes), *tasks_named(list(lm_eval))]
    loader = Loader(options)
    source = Source(loader, model)
    arms = [LocalArm(source.name, source.name, source)]
    for other in against:
        other_source = Source(loader, other)
        arms.append(LocalArm(other_source.name, other_source.name, other_source))
    loaded = [p if isinstance(p, Profile) else Profile.load(p) for p in profiles]
    for profile in loaded:
        about = f"{source.name} with the profile {profile.name}"
        arms.append(LocalArm(profile.name, about, source, edit_of_profile(profile)))
    for amounts in sliders:
        name = ", ".join(f"{slider}={amount:g}" for slider, amount in amounts.items())
        arms.append(LocalArm(name, f"{source.name} with {name}", source, edit_of_amounts(amounts)))
    if damage:
        if source.place is None:
            raise UsageError("damage: expected a checkpoint on disk, found a model in use; name its directory")
        arms += damaged_arms(source, arms[0], loaded)
    _name_apart(arms)
    # Arms of one checkpoint stand side by side, so that it is loaded once; damaged ones come last.
    order = {id(s): i for i, s in enumerate(dict.fromkeys(arm.source for arm in arms))}
    arms.sort(key=lambda arm: (arm.damage is not None, order[id(arm.source)]))
    _ = [arm.edit for arm in arms]  # a slider that is not known is refused before hours are spent
    return _measure(arms, chosen, Size(quick, seed), Path(out), fresh, say)


def evaluate_endpoint(
    url: str,
    *,
    name: str = "",
    tokenizer: str | Path | None = None,
    probes: Sequence[str] | None = None,
    out: str | Path = "eval",
    quick: bool = False,
    seed: int = 0,
    fresh: bool = False,
    api_key: str | None = None,
    timeout: float = 120.0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure a model behind an OpenAI-compatible server, as `evaluate` does; the probes that it cannot be asked are
    skipped with the reason.

        evaluate_endpoint("http://127.0.0.1:8321", tokenizer="merged", quick=True)

    `name`: one of its models, by default the first. `tokenizer`: the checkpoint on this machine that it serves, whose
    tokenizer and chat template are used and whose weights are not. `timeout`: seconds for one answer.
    Errors: as `evaluate`; UnreachableError if nothing answers, or no longer. The same call then goes on.
    """
    chosen, place = probes_named(probes), None if tokenizer is None else resolve(tokenizer)
    arm = EndpointArm(url, name, place, api_key, timeout)
    return _measure([arm], chosen, Size(quick, seed), Path(out), fresh, say)


def _measure(
    arms: Sequence[Arm], probes: Sequence[Probe], size: Size, out: Path, fresh: bool, say: Say
) -> dict[str, Any]:
    """Evaluate arms, write the report beside eval.json, and return what that holds."""
    result = evaluate_arms(arms, probes, size, out, fresh=fresh, say=say)
    write_eval_report(result, out / REPORT)
    return result


def compare(files: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Join runs that were made on different days into one result: their arms beside each other, the first file's first
    arm as the reference. Arms are named by their file. `out`: a directory to write eval.json
    and its report into.

    Errors: MismatchError where a probe's items differ, or no probe is in every file; CheckpointError for a file that is
    no result of steer eval.
    """
    if len(files) < 2:
        raise UsageError(f"--compare: expected at least two results, found {len(files)}; name another eval.json")
    runs = [(Path(f), _result(Path(f))) for f in files]
    (first_file, first), *rest = runs
    for file, run in rest:
        for key in ("seed", "quick"):
            if run[key] != first[key]:
                raise MismatchError(f"{file}: expected {key} {first[key]}, as in {first_file}, found {run[key]}; "
                                    "run both with the same options")  # fmt: skip
    labels = [_label(file) for file, _ in runs]
    if len(set(labels)) < len(labels):
        labels = [str(file) for file, _ in runs]
    names = [[f"{label}: {arm['name']}" for arm in run["arms"]] for label, (_, run) in zip(labels, runs, strict=True)]
    joined = []
    for probe in first["probes"]:
        same = [next((p for p in run["probes"] if p["name"] == probe["name"]), None) for _, run in runs]
        found = [p for p in same if p is not None]
        if len(found) < len(runs):
            continue
        for (file, _), other in zip(runs, found, strict=True):
            if other["sha256"] != probe["sha256"]:
                raise MismatchError(f"{file}: expected the items of {probe['name']} as in {first_file}, found others; "
                                    "run both with the same version of steer")  # fmt: skip
        parts = {
            f"{label}: {name}": part for label, p in zip(labels, found, strict=True) for name, part in p["arms"].items()
        }
        joined.append({k: probe[k] for k in ("name", "says", "n", "sha256", "metrics") if k in probe} | {"arms": parts})
    if not joined:
        raise MismatchError(f"{rest[0][0]}: expected a probe that {first_file} has too, found none; run the same ones")
    arms = [
        arm | {"name": name}
        for (_, run), arm_names in zip(runs, names, strict=True)
        for arm, name in zip(run["arms"], arm_names, strict=True)
    ]
    controls = [arm["name"] for arm in arms if arm.get("control")]
    result = without_nan({
        **{k: first[k] for k in ("steer", "seed", "quick", "model")},
        "arms": arms,
        "probes": compared(joined, [arm["name"] for arm in arms], controls, first["seed"]),
    })  # fmt: skip
    if out is not None:
        place = Path(out)
        check_output(place)
        write_atomic_json(place / RESULTS, result)
        write_eval_report(result, place / REPORT)
    return result


_Number = Annotated[float, Field(ge=-1e30, le=1e30)]
_Whole = Annotated[int, Field(ge=-(10**9), le=10**9)]


class _Figure(BaseModel, strict=True):
    metric: str
    item: str
    value: _Number | None
    group: str = ""
    n: _Whole | _Number | None = None
    turn: _Whole | None = None


class _Metric(BaseModel, strict=True):
    name: str
    better: Literal["higher", "lower", "neither"]
    label: str
    chance: _Number | None = None
    exponent: bool = False


class _Example(BaseModel, strict=True):
    item: str
    asked: str
    right: str
    answered: str


class _Part(BaseModel, strict=True):
    figures: list[_Figure]
    examples: list[_Example]
    notes: list[str]
    skipped: str | None
    seconds: _Number = 0.0
    dtype: str | None = None


class _Probe(BaseModel, strict=True):
    name: str
    says: str
    sha256: str
    metrics: list[_Metric] = Field(min_length=1)
    arms: dict[str, _Part]
    n: str | None = None


class _Arm(BaseModel, strict=True):
    name: str
    about: str = ""
    dtype: str | None = None
    control: bool = False


class _Result(BaseModel, strict=True):
    """What is used of an eval.json, which may come from anybody."""

    steer: str
    seed: int = Field(ge=0)
    quick: bool
    model: str
    arms: list[_Arm] = Field(min_length=1)
    probes: list[_Probe]

    @model_validator(mode="after")
    def _every_arm_was_asked(self) -> _Result:
        for probe in self.probes:
            if missing := [a.name for a in self.arms if a.name not in probe.arms]:
                raise ValueError(f"probes: {probe.name}: expected a part of {missing[0]!r}, found none")
        return self


def _result(file: Path) -> dict[str, Any]:
    file = file / RESULTS if file.is_dir() else file
    result = read_json_object(file, what="a result of steer eval", do="name an eval.json")
    try:
        return _Result.model_validate_json(json.dumps(result)).model_dump()
    except ValidationError as e:
        raise CheckpointError(
            f"{file}: expected a result of steer eval, found another ({error_line(e)}); measure again"
        ) from e


def _label(file: Path) -> str:
    return file.resolve().parent.name if file.name == RESULTS else file.stem


def _name_apart(arms: Sequence[Arm]) -> None:
    """Number arms that have the name of an earlier one."""
    taken: set[str] = set()
    for arm in arms:
        base, numbers = arm.name, count(2)
        while arm.name in taken:
            arm.name = f"{base} ({next(numbers)})"
        taken.add(arm.name)
