"""`steer train`: from a harvest, or a model and a text, to a dictionary on disk with its figures.

This file prepares the data, calls the training loop (`trainer.train`), measures the result (`splice`) and writes the
dictionary and its manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from steer.checkpoint.dtypes import dtype_name
from steer.checkpoint.library import register_dictionary
from steer.checkpoint.sketch import Sketch
from steer.checkpoint.staging import check_output, staged, write_json
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import load_dictionary, save_dictionary
from steer.core.fit import Fit, measure_fit
from steer.core.lists import as_list
from steer.errors import MismatchError, SteerError, UsageError
from steer.model.fit_check import check_fit
from steer.model.steered import SteeredModel, load
from steer.sae import parallel
from steer.sae.checkpoints import training_place
from steer.sae.documents import documents
from steer.sae.objectives import settled
from steer.sae.options import TrainOptions
from steer.sae.shards import MANIFEST, PARTIAL, Harvest, is_held_out
from steer.sae.splice import Spliced, cross_entropies
from steer.sae.stream import ModelStream
from steer.sae.trainer import Trained, TrainingData, train
from steer.sae.training_log import FileLog, TrainingLog, sink_for

HELD_OUT = 50_000
"""Largest number of held-out tokens in the last check."""
SPLICED = 96
"""Number of held-out documents that the cross-entropy is measured on."""


@dataclass(frozen=True, eq=False)
class TrainedDictionary:
    """A dictionary on disk and its figures."""

    dictionary: Dictionary
    trained: Trained
    spliced: Spliced | None
    """Cross-entropy with the reconstruction spliced into the model; None if the model or the text was not available."""
    parent: Fit | None
    """Fit of the dictionary that the training started from, on this checkpoint, before the first step."""
    parent_own: dict[str, Any] | None = None
    """The fit of that dictionary on its own checkpoint, from its manifest."""
    dead_window: int = 0
    """A latent that has not fired for this many training tokens counts as dead."""

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON, for the manifest and the machine-readable result."""
        t = self.trained
        return {
            "fit": asdict(t.fit),
            "dead": t.dead,
            "spliced": asdict(self.spliced) if self.spliced else None,
            "dead_window_tokens": self.dead_window,
            "parent": asdict(self.parent) if self.parent else None,
            "parent_own": self.parent_own,
            "tokens_per_second": round(t.rate),
            "share_of_encoder_product": round(t.share, 3),
            "seconds": round(t.seconds, 1),
            "time": {part: round(share, 3) for part, share in t.parts.items()},
        }


def train_dictionary(
    source: str | Path,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    site: int | None = None,
    text: str | Sequence[str] = (),
    context: int = 512,
    parent: str | Path | None = None,
    model: str | Path | None = None,
    resume: bool = False,
    every: float = 120.0,
    track: Literal["tensorboard", "wandb"] | None = None,
    quiet: bool = False,
) -> TrainedDictionary:
    """Train a dictionary and write it atomically to `out`; during training its state is in `out.training`.

    `source` is a harvest, or a model whose activations are streamed while it reads `text` in documents of `context`
    tokens. `site` is the block to train on; it may be left out for a harvest of one site. `parent` is a dictionary to
    start from, for instance that of a parent of a merged model. `model` is the checkpoint of a harvest, if it is no
    longer at the path that the harvest names. `resume` continues a stopped run, `every` is the number of seconds
    between saved states, `track` also sends the log to a tracker, and `quiet` turns the log off. Under `torchrun` every
    process calls this, and the first one writes.

    Errors: UsageError for a source without site or text, MismatchError for a parent or model that does not fit,
    StoppedError on SIGTERM or Ctrl-C.

        options = TrainOptions(latents=4608, k=32, tokens=10_000_000)
        result = steer.train_dictionary("harvest", "dictionary", options, site=14)
        print(result.trained.fit.fvu)
    """
    options, out, text = options or TrainOptions(), Path(out), as_list(text)
    check_output(out)
    with parallel.process_group():
        options = settled(options, parallel.local_device())
        source_data = _from_harvest(source, site, options) if _is_harvest(source) else None
        live = None
        if source_data is None:
            live = load(source)
            source_data = _from_model(live, site, text, context, options)
        data, facts = source_data
        started = load_dictionary(parent) if parent is not None else None
        before = None
        if started is not None:
            if started.width != facts["width"]:
                raise MismatchError(
                    f"{parent}: expected a dictionary of width {facts['width']}, found {started.width}; name the "
                    "dictionary of a parent of this model"
                )
            before = measure_fit(replace(started, norm=facts["norm"]), [data.held_out])
        first = parallel.rank() == 0
        place = training_place(out)
        sinks = (sink_for(track, place, options),) if track and first else ()
        log = FileLog(place, sinks=sinks) if first and not quiet else TrainingLog()
        trained = train(data, out, options, resume=resume, parent=started, every=every, log=log)
        made = replace(trained.dictionary, site=facts["site"], norm=facts["norm"])
        parent_fit = started.manifest.get("fit") if started is not None else None
        unspliced = TrainedDictionary(made, trained, None, before, parent_fit, options.dead_tokens)
        spliced = None
        if first:
            live = live or _model_of(model or facts["checkpoint"], facts)
            if live is not None:
                spliced = _splice(live, made, facts, options)
                facts["fit_on_plain"] = asdict(check_fit(live, made).fit)
            result = replace(unspliced, dictionary=made, spliced=spliced)
            _write(result, out, place, options, facts)
        parallel.barrier()
    return replace(unspliced, dictionary=load_dictionary(out), spliced=spliced)


