"""`steer demo`: the whole pipeline on the default model or the user's own, measured on text that it was not fitted on.

`run` fetches, merges, finds two traits, searches an edit, bakes, verifies, measures, evaluates what the slider and the
bake cost, and writes the report.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.baking.certificate import CERTIFICATE, source_name, utf8
from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.fetch import DEFAULT_MODEL, fetch, resolve
from steer.checkpoint.merge import MANIFEST as MERGE_MANIFEST
from steer.checkpoint.merge import input_hashes, is_merge_of, merge, read_recipe
from steer.checkpoint.shipped import RECIPE, present
from steer.checkpoint.staging import hash_file
from steer.core.trait import NeutralPrompts
from steer.core.version import __version__
from steer.errors import OutputExistsError, TraitNotFoundError, UsageError
from steer.files import names_in, read_json_object, write_atomic_json
from steer.progress import bar, byte_bar

TRAITS = ("moralizing", "compliance")
NEUTRAL_PROMPTS = 28
"""Number of held-out neutral prompts on which KL is measured."""
SEARCH_TOPICS = 16
"""Fit topics that are answered under every tried edit."""
SEARCH_SHARE = 0.3
"""Share of the untouched rate that the edit must get below on fit topics; on other topics the share may be higher."""
SEARCH_KL = 0.14
"""Most KL, in nats per token on neutral replies, that the bake may cost; on held-out text it may be a little more."""
SLID = -1.0
"""Amount of the first trait's slider in the evaluation, which compares it with the bake."""
PROBES: tuple[str, ...] | None = None
"""Probes of the evaluation; None for all."""
RESULTS = "results.json"
MODEL = "model.json"
"""File in the output that names the user's own model; the demo of the default model has none."""


def run(
    out: Path,
    model: str | None = None,
    *,
    seed: int = 0,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Fetch, merge, find both traits, measure their dose response, bake, verify, measure and evaluate the bake, and
    report.

    `model`: a checkpoint directory or hub id, which is not merged, or a mergekit recipe in place of the default one.
    Returns what `--json` prints. A second call with the same inputs returns the saved numbers, unless `fresh`. `seed`:
    of every reply. `say`: called with a line for each step.
    Errors: SteerError if the recipe of the default merge is not installed, CheckpointError for a model that is not
    there, OutputExistsError if `out` holds the demo of another model, TraitNotFoundError if the model shows no trait.
    """
    subject, out = _Subject.of(model), out.resolve()
    _check_out(out, subject)
    key = _key(seed, subject)
    done = out / RESULTS
    if not fresh and done.is_file():
        result = read_json_object(done, do="run it with --fresh")
        if result.get("key") == key and all(
            Path(place).exists() for place in (*(result[p] for p in _WRITTEN), result["eval"]["report"])
        ):
            return result
    out.mkdir(parents=True, exist_ok=True)
    if subject.model:
        write_atomic_json(out / MODEL, {"model": subject.model})
    done.unlink(missing_ok=True)
    result = _measure(out, subject, seed, fresh, say)
    write_atomic_json(done, {"key": key, **result})
    return json.loads(done.read_text())


@dataclass(frozen=True)
class _Subject:
    """The model of a demo."""

    name: str
    """For people, without this machine's paths."""
    about: str
    """What the report calls the model."""
    recipe: Path | None
    """The recipe that makes the checkpoint; None for one that exists."""
    place: Path | None = None
    """The directory of a checkpoint that exists."""
    model: str | None = None
    """The user's model as an absolute path or a hub id; None for the default one."""

    @classmethod
    def of(cls, model: str | None) -> _Subject:
        """Find the model that `--model` names. Nothing of the default model is downloaded yet."""
        if model is None:
            return cls(DEFAULT_MODEL, f"Default merge of {DEFAULT_MODEL}", present(RECIPE))
        path = Path(model).expanduser()
        absolute = utf8(str(path.resolve()))
        if path.suffix in (".yml", ".yaml") and not path.is_dir():
            read_recipe(path)
            return cls(utf8(path.name), f"Merge by the recipe {utf8(path.name)}", path, model=absolute)
        place = fetch(resolve(model))
        name = source_name(place)
        return cls(name, f"Checkpoint {name}", None, place, absolute if path.is_dir() else model)

    @property
    def command(self) -> str:
        """The command line, for the report, the card and the certificate."""
        return shlex.join(["steer", "demo", *(["--model", self.name] if self.model else [])])

    def inputs(self) -> dict[str, Any]:
        """Hashes of the files of the user's model."""
        if self.place:
            files = [p for p in sorted(self.place.iterdir()) if p.is_file() and not p.name.startswith(".")]
            return {utf8(p.name): hash_file(p) for p in files}
        return input_hashes(self.recipe) if self.recipe and self.model else {}


def _check_out(out: Path, subject: _Subject) -> None:
    """Raise unless a demo of this model may write into `out`: the files of another one would be lost."""
    if subject.place and out.is_relative_to(subject.place.resolve()):
        raise UsageError(f"--out: expected a directory outside the model, found {out}; name another")
    mark, other = out / MODEL, None
    if mark.is_file():
        other = read_json_object(mark, do="name another --out").get("model")
        if other == subject.model:
            return
    elif subject.model is None or not out.is_dir() or not names_in(out):
        return
    raise OutputExistsError(
        f"{out}: expected a new directory or the demo of {subject.model or 'the default model'}, found "
        f"{f'the demo of {other}' if other else 'other files'}; name another --out"
    )


def _key(seed: int, subject: _Subject) -> dict[str, Any]:
    """Return everything that the numbers depend on: the package's code and texts, model, dtype, template, seed."""
    package = Path(__file__).parents[1]
    files = [p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".txt")]
    files += [RECIPE, *RECIPE.parent.glob("tunes/*/adapter_model.safetensors")]
    return {
        "version": __version__,
        "seed": seed,
        "dtype": os.environ.get("STEER_DTYPE") or "auto",
        "chat_template": chosen_template(None),
        "inputs": subject.inputs(),
        "files": {str(p.relative_to(package.parent)): hash_file(p)[:16] for p in sorted(files)},
    }


