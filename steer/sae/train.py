"""`steer train`: from a harvest, or a model and a text, to a dictionary on disk with its figures.

`train_dictionary` prepares the data, calls the training loop (`train`), measures the result (`splice`) and writes the
dictionary and its manifest. The loss comes from `objectives`. The state of a run is in `OUT.training`; its files are
replaced atomically, so that after a kill the last complete state is left, and a run resumes to the same bits.
"""

from __future__ import annotations

import math
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.dtypes import dtype_name
from steer.checkpoint.library import register_dictionary
from steer.checkpoint.sketch import Sketch
from steer.checkpoint.staging import check_output, staged, write_json
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import load_dictionary, save_dictionary
from steer.core.fit import Fit, measure_fit
from steer.core.lists import as_list
from steer.errors import CheckpointError, MismatchError, OutputExistsError, SteerError, StoppedError, UsageError
from steer.files import locked, one_line, replacing
from steer.model.fit_check import check_fit
from steer.model.steered import SteeredModel, load
from steer.sae import parallel
from steer.sae.documents import documents
from steer.sae.objectives import Objective, Stopwatch, objective_for, settled, start_from
from steer.sae.options import TrainOptions
from steer.sae.passes import ModelStream
from steer.sae.shards import MANIFEST, PARTIAL, Harvest, ShuffledRows, is_held_out
from steer.sae.splice import Spliced, cross_entropies
from steer.sae.training_log import FileLog, TrainingLog, sink_for