def _is_harvest(source: str | Path) -> bool:
    place = Path(source)
    if not place.is_dir() or (place / "config.json").exists():
        return False
    return (place / MANIFEST).exists() or (place / PARTIAL).exists()


def _from_harvest(source: str | Path, site: int | None, options: TrainOptions) -> tuple[TrainingData, dict[str, Any]]:
    harvest = Harvest.open(source)
    if site is None:
        if len(harvest.sites) > 1:
            raise UsageError(f"{source}: expected --site, one of {', '.join(map(str, harvest.sites))}, found none")
        site = harvest.sites[0]
    shared: dict[str, Any] = {"seed": options.seed, "held_out": options.held_out}
    batches = harvest.batches(site, options.batch, **shared, rank=parallel.rank(), world=parallel.world())
    sample = next(harvest.batches(site, min(16_384, harvest.tokens), **shared))
    manifest = harvest.manifest
    inputs = {
        "kind": "harvest", "tokens": harvest.tokens, "site": site, "sketch": manifest["sketch"],
        "dtype": manifest["inputs"]["dtype"],
    }  # fmt: skip
    facts = {
        "site": site, "norm": harvest.norm(site), "width": harvest.width, "checkpoint": manifest["checkpoint"],
        "sketch": manifest["sketch"], "text": manifest["sources"], "context": manifest["inputs"]["context"],
        "inputs": inputs,
    }  # fmt: skip
    held_out = harvest.held_out_rows(site, HELD_OUT, held_out=options.held_out)
    return TrainingData(batches, held_out, sample, inputs), facts


def _from_model(
    model: SteeredModel, site: int | None, text: Sequence[str], context: int, options: TrainOptions
) -> tuple[TrainingData, dict[str, Any]]:
    if site is None or not text:
        missing = "--site" if site is None else "--text"
        raise UsageError(
            f"{model.name}: expected {missing} beside a model, found none; name a site and a text to stream, or a "
            "directory that steer harvest wrote"
        )
    stream = ModelStream(
        model, list(text), site=site, batch=options.batch, buffer=options.buffer, context=context, seed=options.seed,
        held_out=options.held_out, held_out_tokens=HELD_OUT // 2, rank=parallel.rank(), world=parallel.world(),
    )  # fmt: skip
    sketch = model.sketch().to_header()
    inputs = {
        "kind": "stream", "text": [str(t) for t in text], "site": site, "sketch": sketch, "context": context,
        "dtype": dtype_name(model.hf.dtype),
    }  # fmt: skip
    facts = {
        "site": site, "norm": stream.norm, "width": stream.width, "checkpoint": model.name, "sketch": sketch,
        "text": [str(t) for t in text], "context": context, "inputs": inputs,
    }  # fmt: skip
    return TrainingData(stream, stream.held_out, stream.peek(), inputs), facts


def _model_of(name: str | Path, facts: dict[str, Any]) -> SteeredModel | None:
    """The checkpoint that was harvested, loaded; None if `name` is not a directory. Errors: MismatchError for another
    checkpoint."""
    if not Path(name).is_dir():
        return None
    model = load(name)
    if not model.sketch().same_as(Sketch.from_header(facts)):
        raise MismatchError(f"{name}: expected the checkpoint that was harvested, found one with other weights")
    return model


def _splice(model: SteeredModel, made: Dictionary, facts: dict[str, Any], options: TrainOptions) -> Spliced | None:
    """Cross-entropies on held-out documents; None if the text cannot be read any more."""
    try:
        found = enumerate(documents(model, facts["text"], context=facts["context"]))
        held = (d.ids for n, d in found if bool(is_held_out(torch.tensor([n]), options.held_out)))
        ids = list(islice(held, SPLICED))
    except SteerError:
        return None
    return cross_entropies(model, made, ids) if ids else None


def _write(result: TrainedDictionary, out: Path, place: Path, options: TrainOptions, facts: dict[str, Any]) -> None:
    d = result.dictionary
    manifest = {
        "name": f"{Path(facts['checkpoint']).name}-L{d.site}-{options.architecture}",
        "site": d.site,
        "norm": d.norm,
        "checkpoint": facts["checkpoint"],
        "sketch": facts["sketch"],
        **result.as_json(),
        "fit_on_plain": facts.get("fit_on_plain"),
        "options": options.as_json(),
        "inputs": facts["inputs"],
        "text": facts["text"],
        "versions": {p: version(p) for p in ("torch", "transformers", "sae-lens")},
    }
    with staged(out) as work:
        save_dictionary(d, work)
        if (place / "training.csv").exists():
            shutil.copy(place / "training.csv", work / "training.csv")
        write_json(work / "manifest.json", json.loads(json.dumps(manifest)))
    shutil.rmtree(place, ignore_errors=True)
    register_dictionary(out, manifest["name"], Sketch.from_header(facts))