_WRITTEN = ("source", "baked", "report")
"""Keys of the result under which the paths of the demo's output are."""


def _clear(directory: Path, marker: str) -> None:
    """Remove a directory that an earlier run wrote, known by its file `marker`. `check_output` refuses any other."""
    if (directory / marker).is_file():
        shutil.rmtree(directory)


def _measure(out: Path, subject: _Subject, seed: int, fresh: bool, say: Callable[[str], None]) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, line: str | None = None) -> Iterator[None]:
        """Say `line`, and add the wall time of the block to `seconds`."""
        if line:
            say(line)
        start = time.perf_counter()
        yield
        release_memory()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    with step("import"):
        import torch

        from steer.baking.bake import bake
        from steer.baking.checkpoint import CheckpointPlan
        from steer.baking.verify import verify
        from steer.checkpoint.dtypes import dtype_name
        from steer.checkpoint.library import direction_place
        from steer.core.direction import Direction
        from steer.core.edit import Edit
        from steer.finding.traits import find_trait
        from steer.measure import harness
        from steer.measure.eval_report import verdicts
        from steer.measure.evaluation import REPORT
        from steer.measure.neutral_means import means_of
        from steer.measure.report import write_report
        from steer.measure.search.space import Space
        from steer.measure.search.study import BATCH, Study
        from steer.measure.search.trials import Bench, Goal, Scope, search_json
        from steer.model.loading import release_memory
        from steer.model.steered import load
        from steer.verbs.eval import evaluate

    source, baked_dir = subject.place or out / "merged", out / "baked"
    if subject.model is None:
        with step("fetch", "fetching the default model"):
            fetch(DEFAULT_MODEL)
    if recipe := subject.recipe:
        with step("merge", f"merging by {subject.name}" if subject.model else "merging its tunes"):
            if not is_merge_of(source, recipe):
                _clear(source, MERGE_MANIFEST)
                merge(recipe, source)
    with step("load", f"loading {subject.name}" if subject.place else None):
        model = load(source)
        sketch = model.sketch()
        # A checkpoint whose tensors cannot be edited is refused now, and not after all that was measured.
        CheckpointPlan(source, Edit((Direction("probe", 0, torch.eye(model.anatomy.width)[0]),)))

    found, missing, ordinary = {}, {}, None
    for name in TRAITS:
        with step(f"find {name}", f"finding {name}"):
            try:
                this = find_trait(model, name, seed=seed, neutral=ordinary)
                this.check()
            except TraitNotFoundError as e:
                missing[name] = str(e)
                say(f"{name} is left out: {e}")
                continue
            found[name], ordinary = this, this.candidates.contrast.neutral
            this.direction.save(direction_place(sketch, name))
            this.direction.save(out / "directions" / f"{name}.safetensors")
    if not found:
        raise TraitNotFoundError(f"{subject.name}: found none of the traits; {'; '.join(missing.values())}")

    with step("dose response"), bar("neutral replies", None, "tokens") as advance:
        prompts = NeutralPrompts.load().held_out[:NEUTRAL_PROMPTS]
        reference = harness.Reference.of(model, harness.neutral_replies(model, prompts, on_tokens=advance))
    doses = {}
    for name, f in found.items():
        topics = f.scorer.trait.held_out
        settings = harness.dose_settings(f.direction) + harness.control_settings(f.direction, f.scorer.trait, seed)
        with (
            step("dose response", f"dose response of {name} on held-out topics"),
            bar(f"{name}: dose response", None, "tokens") as advance,
        ):
            doses[name] = harness.measure_settings(model, f.scorer, settings, topics, reference, on_tokens=advance)

    removed, target = next(iter(found.items()))
    with step("search", "searching what to bake, on fit topics"), bar("searching", None, "tokens") as advance:
        neutral = target.candidates.contrast.neutral
        space = Space.of(target.direction, model, means_of(model, neutral))
        bench = Bench(model, target.scorer, {}, neutral, Scope(topics=SEARCH_TOPICS), advance)
        # One batch, the points worth a trial before anything is learnt: `steer bake --search` goes on from there.
        study, goal = Study(None, {}, "the demo"), Goal(share=SEARCH_SHARE, as_unsearched=False, max_kl=SEARCH_KL)
        study.run(bench, space, goal, BATCH, seed=seed)
        choice = study.choose(bench, space, goal, confirm=False)
        assert study.untouched is not None
        search = search_json(study.trials(space), study.untouched, choice, goal)
    _clear(baked_dir, CERTIFICATE)
    with step("bake", "baking and verifying"), byte_bar("baking") as progress:
        certificate = bake(source, baked_dir, choice.trial.edit, command=subject.command, progress=progress)
    with step("verify"), byte_bar("verifying") as progress:
        checks = verify(baked_dir, progress)
    untouched = next(p for p in doses[removed] if p.amount == 0)
    with (
        step("measure baked", "measuring the baked checkpoint"),
        bar("baked checkpoint", None, "tokens") as advance,
    ):
        prose = harness.plain_paragraphs()[1]
        baked = harness.measure_baked(
            model, load(baked_dir), untouched, target.scorer, reference, prose, on_tokens=advance
        )

    with step("eval", "evaluating what the slider and the bake cost"):
        place = out / "eval"

        def asked(fresh: bool) -> dict[str, Any]:
            return evaluate(
                model, against=[baked_dir], sliders=[{removed: SLID}], probes=PROBES, out=place, quick=True, seed=seed,
                fresh=fresh, say=say,
            )  # fmt: skip

        try:
            evaluated = asked(fresh)
        except OutputExistsError:  # of an earlier demo, with another seed or version
            evaluated = asked(True)

    result = {
        **({"merged": str(source)} if subject.recipe else {}),
        "source": str(source),
        "baked": str(baked_dir),
        "report": str(out / "report.html"),
        "model": subject.name,
        "about": subject.about,
        "command": subject.command,
        "dtype": dtype_name(model.hf.dtype),
        "found": {name: f.as_json() for name, f in found.items()},
        "missing": missing,
        "scorer_words": {name: f.scorer.words() for name, f in found.items()},
        "dose": {name: [p.as_json() for p in points] for name, points in doses.items()},
        "search": search,
        "bake": {
            "trait": removed,
            "edit": certificate.edit,
            "writers_edited": certificate.writers_edited,
            "writers_found": certificate.writers_found,
            "verified": [c.name for c in checks],
            **baked,
        },
        "eval": {"report": str(place / REPORT), "verdicts": dict(verdicts(evaluated))},
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
    }
    write_report(result, out / "report.html")
    return result
