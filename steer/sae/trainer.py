"""The training loop: steps, held-out checks, and checkpoints from which a run resumes to the same bits.

`train.train_dictionary` calls it with `TrainingData`. The loss comes from `objectives` and `architectures`, the state
on disk from `checkpoints`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.fit import Fit, measure_fit
from steer.errors import MismatchError, OutputExistsError, StoppedError
from steer.sae import parallel
from steer.sae.architectures import objective_for
from steer.sae.checkpoints import STATE, TrainingState, load_state, save_state, training_place
from steer.sae.objectives import Objective, settled, start_from
from steer.sae.options import TrainOptions
from steer.sae.shards import Batches
from steer.sae.stopwatch import Stopwatch
from steer.sae.training_log import TrainingLog

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

    batches: Batches
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
        options = settled(options, self.device)
        self.data, self.options, self.log = data, options, log
        self.place = training_place(out)
        self.watch = Stopwatch(self.device)
        self.seconds, self.products = 0.0, list[float]()
        self.facts = {"options": options.as_json(), "inputs": data.inputs}
        self.objective = self._start(parent)
        self.names = sorted(self.objective.weights)
        self.optimiser = torch.optim.Adam(
            [self.objective.weights[n] for n in self.names], lr=options.lr, fused=True, betas=(0.9, 0.999)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, options.rate_at)
        self.since_fired = torch.zeros(options.latents, dtype=torch.long, device=self.device)
        self.number = 0
        stopped_run = (self.place / STATE).exists()
        if stopped_run and not resume:
            raise OutputExistsError(
                f"{self.place}: expected no training under way, found one that was stopped; go on with --resume, or "
                "remove it"
            )
        if stopped_run:
            self._restore(load_state(self.place))
        self.log.begin(self.number, options)

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
            self.optimiser.step()
            self.schedule.step()
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
                "lr": self.schedule.get_last_lr()[0],
                "tokens_per_s": self.number * self.options.batch / self.seconds,
            }
        )

    def check(self) -> None:
        """Measure and log the fit on some held-out tokens, and time the encoder product under the same load."""
        rows = self.data.held_out
        # Spread evenly over the documents, as parts of a text may differ.
        fit = measure_fit(self.objective.dictionary(), [rows[:: -(-len(rows) // CHECK_TOKENS)]])
        self._time_product()
        self.log.check({"step": self.number, "held_out_fvu": fit.fvu, "held_out_l0": fit.l0}, self.watch.shares())

    def save(self) -> None:
        """Write the state of the run to disk, then the log's rows up to it."""
        moments = {}
        for name, weight in zip(self.names, self.optimiser.param_groups[0]["params"], strict=True):
            adam = self.optimiser.state.get(weight, {})
            moments |= {f"{name}.{k}": adam[k] for k in ("exp_avg", "exp_avg_sq") if k in adam}
        facts = self.facts | {"seconds": self.seconds, "products": self.products, "parts": self.watch.seconds}
        weights = {n: p.data for n, p in self.objective.weights.items()}
        save_state(
            self.place,
            TrainingState(
                self.number, weights, moments, self.objective.buffers(), self.since_fired, torch.get_rng_state(),
                self.data.batches.state_dict(), facts,
            ),
        )  # fmt: skip
        self.log.flush()

    def _restore(self, state: TrainingState) -> None:
        """Set this run to a saved state. Errors: MismatchError when it had other options or inputs."""
        for what in ("options", "inputs"):
            for key, value in self.facts[what].items():
                was = state.facts[what].get(key)
                if was != value:
                    raise MismatchError(
                        f"{self.place}: expected {key} = {was!r}, as the run was started with, found {value!r}; "
                        "give the same, or remove the directory"
                    )
        for name, weight in self.objective.weights.items():
            weight.data.copy_(state.weights[name])
            if f"{name}.exp_avg" in state.moments:
                self.optimiser.state[weight] = {
                    "step": torch.tensor(float(state.step), device=self.device),
                    "exp_avg": state.moments[f"{name}.exp_avg"].to(self.device),
                    "exp_avg_sq": state.moments[f"{name}.exp_avg_sq"].to(self.device),
                }
        self.objective.load_buffers(state.buffers)
        self.since_fired.copy_(state.since_fired)
        torch.set_rng_state(state.rng)
        self.data.batches.load_state_dict(state.data)
        self.number = state.step
        # The schedule's only state is the number of the step.
        self.schedule.last_epoch = state.step
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.lr * self.options.rate_at(state.step)
        self.schedule._last_lr = [g["lr"] for g in self.optimiser.param_groups]
        self.seconds, self.products = state.facts["seconds"], state.facts["products"]
        self.watch.seconds = state.facts["parts"]

    def _time_product(self) -> None:
        """Time `x @ W_enc` for a batch in fp32, forward only, three times: training speed is compared with it."""
        encoder = self.objective.weights["encoder"].data
        encoder = encoder if encoder.shape[0] == self.options.latents else encoder.T
        x = self.data.held_out[: self.options.batch // parallel.world()].to(self.device).float()
        x = x.repeat(-(-self.options.batch // (parallel.world() * len(x))), 1)[: self.options.batch // parallel.world()]
        for _ in range(3):
            watch = Stopwatch(self.device)
            with watch("product"):
                torch.matmul(x, encoder.T)
            self.products.append(watch.seconds["product"])

    def finish(self) -> Trained:
        """Calibrate the dictionary, measure its fit on all held-out tokens, and return both with the run's figures."""
        self.objective.calibrate(self.data.sample[:CALIBRATION].to(self.device))
        dictionary = self.objective.dictionary()
        rows = self.data.held_out
        fit = measure_fit(dictionary, [rows[a : a + CHECK_TOKENS] for a in range(0, len(rows), CHECK_TOKENS)])
        self._time_product()
        rate = self.number * self.options.batch / self.seconds
        dead = int((self.since_fired >= self.options.dead_tokens).sum())
        self.log.check({"step": self.number, "held_out_fvu": fit.fvu, "held_out_l0": fit.l0}, self.watch.shares())
        yardstick = self.options.batch / median(self.products)
        return Trained(dictionary, fit, dead, self.seconds, rate, rate / yardstick, self.watch.shares())


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C in a list, so that the loop can stop after its step. A second Ctrl-C stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        seen.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
