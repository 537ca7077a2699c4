"""`steer bake --search`: find the gentlest edit that removes a trait, bake it, and measure the written files.

`search_bake` runs the whole search; the parts are in `steer.measure.search` (study, trials, choice, held-out figures).
"""

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

from steer.baking.bake import PLANS, bake
from steer.baking.certificate import CERTIFICATE, Certificate, Form
from steer.checkpoint.dtypes import computing_in, dtype_name
from steer.checkpoint.library import direction_place, directions_of
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.sketch import Sketch, sketch_files
from steer.checkpoint.staging import check_output
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.lists import as_list
from steer.core.trait import Trait
from steer.errors import MismatchError, SteerError, StoppedError, UsageError
from steer.files import locked, read_json_object, write_atomic_json
from steer.finding.traits import contrast_for, find_trait
from steer.measure.contrast import Contrast
from steer.measure.neutral_means import neutral_for
from steer.measure.report import write_search_report
from steer.measure.scorer import Scorer
from steer.measure.search.held_out import HeldOut, compared, load_exported
from steer.measure.search.space import VERSION, Space
from steer.measure.search.study import BATCH, STUDY, Study
from steer.measure.search.trials import Bench, Goal, Scope, search_json
from steer.model.steered import SteeredModel, load
from steer.progress import bar, byte_bar
from steer.verbs.bake import check_mtp_of, checkpoint_dir

TRIALS = 48
"""Default number of edits that a search tries."""
RESULT = "search.json"
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Searched:
    """A finished search and its bake."""

    certificate: Certificate
    folder: Path
    """Directory with the study, the plot and all measurements."""
    result: dict[str, Any]
    """The content of search.json."""


@dataclass(frozen=True, eq=False)
class _Search:
    """The inputs of one search."""

    place: Path
    sketch: Sketch
    dtype: str
    """Name of the dtype in which the model computes."""
    trait: Trait
    keep: Sequence[Trait]
    form: Form
    folder: Path
    seed: int
    scope: Scope
    edit_mtp: bool

    @property
    def about(self) -> dict[str, Any]:
        """Everything that must be the same for a stopped study to go on."""
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

    @cached_property
    def _files(self) -> CheckpointFiles:
        return dequantised(CheckpointFiles.open(self.place))

    @property
    def name(self) -> str:
        """The search in a few words, for messages."""
        kept = "".join(f", keeping {t.name}" for t in self.keep)
        return f"{self.trait.name} on {self.place}{kept}, seed {self.seed}, as {self.form}"

    def contrast(self, model: SteeredModel, trait: Trait, like: Contrast | None = None) -> Contrast:
        """Return the replies that a trait's scorer is trained on. They are saved and read again by a later run."""
        file = self.folder / f"replies-{trait.name}.json"
        if file.is_file():
            replies = read_json_object(file, what="what a search kept", do="remove it", error=SteerError)
            return Contrast.from_json(trait, replies)
        made = contrast_for(model, trait, seed=self.seed, neutral=like.neutral if like else None)
        write_atomic_json(file, made.as_json())
        return made

    def direction(self, model: SteeredModel, contrast: Contrast) -> Direction:
        """Return the direction that `steer bake --ablate` would use. If there is none yet, it is found and saved.

        Errors: MismatchError if it differs from the direction of the study.
        """
        file = self.folder / f"{self.trait.name}.safetensors"
        now = directions_of(self.sketch).get(self.trait.name)
        if file.is_file():
            old = Direction.load(file)
            if now is not None and (now.site != old.site or not bool((now.vector == old.vector).all())):
                raise MismatchError(
                    f"{self.folder}: expected the study of direction {now.name!r} at site {now.site}, as it is now, "
                    f"found that of another one, at site {old.site}; remove it, or name another --search-dir"
                )
            return old
        if now is None:
            now = find_trait(model, self.trait, seed=self.seed, contrast=contrast).direction
            now.save(direction_place(self.sketch, now.name))
        now.save(file)
        return now

    def fits(self, edit: Edit) -> bool:
        """Return whether the form of the bake can hold an edit."""
        try:
            PLANS[self.form](self._files, edit)
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
    edit_mtp: bool = False,
    command: str | None = None,
    say: Say = lambda line: None,
) -> Searched:
    """Search the edit that removes a trait at the least cost, bake it, and measure the written files.

    Edits are tried on the live model as hooks, on fit topics only. The study is in `folder`, by default OUT-search
    beside `out`. A stopped search goes on from there, and a call with more `trials` adds to it. Then `out` is measured
    on held-out topics beside the unsearched bake, which is written into `folder` for that and removed afterwards.

    `trait`: the trait to remove. `keep`: traits whose rate must not change. `form`: `checkpoint` or `adapter`. `goal`:
    the rate to reach and the cost allowed. `scope`: how much text each trial uses. `edit_mtp`, `command`, `say`: as in
    `bake`; layers for multi-token prediction do not run in the trials.

    Errors: those of `steer.verbs.bake.bake`; MismatchError for a folder with another study; SteerError if every edit
    moves a trait of `keep`; StoppedError on Ctrl-C.

        found = search_bake("merged", "calm", "moralizing", keep="compliance")
        print(found.result["held_out"]["searched"]["rate"])
    """
    out, keep = Path(out), as_list(keep)
    for name in (trait, *keep):
        if name.endswith((".safetensors", ".gguf")):
            raise UsageError(f"--search: expected a trait, which has topics to search on, found the file {name}")
    if form == "gguf":
        raise UsageError(
            "--search: expected --as checkpoint or adapter, found gguf, which holds few of the edits that are tried; "
            f"bake it with --ablate {trait} or --add {trait}=AMOUNT"
        )
    if trials < 1:
        raise UsageError(f"--trials: expected at least 1, found {trials}")
    removed, *staying = traits = [Trait.load(name) for name in (trait, *keep)]
    names = [t.name for t in traits]
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise UsageError(f"--keep: expected traits beside {removed.name}, each once, found {repeated[0]} again")
    place = checkpoint_dir(source)
    if edit_mtp:
        check_mtp_of(place, form)
    dtype = dtype_name(computing_in(str(place)).dtype)
    folder = Path(folder) if folder else out.with_name(f"{out.name}-search")
    sketch, scope = sketch_files(place), scope or Scope()
    search = _Search(place, sketch, dtype, removed, staying, form, folder, seed, scope, edit_mtp)
    if not ((folder / STUDY).is_file() and (out / CERTIFICATE).is_file()):
        check_output(out)  # not checked for a search that was stopped after writing `out`: it measures it and ends
    with locked(folder, "another search is at work in it; wait, or name another --search-dir"):
        study = Study(folder / STUDY, search.about, search.name)
        try:
            return _run(search, study, out, trials, goal or Goal(), command, say)
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped; {study.count} of {trials} trials are kept in {folder}: the same command goes on", 130
            ) from None


