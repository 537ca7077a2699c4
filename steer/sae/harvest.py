"""`steer harvest`: write the residual streams of a text to shards on disk.

The pipeline: `documents` gives token ids, `passes` runs the model, this file drops special and outlier tokens and
writes shards in a background thread. `shards.Harvest` reads the result; `train` and `labels` use it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from steer.checkpoint.dtypes import dtype_name
from steer.checkpoint.sketch import Sketch
from steer.checkpoint.staging import check_output, hash_file
from steer.core.lists import as_list
from steer.errors import MismatchError, SteerError, UsageError
from steer.files import locked, one_line, read_json_object, replacing, write_atomic_json
from steer.model.steered import SteeredModel
from steer.progress import Advance, bar
from steer.sae.documents import as_sources, documents, source_file
from steer.sae.passes import Pass, check_sites, default_batch_tokens, first_tokens, norm_limits, passes
from steer.sae.shards import FORMAT, MANIFEST, PARTIAL, Harvest, check_shards

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
    """Write the residual streams of `model` after blocks `sites`, at `tokens` tokens of a text, to directory `out`.

    Without `tokens` the whole text is read. `sources` are those of `documents`, cut to `context` tokens per document.
    Special tokens are left out, and so are tokens whose norm is over ten times the median at any of the sites. The
    manifest counts both, and its `ended` is "text" if the text ended before `tokens` were found, else "tokens". Each
    forward pass takes `batch_tokens` tokens, padding included; lower it if memory is short. A shard holds
    `shard_tokens` tokens or a few more; an interruption loses only shards that are not finished. `progress` makes the
    progress bar; see `steer.progress`.

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
    text = enumerate(documents(model, sources, context=context))
    sketch = {"sketch": model.sketch().to_header()}
    inputs = {
        "format": FORMAT,
        "sites": sites,
        "text": [_named(s) for s in sources],
        "tokens": tokens,
        "context": context,
        "batch_tokens": batch_tokens or default_batch_tokens(model),
        "shard_tokens": shard_tokens,
        "dtype": dtype_name(model.hf.dtype),
    }
    if not ((out / PARTIAL).is_file() or (out / MANIFEST).is_file()):
        check_output(out)
    with locked(out, "is being written by another harvest; wait, or name another output"):
        record = _begun(out, sketch | inputs)
        if record is None:
            return Harvest.open(out)
        with (
            progress("Harvest", tokens, "tokens") as advance,
            _Shards(out, record, shard_tokens) as shards,
        ):
            advance(shards.total)
            made = passes(model, text, sites, batch_tokens=inputs["batch_tokens"], skip=record["cursor"])
            ended, counts = _fill(shards, made, ", ".join(sources), tokens or sys.maxsize, advance)
            files = shards.finish()
        manifest = {
            "format": FORMAT,
            "checkpoint": model.name,
            "sources": sources,
            **sketch,
            "sites": sites,
            "width": model.anatomy.width,
            "tokens": shards.total,
            "documents": counts["documents"],
            "ended": ended,
            "seen": counts["seen"],
            "left_out": {"special": counts["special"], "outliers": counts["outliers"], "outliers_at": counts["at"]},
            "norm": record["norm"],
            "limit": record["limit"],
            "shards": files,
            "inputs": inputs,
            "versions": {p: version(p) for p in ("steer", "torch", "transformers")},
        }
        write_atomic_json(out / MANIFEST, manifest)
        (out / PARTIAL).unlink()
    return Harvest.open(out)


def _fill(
    shards: _Shards, made: Iterator[Pass], text: str, tokens: int, advance: Advance
) -> tuple[str, dict[str, Any]]:
    """Move tokens from the passes `made` to `shards` until `tokens` are there. Returns (why it ended, the counts).

    The outlier limits are measured on the first passes, of one shard in all; a resumed harvest has them in its record.
    """
    record = shards.record
    counts = record["counts"]
    if shards.total >= tokens:
        return "tokens", counts
    if not record["limit"]:
        made = _measured(record, made, text, min(tokens, shards.size))
    for p in made:
        outliers = p.outliers(record["limit"])
        left_out = torch.stack(list(outliers.values())).any(0)
        used = (~left_out).nonzero()[:, 0]
        end, seen = len(p), len(p.special)
        last = shards.total + len(used) >= tokens
        if last:
            used = used[: tokens - shards.total]
            end = int(used[-1]) + 1
            seen = int(p.place[end - 1]) + 1
        counts = {
            "seen": counts["seen"] + seen,
            "special": counts["special"] + int(p.special[:seen].sum()),
            "outliers": counts["outliers"] + int(left_out[:end].sum()),
            "at": {s: counts["at"].get(s, 0) + int(o[:end].sum()) for s, o in outliers.items()},
            "documents": counts["documents"] + len(p.document[used].unique()),
        }
        shards.add(p, used, counts)
        advance(len(used))
        if last:
            return "tokens", counts
    if not shards.total:
        raise UsageError(f"{text}: expected tokens of ordinary norm, found none")
    return "text", counts


