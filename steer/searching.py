"""`steer bake --search`: a trait's name -> the gentlest edit that works -> a checkpoint, measured on its files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from steer.baking import checkpoint_dir, write
from steer.errors import MismatchError, SteerError, StoppedError, UsageError
from steer.features.contrast import Contrast
from steer.files import read_json_object, write_atomic
from steer.finding import contrast_for, find_trait
from steer.live.dtypes import computing_in, dtype_name
from steer.live.library import directions_of, own_place
from steer.live.model import SteeredModel, load
from steer.measure.scorer import Scorer
from steer.measure.search.choice import Choice, Goal, told
from steer.measure.search.held_out import HeldOut, compared, load_exported
from steer.measure.search.report import write_search_report
from steer.measure.search.space import VERSION, Space
from steer.measure.search.study import BATCH, STUDY, Study, locked
from steer.measure.search.trials import Bench, Scope
from steer.neutral import neutral_for
from steer.progress import bar, byte_bar
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.lists import as_list
from steer.values.trait import Trait
from steer.weights.bakeable import Form
from steer.weights.certify import CERTIFICATE, Certificate
from steer.weights.plan import Plan
from steer.weights.quantised import dequantised
from steer.weights.sketch import Sketch, sketch_files
from steer.weights.staging import check_output
from steer.weights.stream import CheckpointFiles

TRIALS = 48
"""Edits tried, where the user does not say."""
RESULT = "search.json"
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Searched:
    """A search and the bake that came of it."""

    certificate: Certificate
    folder: Path
    """Where the study, the plot and everything measured are."""
    result: dict[str, Any]
    """What search.json holds."""


@dataclass(frozen=True, eq=False)
class _Search:
    """What one search is about."""

    place: Path
    sketch: Sketch
    dtype: str
    """What the model computes in."""
    trait: Trait
    keep: tuple[Trait, ...]
    form: Form
    folder: Path
    seed: int
    scope: Scope

    @property
    def about(self) -> dict[str, Any]:
        """What its study must agree with."""
        return {
            "checkpoint": self.sketch.to_header(),
            "dtype": self.dtype,
            "trait": _digest(self.trait),
            "traits that are to stay": {t.name: _digest(t) for t in self.keep},
            "form": self.form,
            "scope": asdict(self.scope),
            "space": [VERSION, BATCH],
            "seed": self.seed,
        }

    @property
    def name(self) -> str:
        """For messages."""
        kept = "".join(f", keeping {t.name}" for t in self.keep)
        return f"{self.trait.name} on {self.place}{kept}, seed {self.seed}, as {self.form}"

    @cached_property
    def files(self) -> CheckpointFiles:
        """Of the checkpoint, as they are edited."""
        return dequantised(CheckpointFiles.open(self.place))

    def contrast(self, model: SteeredModel, trait: Trait, like: Contrast | None = None) -> Contrast:
        """The replies that a scorer is trained on, written once."""
        file = self.folder / f"replies-{trait.name}.json"
        if file.is_file():
            return Contrast.from_json(trait, _read(file))
        made = contrast_for(model, trait, seed=self.seed, neutral=like.neutral if like else None)
        _write(file, made.as_json())
        return made

    def direction(self, model: SteeredModel, contrast: Contrast) -> Direction:
        """The direction that `steer bake --ablate` would take; found and kept by name where there is none yet.

        Errors: MismatchError when it is another one than the study has.
        """
        file = self.folder / f"{self.trait.name}.safetensors"
        ours = directions_of(self.sketch).get(self.trait.name)
        if file.is_file():
            theirs = Direction.load(file)
            if ours is not None and (ours.site != theirs.site or not bool((ours.vector == theirs.vector).all())):
                raise MismatchError(
                    f"{self.folder}: expected the study of direction {ours.name!r} at site {ours.site}, as it is now, "
                    f"found that of another one, at site {theirs.site}; remove it, or name another --search-dir"
                )
            return theirs
        if ours is None:
            ours = find_trait(model, self.trait, seed=self.seed, contrast=contrast).direction
            ours.save(own_place(self.sketch, ours.name))
        ours.save(file)
        return ours

    def fits(self, edit: Edit) -> bool:
        """Whether what is baked can hold an edit."""
        try:
            if self.form == "adapter":
                from steer.weights.adapter import AdapterPlan

                AdapterPlan.of(self.place, edit)
            else:
                Plan.of(self.files, edit)
        except SteerError:
            return False
        return True


def search_bake(
    source: str | Path,
    out: str | Path,
    trait: str,
    *,
    keep: str | Sequence[str] = (),
    form: Form = "checkpoint",
    trials: int = TRIALS,
    goal: Goal | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    scope: Scope | None = None,
    command: str | None = None,
    say: Say = lambda line: None,
) -> Searched:
    """Look for the edit that takes a trait out at the least cost, bake it, and measure what was written.

    Edits are tried on the live model as hooks, on fit topics alone. The study is in `folder`, by default OUT-search
    beside `out`; a search that was stopped goes on from there, and one with more `trials` adds to it. Then `out` is
    measured on held-out topics beside the unsearched bake, which is written into `folder` for that and removed.

    Errors: those of `steer.baking.bake`; MismatchError for a folder with a study of something else; SteerError when
    every edit moves a trait of `keep`; StoppedError on Ctrl-C.
    """
    out = Path(out)
    search = _begin(source, out, trait, as_list(keep), form, folder, seed, scope or Scope())
    if trials < 1:
        raise UsageError(f"--trials: expected at least 1, found {trials}")
    if not ((search.folder / STUDY).is_file() and (out / CERTIFICATE).is_file()):
        check_output(out)  # a search that was stopped while it measured what it had written goes on
    with locked(search.folder):
        study = Study(search.folder / STUDY, search.about, search.name)
        try:
            return _run(search, study, out, trials, goal or Goal(), command, say)
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped; {study.count} of {trials} trials are kept in {search.folder}: the same command goes on",
                130,
            ) from None


def _begin(
    source: str | Path,
    out: Path,
    trait: str,
    keep: Sequence[str],
    form: Form,
    folder: str | Path | None,
    seed: int,
    scope: Scope,
) -> _Search:
    for name in (trait, *keep):
        if name.endswith((".safetensors", ".gguf")):
            raise UsageError(f"--search: expected a trait, which has topics to search on, found the file {name}")
    if form == "gguf":
        raise UsageError(
            "--search: expected --as checkpoint or adapter, found gguf: a control vector ablates nothing; bake it with "
            f"--add {trait}=AMOUNT"
        )
    loaded = Trait.load(trait)
    kept = tuple(Trait.load(name) for name in keep)
    if twice := [t.name for i, t in enumerate(kept) if t.name in {loaded.name, *(k.name for k in kept[:i])}]:
        raise UsageError(f"--keep: expected traits beside {loaded.name}, each once, found {twice[0]} again")
    place = checkpoint_dir(source)
    where = Path(folder) if folder else out.with_name(f"{out.name}-search")
    dtype = dtype_name(computing_in(str(place)).dtype)
    return _Search(place, sketch_files(place), dtype, loaded, kept, form, where, seed, scope)


def _run(search: _Search, study: Study, out: Path, trials: int, goal: Goal, command: str | None, say: Say) -> Searched:
    model = load(search.place)
    contrast = search.contrast(model, search.trait)
    direction = search.direction(model, contrast)
    scorer = Scorer.train(contrast)
    kept = {t.name: Scorer.train(search.contrast(model, t, contrast)) for t in search.keep}
    space = Space.of(direction, model, neutral_for(search.place, search.sketch, model=model), search.form)
    bench = Bench(model, scorer, kept, contrast.neutral, search.scope)

    with bar("trials", bench.tokens(max(0, trials - study.count)), "tokens") as advance:
        begun = 0

        def on_tokens(count: int) -> None:
            nonlocal begun
            begun += count
            advance(count)

        def on_batch(count: int) -> None:
            nonlocal begun
            advance(bench.tokens(count) - begun)  # replies may end early
            begun = 0

        bench.on_tokens = on_tokens
        study.run(bench, space, goal, trials, seed=search.seed, fits=search.fits, on_batch=on_batch)
    with bar("the best on more topics", None, "tokens") as advance:
        bench.on_tokens = advance
        choice = study.choose(bench, space, goal)
    untouched = study.untouched
    assert untouched is not None
    result: dict[str, Any] = {
        "trait": search.trait.name,
        "keep": [t.name for t in search.keep],
        "scorers": {s.trait.name: {"auroc": s.auroc} for s in (scorer, *kept.values())},
        "scope": asdict(search.scope),
        **told(study.trials(space), untouched, choice, goal),
    }
    say(_said(choice, study.count))
    write_search_report(result, search.folder)
    certificate = _baked(search, out, choice.trial.edit, command, say)

    with bar("measuring", None, "tokens") as advance:
        held_out = HeldOut(model, scorer, kept, tokens=search.scope.tokens, on_tokens=advance)
        samples = [held_out.measure(model)]
        del model, bench  # one checkpoint at a time
        plain = space.edit(space.unsearched)
        assert plain is not None
        beside = search.folder / "unsearched"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            write(search.place, beside, plain, search.form)
            samples.append(held_out.measure(load_exported(beside, search.place)))
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        samples.append(held_out.measure(load_exported(out, search.place)))
    result["held_out"] = compared(*samples)
    _write(search.folder / RESULT, result)
    write_search_report(result, search.folder)
    return Searched(certificate, search.folder, result)


def _baked(search: _Search, out: Path, edit: Edit, command: str | None, say: Say) -> Certificate:
    """Write the bake, unless an earlier run of the same search did so before it was stopped."""
    if (out / CERTIFICATE).is_file():
        with suppress(SteerError):
            cert = Certificate.load(out)
            if (cert.edit, cert.form) == (json.loads(json.dumps(edit.describe())), search.form):
                return cert
    with byte_bar("baking") as progress:
        return write(search.place, out, edit, search.form, command, say, progress)


def _said(choice: Choice, trials: int) -> str:
    o = choice.trial.outcome
    missed = "" if choice.reached else "; the goal was reached by none, this is the nearest"
    return (
        f"chosen of {trials} trials: {choice.trial.label} (fit topics: rate {o.rate:.2f}, KL {o.kl:.3f} nats per token)"
        f"{missed}"
    )


def _digest(trait: Trait) -> str:
    return hashlib.sha256(json.dumps(asdict(trait), sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file, what="what a search kept", do="remove it", error=SteerError)


def _write(file: Path, value: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(value, indent=1) + "\n")