def _run(search: _Search, study: Study, out: Path, trials: int, goal: Goal, command: str | None, say: Say) -> Searched:
    model = load(search.place)
    contrast = search.contrast(model, search.trait)
    direction = search.direction(model, contrast)
    scorer = Scorer.train(contrast)
    kept_scorers = {t.name: Scorer.train(search.contrast(model, t, contrast)) for t in search.keep}
    space = Space.of(direction, model, neutral_for(search.place, search.sketch, model=model), search.form)
    bench = Bench(model, scorer, kept_scorers, contrast.neutral, search.scope)

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
        "scorers": {s.trait.name: {"auroc": s.auroc} for s in (scorer, *kept_scorers.values())},
        "scope": asdict(search.scope),
        **search_json(study.trials(space), untouched, choice, goal),
    }
    chosen, missed = choice.trial, "" if choice.reached else "; the goal was reached by none, this is the nearest"
    say(
        f"chosen of {study.count} trials: {chosen.label} (fit topics: rate {chosen.outcome.rate:.2f}, "
        f"KL {chosen.outcome.kl:.3f} nats per token){missed}"
    )
    write_search_report(result, search.folder)
    certificate = _baked(search, out, chosen.edit, command, say)

    with bar("measuring", None, "tokens") as advance:
        held_out = HeldOut(model, scorer, kept_scorers, tokens=search.scope.tokens, on_tokens=advance)
        samples = [held_out.measure(model)]
        del model, bench  # one checkpoint at a time
        plain = space.edit(space.unsearched)
        assert plain is not None
        unsearched_dir = search.folder / "unsearched"
        shutil.rmtree(unsearched_dir, ignore_errors=True)
        try:
            bake(search.place, unsearched_dir, plain, search.form)
            samples.append(held_out.measure(load_exported(unsearched_dir, search.place)))
        finally:
            shutil.rmtree(unsearched_dir, ignore_errors=True)
        samples.append(held_out.measure(load_exported(out, search.place)))
    result["held_out"] = compared(*samples)
    write_atomic_json(search.folder / RESULT, result)
    write_search_report(result, search.folder)
    return Searched(certificate, search.folder, result)


def _baked(search: _Search, out: Path, edit: Edit, command: str | None, say: Say) -> Certificate:
    """Write the bake, unless an earlier, stopped run of the same search has written it."""
    edit_mtp = search.edit_mtp and bool(edit.ablate)  # the choice may be an add alone, which concerns no such layer
    if (out / CERTIFICATE).is_file():
        with suppress(SteerError):
            cert = Certificate.load(out)
            about = (json.loads(json.dumps(edit.describe())), search.form, edit_mtp)
            if (cert.edit, cert.form, cert.edit_mtp) == about:
                return cert
    with byte_bar("baking") as progress:
        return bake(
            search.place, out, edit, search.form, edit_mtp=edit_mtp, command=command, say=say, progress=progress
        )


def _digest(trait: Trait) -> str:
    return hashlib.sha256(json.dumps(asdict(trait), sort_keys=True).encode()).hexdigest()[:16]
