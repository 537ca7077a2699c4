"""`evaluate`: every probe asks every arm the same items, and the arms are compared item by item.

What one probe found out about one arm is a file in OUT/parts, written as soon as it is known, so that a run that was
stopped goes on. OUT/eval.json is the whole, OUT/run.json says which run the directory belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast, overload

from steer.core.version import __version__
from steer.errors import OutputExistsError, SteerError, UnreachableError, UsageError
from steer.files import names_in, read_json_object, without_nan, write_atomic_json
from steer.measure.probes.probe import Chat, Figure, Metric, Opening, Probe, Reader, Size, fits_with_reply, replies_to
from steer.measure.statistics import corrected, difference_of, mean_figures, mean_of
from steer.progress import Advance, bar

RESULTS, RUN, PARTS = "eval.json", "run.json", "parts"
REPORT = "eval.html"
ALPHA = 0.05
"""A difference is called moved from this corrected p-value down."""
Json = dict[str, Any]


class Arm(Protocol):
    """One model among those that are compared."""

    name: str
    about: str
    """What it is, for people."""
    control: bool
    """Whether it is damaged on purpose, to show what the probes can detect."""

    @property
    def key(self) -> Json:
        """All that its figures depend on, as JSON. Reads no weights into memory."""
        ...

    def reader(self) -> Reader:
        """Load it. The reader of the arm before is not used any more."""
        ...


def evaluate_arms(
    arms: Sequence[Arm],
    probes: Sequence[Probe],
    size: Size,
    out: Path,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Json:
    """Ask every arm every probe's items, write OUT/eval.json and return it. The first arm is what the others are
    compared with.

    A probe that fails for an arm, or that it cannot be asked, is skipped there with one line that says why. An arm with
    the key of an earlier one is the same model, and has its figures.
    `fresh`: ask everything again, and drop what an earlier run left in `out`. `say`: called with a line per result.
    Errors: UsageError for no arm, or two of one name; OutputExistsError where `out` holds another run, or other files;
    UnreachableError for a server that stops answering, after which the same call goes on. An arm that cannot be loaded
    is skipped, unless it is the first.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"arms: expected at least one, all with different names, found {', '.join(names) or 'none'}")
    plans = {p.name: _hash(p.plan(size)) for p in probes}
    run = {"steer": __version__, "code": code_hash(), "seed": size.seed, "quick": size.quick, "first": arms[0].key}
    keys = {arm.name: arm.key for arm in arms}
    twins: dict[str, str] = {}
    twins = {arm.name: twins.setdefault(_hash(keys[arm.name]), arm.name) for arm in arms}
    _prepare(out, run, fresh)
    results: dict[str, dict[str, Json]] = {p.name: {} for p in probes}
    dtypes: dict[str, str | None] = {}
    total, done = len(arms) * len(probes), 0
    for arm in arms:
        reader: Reader | None = None
        failed: SteerError | None = None
        hashes = {p.name: _hash([run, keys[arm.name], p.name, plans[p.name]])[:16] for p in probes}
        files = {n: out / PARTS / f"{_slug(arm.name)}-{_slug(n)}-{digest}.json" for n, digest in hashes.items()}
        twin = twins[arm.name]
        for probe in probes:
            done += 1
            file = files[probe.name]
            if twin != arm.name:
                results[probe.name][arm.name], dtypes[arm.name] = results[probe.name][twin], dtypes[twin]
                say(f"[{done}/{total}] {arm.name}, {probe.name}: not asked, the same model as {twin}")
                continue
            if file.is_file():
                found = read_json_object(file, what="a result of steer eval", do="delete it, or run with --fresh")
            else:
                try:
                    if reader is None and failed is None:
                        left = [o for p in probes if not files[p.name].is_file() for o in p.openings(size)]
                        reader = cast(Reader, _WrittenAhead(arm.reader(), left))
                except SteerError as e:
                    if arm is arms[0]:  # what all others are compared with
                        raise
                    failed = e
                if reader is None:  # not written: mended, it is asked by the next run
                    found = {**_EMPTY, "skipped": " ".join(str(failed).split())}
                else:
                    found = _asked(arm, reader, probe, size, f"[{done}/{total}] {arm.name}: {probe.name}")
                    # What a server cannot do today the next run asks again: it may have been mended.
                    if not found["skipped"] or "weights" in reader.abilities:
                        write_atomic_json(file, found, indent=None)
            results[probe.name][arm.name] = {k: v for k, v in found.items() if k != "dtype"}
            dtypes[arm.name] = found["dtype"] or dtypes.get(arm.name)
            say(f"[{done}/{total}] {arm.name}, {probe.name}: {_line(probe, found)}")
        del reader
    result = {
        "steer": __version__,
        "seed": size.seed,
        "quick": size.quick,
        "model": arms[0].about,
        "arms": [
            {
                "name": a.name,
                "about": a.about + (f"; the same model as {t}" if (t := twins[a.name]) != a.name else ""),
                "dtype": dtypes.get(a.name),
                "control": a.control,
            }
            for a in arms
        ],
        "probes": compared(
            [
                {"name": p.name, "says": p.says, "n": p.n_label, "sha256": plans[p.name],
                 "metrics": [asdict(m) for m in p.metrics], "arms": results[p.name]}
                for p in probes
            ],
            names,
            [a.name for a in arms if a.control],
            size.seed,
        ),
    }  # fmt: skip
    write_atomic_json(out / RESULTS, result)
    return without_nan(result)