def _measured(record: dict[str, Any], made: Iterator[Pass], text: str, wanted: int) -> Iterator[Pass]:
    """The same passes, after the outlier limits were measured on the first `wanted` tokens and put into `record`."""
    held = deque(first_tokens(made, wanted, len))
    if not any(map(len, held)):
        found = sum(len(p.special) for p in held)
        raise UsageError(f"{text}: expected text, found {f'{found} tokens, all special' if found else 'none'}")
    record["limit"], record["norm"] = norm_limits(held)
    while held:
        yield held.popleft()
    yield from made


class _Shards:
    """Collects the tokens of passes into shards of at least `size` tokens. A thread writes the last full shard while
    the next one is collected."""

    def __init__(self, out: Path, record: dict[str, Any], size: int) -> None:
        self.out, self.record, self.size = out, record, size
        self.total: int = sum(s["tokens"] for s in record["shards"])
        """Tokens in all shards, including the unfinished one."""
        self._number, self._fill = len(record["shards"]), 0
        self._parts: list[dict[str, Tensor]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="harvest")
        self._writing: Future[None] | None = None

    def add(self, p: Pass, rows: Int[Tensor, " n"], counts: dict[str, Any]) -> None:
        """Append `rows` of a pass. `counts` are those after it, and are stored when the shard is full."""
        part = {f"site{s}": h[rows.to(h.device)].to("cpu", torch.bfloat16) for s, h in p.residuals.items()}
        self._parts.append(part | {name: getattr(p, name)[rows].int() for name in COLUMNS})
        self._fill += len(rows)
        self.total += len(rows)
        if self._fill >= self.size:
            self._submit({"cursor": p.number + 1, "counts": counts})

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
        if kind is not None and not self.record["shards"]:
            # No shard was finished, so there is nothing to continue from: remove everything.
            with suppress(OSError):
                for stray in self.out.glob("shard-*"):
                    stray.unlink()
                (self.out / PARTIAL).unlink()
                self.out.rmdir()

    def _submit(self, state: dict[str, Any] | None) -> None:
        self._wait()
        file = self.out / f"shard-{self._number:05}.safetensors"
        self._writing = self._pool.submit(self._write, file, self._parts, state)
        self._number, self._fill, self._parts = self._number + 1, 0, []

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, file: Path, parts: list[dict[str, Tensor]], state: dict[str, Any] | None) -> None:
        # Each part is freed once it is joined: a shard of many sites takes gigabytes.
        tensors = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
        with replacing(file) as work:
            try:
                save_file(tensors, work)
            except SafetensorError as e:
                raise SteerError(
                    f"{file}: could not be written ({one_line(e)}); free space, then run the same harvest again"
                ) from e
            size, sha256 = work.stat().st_size, hash_file(work)
        tokens = len(tensors["token_ids"])
        self.record["shards"].append({"file": file.name, "tokens": tokens, "bytes": size, "sha256": sha256})
        if state is not None:  # None for the last, shorter shard: a harvest is never continued from it
            self.record.update(state)
            write_atomic_json(self.out / PARTIAL, self.record)


def _begun(out: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an unfinished harvest to continue, or a new record; None if the harvest is finished."""
    if (out / MANIFEST).is_file():
        found = read_json_object(out / MANIFEST, do="harvest anew")
        if not isinstance(found.get("inputs"), dict) or "shards" not in found:
            check_output(out)
        _check_inputs(out, {"sketch": found.get("sketch", ""), **found["inputs"]}, inputs)
        (out / PARTIAL).unlink(missing_ok=True)
        return None
    if (out / PARTIAL).is_file():
        record = read_json_object(out / PARTIAL, do="harvest anew")
        _check_inputs(out, record["inputs"], inputs)
        check_shards(out, record["shards"])
        for values, name in ((record, "limit"), (record, "norm"), (record["counts"], "at")):
            values[name] = {int(site): x for site, x in (values[name] or {}).items()}  # keys of JSON are text
        return record
    check_output(out)
    counts = {"seen": 0, "special": 0, "outliers": 0, "at": {}, "documents": 0}
    record = {"inputs": inputs, "limit": {}, "norm": {}, "shards": [], "cursor": 0, "counts": counts}
    write_atomic_json(out / PARTIAL, record)
    return record


def _check_inputs(out: Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise MismatchError unless the recorded inputs `recorded` are the same as those of this call, `given`."""
    do = "give what it began with, or another output"
    now, then = Sketch.from_header(given), Sketch.from_header(recorded)
    if not now.same_as(then):
        raise MismatchError(
            f"{out}: expected the checkpoint it began with, found one whose weights differ by "
            f"{now.distance(then):.1%}; {do}"
        )
    for name in given:
        if name != "sketch" and recorded.get(name) != given[name]:
            begun, found = (", ".join(map(str, as_list(side.get(name)))) for side in (recorded, given))
            raise MismatchError(f"{out}: expected {name} {begun} as it began with, found {found}; {do}")


def _named(source: str) -> str:
    """A source's name for the record; for a file it includes a hash, so that a changed file is noticed."""
    file = source_file(source)
    return source if file is None else f"{file.name} (sha256 {hash_file(file)[:16]})"