HELD_OUT = 50_000
"""Largest number of held-out tokens in the last check."""
SPLICED = 96
"""Number of held-out documents that the cross-entropy is measured on."""
STATE = "state.pt"
"""File of a run's state, except for the position in the data, of which each process writes its part."""
CLIP = 1.0
"""Gradients are clipped to this norm, as in sae_lens."""
CALIBRATION = 8192
"""Number of training rows that `Objective.calibrate` gets at the end."""
CHECKS = 20
"""Number of held-out checks in a run."""
CHECK_TOKENS = 16_384
"""Held-out tokens per check; the last check uses all."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Residual streams of one site, from a harvest or straight from a model."""

    batches: ShuffledRows | ModelStream
    """An endless source of this process's slice of every batch."""
    held_out: Float[Tensor, "n d"]
    """Rows that are never trained on."""
    sample: Float[Tensor, "n d"]
    """Some training rows; the weights are initialised with their mean and scale."""
    inputs: dict[str, Any]
    """A description of the data for the manifest; a resumed run must have the same."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained dictionary and its figures."""

    dictionary: Dictionary
    """The dictionary without site and name, which the caller adds."""
    fit: Fit
    """Fit on all held-out tokens."""
    dead: int
    """Number of latents that did not fire on the last `dead_tokens` tokens of training."""
    seconds: float
    """Seconds spent in training steps, over all sessions of the run."""
    rate: float
    """Training speed, tokens per second."""
    share: float
    """`rate` as a share of the rate of the fp32 encoder product alone, measured in the same run."""
    parts: dict[str, float] = field(default_factory=dict)
    """Part of a step -> share of the time."""


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
    between saved states, `track` also sends the log to a tracker, and `quiet` turns the log off. `options`: size,
    sparsity and learning rate, each with a default. Under `torchrun` every process calls this, and the first one
    writes.

    Errors: UsageError for a source without site or text, CheckpointError for a harvest that was changed,
    MismatchError for a parent or model that does not fit, OutputExistsError where another process trains into `out`,
    StoppedError on SIGTERM or Ctrl-C.

        options = TrainOptions(latents=4608, k=32, tokens=10_000_000)
        result = steer.train_dictionary("harvest", "dictionary", options, site=14)
        print(result.trained.fit.fvu)
    """
    options, out, text = options or TrainOptions(), Path(out), as_list(text)
    check_output(out)
    with parallel.process_group():
        options = settled(options, parallel.local_device())
        live = None if _is_harvest(source) else load(source)
        if live is None:
            data, facts = _from_harvest(source, site, options)
        else:
            data, facts = _from_model(live, site, text, context, options)
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
        taken = "another training is at work in it; wait, or name another output"
        with locked(place, taken) if first else nullcontext():
            log = TrainingLog()
            if first and not quiet:
                log = FileLog(place, sinks=(sink_for(track, place, options),) if track else ())
            trained = train(data, out, options, resume=resume, parent=started, every=every, log=log)
            made = replace(trained.dictionary, site=facts["site"], norm=facts["norm"])
            parent_fit = started.manifest.get("fit") if started is not None else None
            result = TrainedDictionary(made, trained, None, before, parent_fit, options.dead_tokens)
            if first:
                live = live or _model_of(model or facts["checkpoint"], facts)
                if live is not None:
                    result = replace(result, spliced=_splice(live, made, facts, options))
                    facts["fit_on_plain"] = asdict(check_fit(live, made).fit)
                _write(result, out, options, facts, data.inputs)
        parallel.barrier()
    return replace(result, dictionary=load_dictionary(out))


def _is_harvest(source: str | Path) -> bool:
    place = Path(source)
    return not (place / "config.json").exists() and any((place / name).exists() for name in (MANIFEST, PARTIAL))


def _from_harvest(source: str | Path, site: int | None, options: TrainOptions) -> tuple[TrainingData, dict[str, Any]]:
    harvest = Harvest.open(source)
    if site is None:
        if len(harvest.sites) > 1:
            raise UsageError(f"{source}: expected --site, one of {', '.join(map(str, harvest.sites))}, found none")
        site = harvest.sites[0]
    if parallel.rank() == 0:
        harvest.check_contents()
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
    shared = {
        "site": site, "sketch": model.sketch().to_header(), "text": [str(t) for t in text], "context": context,
    }  # fmt: skip
    inputs = {"kind": "stream", **shared, "dtype": dtype_name(model.hf.dtype)}
    facts = {**shared, "norm": stream.norm, "width": stream.width, "checkpoint": model.name}
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


def _write(
    result: TrainedDictionary, out: Path, options: TrainOptions, facts: dict[str, Any], inputs: dict[str, Any]
) -> None:
    d, place = result.dictionary, training_place(out)
    manifest = {
        "name": f"{Path(facts['checkpoint']).name}-L{d.site}-{options.architecture}",
        "site": d.site,
        "norm": d.norm,
        "checkpoint": facts["checkpoint"],
        "sketch": facts["sketch"],
        **result.as_json(),
        "fit_on_plain": facts.get("fit_on_plain"),
        "options": asdict(options),
        "inputs": inputs,
        "text": facts["text"],
        "versions": {p: version(p) for p in ("torch", "transformers", "sae-lens")},
    }
    with staged(out) as work:
        save_dictionary(d, work)
        if (place / "training.csv").exists():
            shutil.copy(place / "training.csv", work / "training.csv")
        write_json(work / "manifest.json", manifest)
    shutil.rmtree(place, ignore_errors=True)
    register_dictionary(out, manifest["name"], Sketch.from_header(facts))


def training_place(out: Path) -> Path:
    """The directory for the state of the run whose result will be `out`: `out.training`."""
    return out.with_name(out.name + ".training")


def train(
    data: TrainingData,
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    parent: Dictionary | None = None,
    every: float = 120.0,
    log: TrainingLog | None = None,
) -> Trained:
    """Train a dictionary, or with `resume` continue a stopped run. The caller writes the result to `out`.

    The state is saved to `out.training` every `every` seconds and on SIGTERM and Ctrl-C, which raise StoppedError. On a
    CPU a resumed run ends with the same bits as one that was never stopped. `parent` is a dictionary whose weights the
    training starts from. `log` receives the figures of every step and check.

    Errors: OutputExistsError when `out.training` holds a stopped run and `resume` is false, MismatchError when that run
    had other options or inputs, StoppedError after SIGTERM or Ctrl-C.
    """
    run = _Run(data, out, options, resume, parent, log or TrainingLog())
    with _stop_signals() as stopped, run.log:
        saved = time.monotonic()
        while run.number < options.steps:
            run.step()
            if run.number % max(1, options.steps // CHECKS) == 0 and run.number < options.steps:
                run.check()
            asked = parallel.stop_requested(bool(stopped))
            # The clock of the first process decides, so that every process saves after the same step.
            due = parallel.stop_requested(parallel.rank() == 0 and time.monotonic() - saved >= every)
            if asked or due:
                run.save()
                saved = time.monotonic()
            if asked:
                raise StoppedError(
                    f"{out}: stopped after step {run.number} of {options.steps}; "
                    "go on with the same command and --resume",
                    128 + (stopped[0] if stopped else signal.SIGTERM),
                )
        run.save()
        return run.finish()


class _Run:
    """The state of one run, and the operations that change it."""

    def __init__(
        self,
        data: TrainingData,
        out: Path,
        options: TrainOptions,
        resume: bool,
        parent: Dictionary | None,
        log: TrainingLog,
    ) -> None:
        self.device = parallel.local_device()
        self.options = settled(options, self.device)
        self.data, self.log = data, log
        self.inputs = {"options": asdict(self.options), "inputs": data.inputs}
        self.place = training_place(out)
        self.watch = Stopwatch(self.device)
        self.number, self.seconds, self.products = 0, 0.0, list[float]()
        self.objective = self._start(parent)
        weights = [weight for _, weight in sorted(self.objective.weights.items())]
        self.optimiser = torch.optim.Adam(weights, fused=True, betas=(0.9, 0.999))
        self.since_fired = torch.zeros(options.latents, dtype=torch.long, device=self.device)
        if (self.place / "state.safetensors").exists():
            raise MismatchError(
                f"{self.place}: expected the state of a training in {STATE}, found that of an older version; finish it "
                "with that version, or remove it"
            )
        if (self.place / STATE).exists():
            if not resume:
                raise OutputExistsError(
                    f"{self.place}: expected no training under way, found one that was stopped; go on with --resume, "
                    "or remove it"
                )
            self._restore()
        self.log.begin(self.number, self.options)

    def _start(self, parent: Dictionary | None) -> Objective:
        """The objective with initial weights, or those of `parent`. Sets the variance of the sample, for FVU."""
        sample = self.data.sample.double()
        norm, *mean = parallel.means(float(sample.norm(dim=1).mean()), *sample.mean(0).tolist())
        width = sample.shape[1]
        scale = width**0.5 / norm
        self.variance = float((sample - sample.mean(0)).square().sum(1).mean()) * scale**2
        objective = objective_for(self.options, width, scale, torch.tensor(mean, dtype=torch.float64), self.device)
        if parent is not None:
            start_from(objective, parent)
        return objective

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.options.lr * self.options.rate_at(self.number)

    def step(self) -> None:
        """Train on one batch and log its figures."""
        begin = time.perf_counter()
        with self.watch("reading"):
            x = next(self.data.batches).to(self.device)
        dead = self.since_fired >= self.options.dead_tokens
        made = self.objective.step(x, dead, self.number, self.watch)
        with self.watch("optimiser"):
            parallel.average_gradients(self.objective.weights.values())
            torch.nn.utils.clip_grad_norm_(self.objective.weights.values(), CLIP, foreach=True)
            self.optimiser.param_groups[0]["lr"] = self.rate
            self.optimiser.step()
        self.since_fired += self.options.batch
        self.since_fired[made.fired.to(self.device)] = 0
        self.number += 1
        self.seconds += time.perf_counter() - begin
        self.log.step(
            {
                "step": self.number,
                "tokens": self.number * self.options.batch,
                "mse": made.mse,
                "aux": made.aux,
                "fvu": made.mse / self.variance,
                "l0": made.l0,
                "dead": int(dead.sum()),
                "lr": self.rate,
                "tokens_per_s": self.number * self.options.batch / self.seconds,
            }
        )

    def check(self) -> None:
        """Measure and log the fit on some held-out tokens, and time the encoder product under the same load."""
        rows = self.data.held_out
        # Spread evenly over the documents, as parts of a text may differ.
        self._check(self.objective.dictionary(), [rows[:: -(-len(rows) // CHECK_TOKENS)]])

    def finish(self) -> Trained:
        """Calibrate the dictionary, measure its fit on all held-out tokens, and return both with the run's figures."""
        self.objective.calibrate(self.data.sample[:CALIBRATION].to(self.device))
        dictionary = self.objective.dictionary()
        fit = self._check(dictionary, self.data.held_out.split(CHECK_TOKENS))
        rate = self.number * self.options.batch / self.seconds
        dead = int((self.since_fired >= self.options.dead_tokens).sum())
        yardstick = self.options.batch / median(self.products)
        return Trained(dictionary, fit, dead, self.seconds, rate, rate / yardstick, self.watch.shares())

    def _check(self, dictionary: Dictionary, batches: Sequence[Tensor]) -> Fit:
        fit = measure_fit(dictionary, batches)
        if not math.isfinite(fit.fvu):
            raise CheckpointError(
                f"{self.place}: expected a finite error after step {self.number}, found {fit.fvu}: activations that "
                "are not finite, as in a changed shard, or a learning rate too large; harvest anew, or lower --lr"
            )
        # Time `x @ W_enc` for a batch in fp32, forward only, three times: training speed is compared with it.
        encoder = self.objective.weights["encoder"].data
        encoder = encoder if encoder.shape[0] == self.options.latents else encoder.T
        rows = torch.arange(self.options.batch // parallel.world()) % len(self.data.held_out)
        x = self.data.held_out[rows].to(self.device).float()
        for _ in range(3):
            watch = Stopwatch(self.device)
            with watch("product"):
                torch.matmul(x, encoder.T)
            self.products.append(watch.seconds["product"])
        self.log.check({"step": self.number, "held_out_fvu": fit.fvu, "held_out_l0": fit.l0}, self.watch.shares())
        return fit

    def save(self) -> None:
        """Write the state of the run to disk, then the log's rows up to it.

        Every process writes its position in the data, and the first one all the rest, which is written last and names
        its step, so it is never combined with the data of another step.
        """
        data_file = self._data_file(self.number)
        _replace(data_file, self.data.batches.state_dict())
        parallel.barrier()
        if parallel.rank() == 0:
            state = {
                **self.inputs,
                "processes": parallel.world(),
                "step": self.number,
                "objective": self.objective.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "since_fired": self.since_fired,
                "rng": torch.get_rng_state(),
                "time": {"seconds": self.seconds, "products": self.products, "parts": self.watch.seconds},
            }
            _replace(self.place / STATE, state)
        parallel.barrier()
        for file in self.place.glob(f"data-{parallel.rank()}-*.pt"):
            if file != data_file:
                file.unlink()
        self.log.flush()

    def _restore(self) -> None:
        """Set this run to its saved state. Errors: CheckpointError for a file that cannot be read, MismatchError when
        the run had other options or inputs, or another number of processes."""
        state = _read(self.place / STATE)
        if state["processes"] != parallel.world():
            raise MismatchError(
                f"{self.place}: expected {state['processes']} processes, as the run was started with, found "
                f"{parallel.world()}; launch as many"
            )
        for what, values in self.inputs.items():
            for key, value in values.items():
                if (was := state[what].get(key)) != value:
                    raise MismatchError(
                        f"{self.place}: expected {key} = {was!r}, as the run was started with, found {value!r}; "
                        "give the same, or remove the directory"
                    )
        self.number = state["step"]
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.since_fired.copy_(state["since_fired"])
        torch.set_rng_state(state["rng"])
        self.data.batches.load_state_dict(_read(self._data_file(self.number)))
        self.seconds, self.products, self.watch.seconds = state["time"].values()

    def _data_file(self, step: int) -> Path:
        return self.place / f"data-{parallel.rank()}-{step}.pt"


def _replace(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as part:
        torch.save(state, part)


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise CheckpointError(
            f"{path}: expected the state of a stopped training, found {one_line(e)}; remove {path.parent} and start "
            "again"
        ) from e


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C in a list, so that the loop can stop after its step. A second Ctrl-C stops at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        seen.append(number)

    caught = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {n: signal.signal(n, note) for n in caught}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
