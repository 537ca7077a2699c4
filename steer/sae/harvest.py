"""`steer harvest`: write the residual streams of a text to shards on disk.

The pipeline: `documents` gives token ids, `passes` runs the model, this file drops special and outlier tokens and
writes shards in a background thread. `shards.Harvest` reads the result; `train` and `labels` use it.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steer.checkpoint.dtypes import dtype_name
from steer.checkpoint.sketch import Sketch
from steer.checkpoint.staging import check_output, hash_file
from steer.errors import MismatchError, OutputExistsError, SteerError, UsageError
from steer.model.steered import SteeredModel
from steer.progress import Advance, bar
from steer.sae.documents import as_sources, documents, source_file
from steer.sae.passes import Limits, Pass, check_sites, default_batch_tokens, passes
from steer.sae.shards import (
    FORMAT,
    MANIFEST,
    PARTIAL,
    Harvest,
    check_shards,
    read_record,
    shard_name,
    write_record,
    write_tensors,
)

COLUMNS = ("token_ids", "document", "position")
"""Columns stored for every token beside its residual streams, int32."""


def harvest(
    model: SteeredModel,
    out: str | Path,
    *,
    sites: Sequence[int],
    sources: str | Sequence[str],
    tokens: int | None = None,
    context: int = 512,
    batch_tokens: int | None = None,
    shard_tokens: int = 65536,
    progress: Callable[..., AbstractContextManager[Advance]] = bar,
) -> Harvest:
    """Write the residual streams after blocks `sites`, at `tokens` tokens of the text, to directory `out`.

    Without `tokens` the whole text is read. `sources` are those of `documents`, cut to `context` tokens per document.
    Special tokens are left out, and so are tokens whose norm is over ten times the median at any of the sites. The
    manifest counts both, and its `ended` is "text" if the text ended before `tokens` were found, else "tokens". Each
    forward pass takes `batch_tokens` tokens, padding included; lower it if memory is short. A shard holds
    `shard_tokens` tokens; an interruption loses only shards that are not finished.

    Called again after an interruption, it continues from the finished shards and ends in the same bytes. If `out` is a
    finished harvest, it is returned unchanged.

    Errors: MismatchError when `out` was begun with another model, text or option, OutputExistsError when it holds
    something else or another process is writing it, UsageError for a site that the model lacks or a text without
    tokens.

        done = steer.harvest(model, "harvest", sites=[14], sources="text.jsonl", tokens=1_000_000)
        rows = done.activations(14)[:1000]
    """
    out = Path(out)
    if (tokens is not None and tokens < 1) or shard_tokens < 1:
        raise UsageError(f"tokens: expected at least 1, found {tokens if shard_tokens >= 1 else shard_tokens}")
    sources, sites = as_sources(sources), check_sites(model, sites)
    text = documents(model, sources, context=context)
    sketch = model.sketch()
    inputs = {
        "sites": sites,
        "text": [_named(s) for s in sources],
        "tokens": tokens,
        "context": context,
        "batch_tokens": batch_tokens or default_batch_tokens(model),
        "shard_tokens": shard_tokens,
        "dtype": dtype_name(model.hf.dtype),
        "steered": False,  # a harvest that an earlier version began with sliders on must not be continued
    }
    with _locked(out):
        record = _begun(out, {"sketch": sketch.to_header(), **inputs})
        if record is None:
            return Harvest.open(out)
        cursor = record["cursor"]
        text = enumerate(documents(model, sources, context=context))
        with (
            progress("Harvest", tokens, "tokens") as advance,
            _Shards(out, record, sites, model.anatomy.width) as shards,
        ):
            advance(shards.total)
            made = passes(model, text, sites, batch_tokens=inputs["batch_tokens"], skip=cursor["pass"])
            ended, counts = _fill(shards, made, ", ".join(sources), tokens, advance)
            files = shards.finish()
        manifest = {
            "format": FORMAT,
            "checkpoint": model.name,
            "sources": list(sources),
            "sketch": sketch.to_header(),
            "sites": sites,
            "width": model.anatomy.width,
            "tokens": shards.total,
            "documents": counts["documents"],
            "ended": ended,
            "seen": counts["seen"],
            "left_out": {"special": counts["special"], "outliers": counts["outliers"], "outliers_at": counts["at"]},
            "norm": record["norm"],
            "limit": record["limit"],
            "shard_tokens": shard_tokens,
            "shards": files,
            "inputs": inputs,
            "versions": {p: version(p) for p in ("steer", "torch", "transformers")},
        }
        write_record(out / MANIFEST, manifest)
        (out / PARTIAL).unlink()
    return Harvest.open(out)


def _fill(
    shards: _Shards, made: Iterator[Pass], text: str, tokens: int | None, advance: Advance
) -> tuple[str, dict[str, Any]]:
    """Move tokens from the passes `made` to `shards` until `tokens` are there. Returns (why it ended, the counts).

    The first passes, of one shard in all, are held back to measure the outlier limits; a resumed harvest has them in
    its record.
    """
    record = shards.record
    resumed, counts = record["cursor"], record["counts"]
    held: deque[Pass] = deque()
    if record["limit"] is None:
        wanted = shards.size if tokens is None else min(tokens, shards.size)
        for p in made:
            held.append(p)
            if (wanted := wanted - len(p)) <= 0:
                break
        if not any(map(len, held)):
            found = sum(len(p.special) for p in held)
            raise UsageError(f"{text}: expected text, found {f'{found} tokens, all special' if found else 'none'}")
        limits = Limits.measure(held)
        record["limit"] = {str(s): x for s, x in limits.limit.items()}
        record["norm"] = {str(s): x for s, x in limits.norm.items()}
    limits = Limits(*({int(s): x for s, x in record[name].items()} for name in ("limit", "norm")))

    while (p := held.popleft() if held else next(made, None)) is not None:
        outliers = p.outliers(limits)
        left_out = torch.stack(list(outliers.values())).any(0)
        used = (~left_out).nonzero()[:, 0]
        already = resumed["row"] if p.number == resumed["pass"] else 0
        # How many tokens of this pass are needed, including those that an earlier run wrote.
        room = len(used) + 1 if tokens is None else tokens - (shards.total - already)
        used, last = used[:room], room <= len(used)
        end = int(used[-1]) + 1 if last else len(p)
        seen = int(p.place[end - 1]) + 1 if last else len(p.special)
        before = counts
        counts = {
            "seen": before["seen"] + seen,
            "special": before["special"] + int(p.special[:seen].sum()),
            "outliers": before["outliers"] + int(left_out[:end].sum()),
            "at": {str(s): before["at"].get(str(s), 0) + int(o[:end].sum()) for s, o in outliers.items()},
            "documents": before["documents"] + len(p.document[used].unique()),
        }
        shards.add(p, used, already, before)
        advance(max(0, len(used) - already))
        if last:
            return "tokens", counts
    if not shards.total:
        raise UsageError(f"{text}: expected tokens of ordinary norm, found none")
    return "text", counts


class _Shards:
    """Fills shards of fixed size; a thread writes the last full shard while the next one is filled."""

    def __init__(self, out: Path, record: dict[str, Any], sites: Sequence[int], width: int) -> None:
        self.out, self.record, self.sites, self.width = out, record, sites, width
        self.size: int = record["inputs"]["shard_tokens"]
        self.total: int = sum(s["tokens"] for s in record["shards"])
        """Tokens in all shards, including the unfinished one."""
        self._number, self._fill = len(record["shards"]), 0
        self._residuals: dict[int, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="harvest")
        self._writing: Future[None] | None = None

    def add(self, p: Pass, rows: Int[Tensor, " n"], start: int, counts: dict[str, Any]) -> None:
        """Append `rows` of a pass, beginning with the `start`-th of them. `counts` are those before the pass, stored
        with the cursor when a shard is full."""
        while start < len(rows):
            if not self._fill:
                self._residuals = {s: torch.empty(self.size, self.width, dtype=torch.bfloat16) for s in self.sites}
                self._columns = {c: torch.empty(self.size, dtype=torch.int32) for c in COLUMNS}
            part = rows[start : start + self.size - self._fill]
            place = slice(self._fill, self._fill + len(part))
            for site, buffer in self._residuals.items():
                h = p.residuals[site]
                buffer[place] = h if len(part) == len(h) else h.index_select(0, part.to(h.device))
            for name, buffer in self._columns.items():
                buffer[place] = getattr(p, name)[part].int()
            start += len(part)
            self._fill += len(part)
            self.total += len(part)
            if self._fill == self.size:
                self._submit({"cursor": {"pass": p.number, "row": start}, "counts": counts})

    def finish(self) -> list[dict[str, Any]]:
        """Write the last, partly filled shard. Returns the manifest entries of all shards."""
        if self._fill:
            self._submit(None)
        self._wait()
        return self.record["shards"]

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()
        elif not self.record["shards"]:
            # No shard was finished, so there is nothing to continue from: remove everything.
            with suppress(OSError):
                for stray in self.out.glob("shard-*"):
                    stray.unlink()
                (self.out / PARTIAL).unlink()
                self.out.rmdir()

    def _submit(self, state: dict[str, Any] | None) -> None:
        self._wait()
        self._writing = self._pool.submit(self._write, self._number, self._residuals, self._columns, self._fill, state)
        self._number, self._fill = self._number + 1, 0
        self._residuals, self._columns = {}, {}

    def _wait(self) -> None:
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OSError as e:
            raise SteerError(
                f"{self.out}: could not be written, {e.strerror}; make room or mend it, then run the same harvest again"
            ) from e
        finally:
            self._writing = None

    def _write(self, number: int, residuals: dict[int, Tensor], columns: dict[str, Tensor], n: int, state: Any) -> None:
        parts = {f"site{s}": {"residual": h[:n]} for s, h in residuals.items()}
        parts["tokens"] = {name: c[:n] for name, c in columns.items()}
        files = [write_tensors(self.out / shard_name(number, part), tensors) for part, tensors in parts.items()]
        self.record["shards"].append({"tokens": n, "files": files})
        if state is not None:  # None for the last, shorter shard: a harvest is never continued from it
            self.record.update(state)
            write_record(self.out / PARTIAL, self.record)


def _begun(out: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an unfinished harvest to continue, or a new record; None if the harvest is finished."""
    if (out / MANIFEST).is_file():
        found = read_record(out / MANIFEST)
        if not isinstance(found.get("inputs"), dict) or "shards" not in found:
            check_output(out)
        _check_inputs(out, {"sketch": found.get("sketch", ""), **found["inputs"]}, inputs)
        (out / PARTIAL).unlink(missing_ok=True)
        return None
    if (out / PARTIAL).is_file():
        record = read_record(out / PARTIAL)
        _check_inputs(out, record["inputs"], inputs)
        check_shards(out, record["shards"])
        return record
    check_output(out)
    counts = {"seen": 0, "special": 0, "outliers": 0, "at": {}, "documents": 0}
    cursor = {"pass": 0, "row": 0}
    record = {"inputs": inputs, "limit": None, "norm": None, "shards": [], "cursor": cursor, "counts": counts}
    write_record(out / PARTIAL, record)
    return record


