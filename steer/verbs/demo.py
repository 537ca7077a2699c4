"""`steer demo`: the whole pipeline on the default model, each step measured on text that it was not fitted on.

`run` fetches, merges, finds two traits, searches an edit, bakes, verifies, measures and writes the report.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.checkpoint.fetch import DEFAULT_MODEL, fetch
from steer.checkpoint.shipped import RECIPE, present
from steer.checkpoint.staging import hash_file
from steer.core.trait import NeutralPrompts
from steer.core.version import __version__
from steer.files import read_json_object, write_atomic
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
RESULTS = "results.json"


def run(
    out: Path, *, seed: int = 0, fresh: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Fetch, merge, find both traits, measure their dose response, bake, verify, measure the bake, and report.

    Returns what `--json` prints. A second call with the same inputs returns the saved numbers, unless `fresh`. `seed`:
    of every reply. `say`: called with a line for each step.
    Errors: SteerError if the recipe of the default merge is not installed.
    """
    present(RECIPE)
    out = out.resolve()
    key = _key(seed)
    done = out / RESULTS
    if not fresh and done.is_file():
        result = read_json_object(done, do="run it with --fresh")
        if result.get("key") == key and all(Path(result[p]).exists() for p in ("merged", "baked", "report")):
            return result
    out.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    result = _measure(out, seed, say)
    write_atomic(done, json.dumps({"key": key, **result}, indent=2) + "\n")
    return json.loads(done.read_text())


def _key(seed: int) -> dict[str, Any]:
    """Return everything that the numbers depend on: code and texts of this package, recipe, adapters, dtype, seed."""
    package = Path(__file__).parents[1]
    files = [p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".txt")]
    files += [RECIPE, *RECIPE.parent.glob("tunes/*/adapter_model.safetensors")]
    return {
        "version": __version__,
        "seed": seed,
        "dtype": os.environ.get("STEER_DTYPE") or "auto",
        "files": {str(p.relative_to(package.parent)): hash_file(p)[:16] for p in sorted(files)},
    }


def _clear(directory: Path, ours: str) -> None:
    """Remove a directory that an earlier run wrote, known by its file `ours`. `check_output` refuses any other."""
    if (directory / ours).is_file():
        shutil.rmtree(directory)


def _measure(out: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, line: str | None = None) -> Iterator[None]:
        """Say `line`, and add the wall time of the block to `seconds`."""
        if line:
            say(line)
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    with step("import"):
        from steer.baking.bake import bake
        from steer.baking.certificate import CERTIFICATE
        from steer.baking.verify import verify
        from steer.checkpoint.dtypes import dtype_name
        from steer.checkpoint.library import direction_place
        from steer.checkpoint.merge import MANIFEST as MERGE_MANIFEST
        from steer.checkpoint.merge import is_merge_of, merge
        from steer.finding.traits import find_trait
        from steer.measure import harness
        from steer.measure.neutral_means import means_of
        from steer.measure.report import write_report
        from steer.measure.search.space import Space
        from steer.measure.search.study import BATCH, Study
        from steer.measure.search.trials import Bench, Goal, Scope, search_json
        from steer.model.steered import load

    merged_dir, baked_dir = out / "merged", out / "baked"
    with step("fetch", "fetching the default model"):
        fetch(DEFAULT_MODEL)
    with step("merge", "merging its tunes"):
        if not is_merge_of(merged_dir, RECIPE):
            _clear(merged_dir, MERGE_MANIFEST)
            merge(RECIPE, merged_dir)
    with step("load"):
        model = load(merged_dir)
        sketch = model.sketch()

    found, ordinary = {}, None
    for name in TRAITS:
        with step(f"find {name}", f"finding {name}"):
            found[name] = find_trait(model, name, seed=seed, neutral=ordinary)
            ordinary = found[name].candidates.contrast.neutral
            found[name].direction.save(direction_place(sketch, name))
            found[name].direction.save(out / "directions" / f"{name}.safetensors")

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

    moral = found["moralizing"]
    with step("search", "searching what to bake, on fit topics"), bar("searching", None, "tokens") as advance:
        neutral = moral.candidates.contrast.neutral
        space = Space.of(moral.direction, model, means_of(model, neutral))
        bench = Bench(model, moral.scorer, {}, neutral, Scope(topics=SEARCH_TOPICS), advance)
        # One batch, the points worth a trial before anything is learnt: `steer bake --search` goes on from there.
        study, goal = Study(None, {}, "the demo"), Goal(share=SEARCH_SHARE, as_unsearched=False, max_kl=SEARCH_KL)
        study.run(bench, space, goal, BATCH, seed=seed)
        choice = study.choose(bench, space, goal, confirm=False)
        assert study.untouched is not None
        search = search_json(study.trials(space), study.untouched, choice, goal)
    _clear(baked_dir, CERTIFICATE)
    with step("bake", "baking and verifying"), byte_bar("baking") as progress:
        certificate = bake(merged_dir, baked_dir, choice.trial.edit, command="steer demo", progress=progress)
    with step("verify"), byte_bar("verifying") as progress:
        checks = verify(baked_dir, progress)
    untouched = next(p for p in doses["moralizing"] if p.amount == 0)
    with (
        step("measure baked", "measuring the baked checkpoint"),
        bar("baked checkpoint", None, "tokens") as advance,
    ):
        prose = harness.plain_paragraphs()[1]
        baked = harness.measure_baked(
            model, load(baked_dir), untouched, moral.scorer, reference, prose, on_tokens=advance
        )

    result = {
        "merged": str(merged_dir),
        "baked": str(baked_dir),
        "report": str(out / "report.html"),
        "model": DEFAULT_MODEL,
        "dtype": dtype_name(model.hf.dtype),
        "found": {name: f.as_json() for name, f in found.items()},
        "scorer_words": {name: f.scorer.words() for name, f in found.items()},
        "dose": {name: [p.as_json() for p in points] for name, points in doses.items()},
        "search": search,
        "bake": {
            "edit": certificate.edit,
            "writers_edited": certificate.writers_edited,
            "writers_found": certificate.writers_found,
            "verified": [c.name for c in checks],
            **baked,
        },
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
    }
    write_report(result, out / "report.html")
    return result