class _WrittenAhead:
    """A reader that writes all openings of one length together, when the first of them is asked for."""

    def __init__(self, reader: Reader, openings: Sequence[Opening]) -> None:
        self._reader, self._left = reader, list(openings)
        self._texts: dict[Opening, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def replies(
        self,
        chats: Sequence[Chat],
        *,
        tokens: int,
        seeds: Sequence[int],
        advance: Advance | None = None,
    ) -> list[str]:
        """Return the replies, as `Reader.replies` does."""
        asked = [Opening(chat, seed, tokens) for chat, seed in zip(chats, seeds, strict=True)]
        if any(o in self._left for o in asked):
            now = [o for o in self._left if o.tokens == tokens and self._fits(o)]
            self._texts |= zip(now, replies_to(self._reader, now, advance), strict=True)
            self._left = [o for o in self._left if o.tokens != tokens]
        if all(o in self._texts for o in asked):
            return [self._texts[o] for o in asked]
        return self._reader.replies(chats, tokens=tokens, seeds=seeds, advance=advance)

    def _fits(self, opening: Opening) -> bool:
        try:
            return fits_with_reply(self._reader, opening)
        except SteerError:  # a chat that the template refuses: the probe that asks for it meets the same error
            return False


def compared(probes: list[Json], arms: Sequence[str], controls: Sequence[str] = (), seed: int = 0) -> list[Json]:
    """Return probes as in eval.json with their `summary` and `signal`, which are computed of their figures alone.

    P-values are corrected for the number of probes, each with its headline; those of the other metrics for the number
    of those. Each arm is corrected separately.
    """
    rows: list[list[Json]] = [[] for _ in probes]
    for arm in arms:
        families: dict[bool, list[Json]] = {True: [], False: []}
        for probe, summary in zip(probes, rows, strict=True):
            for i, metric in enumerate(probe["metrics"]):
                row = _row(probe, metric["name"], arm, arms[0], seed)
                if row is not None:
                    summary.append(row)
                    if "p" in row:
                        families[i == 0].append(row)
        for family in families.values():
            for row, p in zip(family, corrected([r["p"] for r in family]), strict=True):
                row["p_corrected"], row["moved"] = p, p < ALPHA
    return [
        {**probe, "summary": summary, "signal": _signal(probe, summary, arms[0], controls, seed)}
        for probe, summary in zip(probes, rows, strict=True)
    ]


def figures_of(part: Json, metric: str) -> list[Figure]:
    """Return one metric's figures in a part of eval.json. A figure that was no number has been left out."""
    return [Figure(**f) for f in part["figures"] if f["metric"] == metric and f["value"] is not None]


@overload
def shown(metric: Json, value: float) -> float: ...
@overload
def shown(metric: Json, value: float | None) -> float | None: ...
def shown(metric: Json, value: float | None) -> float | None:
    """Return a mean as people read it: a mean of nats as a perplexity, where the metric asks for that."""
    return math.exp(min(value, 700)) if metric["exponent"] and value is not None else value


def code_hash() -> str:
    """Return a hash of the code and the texts that figures depend on."""
    package = Path(__file__).parents[1]
    folders = [package / name for name in ("core", "checkpoint", "model", "measure")]
    files = sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".txt", ".yaml", ".jinja"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


_EMPTY: Json = {"figures": [], "examples": [], "notes": [], "seconds": 0.0, "skipped": None, "dtype": None}
"""What is kept of one probe and arm before anything is known."""


def _asked(arm: Arm, reader: Reader, probe: Probe, size: Size, title: str) -> Json:
    """Return what a probe finds out about a reader, or why it cannot be asked."""
    out: Json = {**_EMPTY, "notes": list(reader.notes), "dtype": reader.dtype}
    start = time.perf_counter()
    missing = sorted(probe.needs - reader.abilities)
    if missing:
        why = f"{probe.name}: expected a model that gives {' and '.join(missing)}, found none"
        out["skipped"] = "; ".join([why, *reader.notes])
    else:
        try:
            with bar(title, None, "items") as advance:
                found = probe.run(reader, size, advance)
            figures = [f for f in found.figures if math.isfinite(f.value)]
            out |= {"figures": [asdict(f) for f in figures], "examples": [asdict(e) for e in found.examples]}
            out["notes"] += found.notes
            if left := len(found.figures) - len(figures):
                out["notes"].append(f"{left} of {len(found.figures)} figures left out: they are no finite number")
            if not figures:
                out["skipped"] = "; ".join(
                    [f"{probe.name}: expected items that {arm.name} can be asked, found none", *out["notes"]]
                )
        except UnreachableError:
            raise  # what is done is kept, and the next run asks this again
        except SteerError as e:
            out["skipped"] = f"{probe.name}: {' '.join(str(e).split())}"
    out["seconds"] = round(time.perf_counter() - start, 2)
    return out


def _prepare(out: Path, run: Json, fresh: bool) -> None:
    """Make `out` ready for a run; raise OutputExistsError where it holds anything else."""
    mark = out / RUN
    try:
        entries = names_in(out) if out.is_dir() else []
    except OSError as e:
        raise OutputExistsError(f"{out}: could not be read ({e.strerror}); name another --out") from e
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out}: expected a directory, found a file; name another --out")
    if entries and not mark.is_file():
        raise OutputExistsError(f"{out}: expected a new directory or a run of steer eval, found {min(entries)}; "
                                "name another --out")  # fmt: skip
    if mark.is_file() and not fresh:
        other = read_json_object(mark, do="name another --out, or run with --fresh")
        different = [k for k in run if other.get(k) != run[k]]
        if different:
            key = different[0]
            what = {"first": "another first model", "code": "another version of steer's code"}.get(
                key, f"{key} {other.get(key)}, not {run[key]}"
            )
            raise OutputExistsError(f"{out}: expected this run, found one with {what}; name another --out, or run with "
                                    "--fresh, which drops it")  # fmt: skip
    if fresh:
        for file in (*(out / PARTS).glob("*.json"), out / RESULTS, out / REPORT):
            file.unlink(missing_ok=True)
    write_atomic_json(mark, run)