def _check_inputs(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise MismatchError unless the recorded inputs `theirs` are the same as those of this call, `ours`."""
    for name in ours:
        if name == "sketch":
            distance = Sketch.from_header(ours).distance(Sketch.from_header(theirs))
            same = Sketch.from_header(ours).same_as(Sketch.from_header(theirs))
            begun, found = "the checkpoint it began with", f"one whose weights differ by {distance:.1%}"
        else:
            same = theirs.get(name) == ours[name]
            begun, found = f"{name} {_shown(theirs.get(name))} as it began with", _shown(ours[name])
        if not same:
            raise MismatchError(f"{out}: expected {begun}, found {found}; give what it began with, or another output")


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _named(source: str) -> str:
    """A source's name for the record; for a file it includes a hash, so that a changed file is noticed."""
    file = source_file(source)
    return source if file is None else f"{file.name} (sha256 {hash_file(file)[:16]})"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock a directory against other harvests, creating it if needed. The lock ends with the process."""
    if out.is_dir() and not ((out / PARTIAL).is_file() or (out / MANIFEST).is_file()):
        check_output(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = os.open(out, os.O_RDONLY)
    except FileExistsError:
        check_output(out)
        raise
    except OSError as e:
        raise SteerError(f"{out}: could not be written, {e.strerror}; name an output where you may write") from e
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise OutputExistsError(f"{out}: is being written by another harvest; wait, or name another output") from e
        yield
    finally:
        os.close(held)