def _row(probe: Json, metric: str, arm: str, first: str, seed: int) -> Json | None:
    """Return a line of the summary: one metric of one arm, beside the first arm's."""
    figures = figures_of(probe["arms"].get(arm, {"figures": []}), metric)
    if not figures:
        return None
    mean = mean_of(figures, seed)
    row: Json = {"arm": arm, "metric": metric, **asdict(mean)}
    if arm == first:
        return row
    difference = difference_of(figures_of(probe["arms"].get(first, {"figures": []}), metric), figures, seed)
    if difference is None:
        return row
    return row | {
        "difference": difference.mean.value,
        "difference_low": difference.mean.low,
        "difference_high": difference.mean.high,
        "pairs": difference.mean.items,
        "p": difference.p,
        "noise": difference.noise,
    }


def _signal(probe: Json, summary: Sequence[Json], first: str, controls: Sequence[str], seed: int) -> Json:
    """Return whether the probe measures anything at this size: with damaged arms, whether it moves for one of them or
    for all together; without, whether the first arm is above chance."""
    headline = Metric(**probe["metrics"][0])
    rows = {r["arm"]: r for r in summary if r["metric"] == headline.name}
    moved, together = [arm for arm in controls if rows.get(arm, {}).get("moved")], None
    at = "" if headline.chance is None else f"; chance is {headline.chance:g}"
    if controls:
        damaged = mean_figures([figures_of(probe["arms"][arm], headline.name) for arm in controls if arm in rows])
        found = difference_of(figures_of(probe["arms"][first], headline.name), damaged, seed)
        together = found and found.p
        detected = [*moved, *(["the damaged arms together"] if together is not None and together < ALPHA else [])]
        status = "signal" if detected else "none"
        line = f"distinguishes {', '.join(detected)} from {first}" if detected else f"no signal at this size{at}"
    elif headline.chance is None or first not in rows:
        status, line = "unknown", ""
    elif rows[first]["low"] is not None and rows[first]["low"] <= headline.chance <= rows[first]["high"]:
        status, line = "chance", f"{first} is no better than chance at this size{at}"
    else:
        status, line = "signal", f"{first} differs from chance{at}"
    return {"status": status, "moved": moved, "together": together, "chance": headline.chance, "line": line}


def _line(probe: Probe, found: Json) -> str:
    if found["skipped"]:
        return f"skipped: {found['skipped']}"
    metric = probe.metrics[0]
    figures = figures_of(found, metric.name)
    value = sum(f.value for f in figures) / len(figures) if figures else math.nan
    return f"{metric.name} {math.exp(value) if metric.exponent else value:.3g} ({found['seconds']:.1f} s)"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", name)[:60]
