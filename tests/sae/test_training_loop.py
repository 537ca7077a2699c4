"""The training loop: it learns, it goes on to the same bits, two processes are one, and a kill loses an interval."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import fork
from safetensors.torch import load_file

from steer.errors import CheckpointError, MismatchError, OutputExistsError, StoppedError
from steer.sae.options import TrainOptions
from steer.sae.shards import Activations, ShuffledRows
from steer.sae.train import STATE, TrainingData, train, training_place
from steer.sae.training_log import FileLog

WIDTH = 32
OPTIONS = TrainOptions(
    architecture="topk", latents=128, k=6, tokens=64 * 60, batch=64, lr=3e-3, dead_tokens=64 * 10, products="float32"
)


def rows(count: int = 2000, seed: int = 0) -> torch.Tensor:
    """Sparse sums of hidden directions, which a dictionary can learn."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(42))
    on = (torch.rand(count, 96, generator=g) < 0.04) * torch.rand(count, 96, generator=g)
    return (4 * on @ hidden + 1).bfloat16()


def data(batch: int = 64, **shares: int) -> TrainingData:
    x = rows()
    batches = ShuffledRows(Activations([x]), torch.arange(len(x)), batch, 0, **{"rank": 0, "world": 1} | shares)
    return TrainingData(batches, rows(500, seed=1), x[:1000], {"kind": "test"})


def saved(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's saved state."""
    flat, state = {}, torch.load(training_place(out) / STATE, weights_only=True)

    def collect(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}" if name else str(key), inner)

    collect("", state)
    return flat


class Stop:
    """A log that asks to stop at a step, as a user does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __getattr__(self, name: str):
        return lambda *a, **k: None

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def step(self, row: dict) -> None:
        if row["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_training_explains_variance_that_was_held_out(tmp_path, architecture):
    options = replace(OPTIONS, architecture=architecture, tokens=64 * 300)
    made = train(data(), tmp_path / "d", options)
    assert made.fit.fvu < 0.6
    assert made.fit.tokens == 500
    assert made.rate > 0
    assert made.share > 0


def test_a_frozen_random_decoder_explains_less(tmp_path):
    options = replace(OPTIONS, tokens=64 * 300)
    trained = train(data(), tmp_path / "a", options)
    control = train(data(), tmp_path / "b", replace(options, frozen_decoder=True))
    assert control.fit.fvu > trained.fit.fvu + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_a_stopped_run_goes_on_to_bit_identical_weights(tmp_path, architecture):
    options = replace(OPTIONS, architecture=architecture)
    whole = train(data(), tmp_path / "whole", options)
    with pytest.raises(StoppedError, match=r"step 23 of 60.*--resume") as stopped:
        train(data(), tmp_path / "parts", options, log=Stop(23))
    assert stopped.value.exit_code == 143
    with pytest.raises(OutputExistsError, match="--resume"):
        train(data(), tmp_path / "parts", options)
    resumed = train(data(), tmp_path / "parts", options, resume=True)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        a, b = getattr(whole.dictionary, name), getattr(resumed.dictionary, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    ours, theirs = (saved(tmp_path / name) for name in ("whole", "parts"))
    assert ours.keys() == theirs.keys()
    # torch's own generator is left out: the runs began at different places of its stream, and no step draws from it.
    assert {k for k in ours if not torch.equal(ours[k], theirs[k])} <= {"rng"}


def test_a_run_resumed_with_other_options_or_data_is_refused(tmp_path):
    with pytest.raises(StoppedError):
        train(data(), tmp_path / "d", OPTIONS, log=Stop(5))
    with pytest.raises(MismatchError, match=r"expected lr = 0\.003.*found 0\.01"):
        train(data(), tmp_path / "d", replace(OPTIONS, lr=0.01), resume=True)
    with pytest.raises(MismatchError, match="expected kind = 'test'"):
        train(replace(data(), inputs={"kind": "other"}), tmp_path / "d", OPTIONS, resume=True)


def test_activations_that_are_not_finite_never_become_a_dictionary(tmp_path):
    """As of a shard whose bytes were changed."""
    x = rows()
    x[1500] = float("nan")
    given = replace(data(), batches=ShuffledRows(Activations([x]), torch.arange(len(x)), 64, 0))
    with pytest.raises(
        CheckpointError, match=r"expected a finite error after step .*, found nan: .*; harvest anew, or"
    ):
        train(given, tmp_path / "out", OPTIONS)


def test_a_state_that_cannot_be_read_is_one_line(tmp_path):
    place = training_place(tmp_path / "d")
    place.mkdir()
    for rubbish in (b"", b"no state", b"PK\x03\x04 cut"):
        (place / STATE).write_bytes(rubbish)
        with pytest.raises(CheckpointError, match="expected the state of a stopped training") as e:
            train(data(), tmp_path / "d", OPTIONS, resume=True)
        assert "\n" not in str(e.value)


def test_the_log_holds_each_step_once_across_a_stop(tmp_path):
    place = training_place(tmp_path / "d")

    class StopLog(FileLog):
        def step(self, row):
            super().step(row)
            if row["step"] == 25:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        train(data(), tmp_path / "d", OPTIONS, log=StopLog(place))
    train(data(), tmp_path / "d", OPTIONS, log=FileLog(place), resume=True)
    with open(place / "training.csv", newline="") as f:
        found = list(csv.DictReader(f))
    steps = [int(r["step"]) for r in found if not r["held_out_fvu"]]
    assert steps == sorted(set(steps))
    assert {10, 20, 30, 40, 50, 60} <= set(steps)
    checks = [float(r["held_out_fvu"]) for r in found if r["held_out_fvu"]]
    assert len(checks) >= 19
    assert checks[-1] < checks[0]


SCRIPT = """
import sys, json
from dataclasses import replace
sys.path.insert(0, {tests!r})
from sae.test_training_loop import OPTIONS, data
from steer.sae import parallel
from steer.sae.train import train
from pathlib import Path
out, architecture, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
with parallel.process_group():
    options = replace(OPTIONS, architecture=architecture, tokens=64 * steps)
    made = train(data(rank=parallel.rank(), world=parallel.world()), Path(out), options)
    if parallel.rank() == 0:
        from steer.core.dictionary_files import save_dictionary
        Path(out).mkdir()
        save_dictionary(made.dictionary, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_two_processes_are_one_on_the_joined_batch(tmp_path, architecture):
    """Few steps: rounding grows from step to step, through the choice of latents, in any two runs."""
    one = train(data(), tmp_path / "one", replace(OPTIONS, architecture=architecture, tokens=64 * 8))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(29_500 + os.getpid() % 2000)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    subprocess.run([*command, str(script), str(tmp_path / "two"), architecture, "8"], check=True, env=env)
    two = load_file(tmp_path / "two" / "sae_weights.safetensors")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        a, b = getattr(one.dictionary, name), two[name]
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * float(a.abs().max())), (name, float((a - b).abs().max()))


def test_a_killed_run_loses_at_most_the_last_interval(tmp_path, forkserver):
    out, options = tmp_path / "d", replace(OPTIONS, tokens=64 * 4000)
    run = fork(forkserver, _train, out, options)
    state = training_place(out) / STATE
    try:
        deadline = time.monotonic() + 120
        while not state.exists():
            assert run.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
    finally:
        run.kill()
        run.join()
    assert not out.exists()
    assert torch.load(state, weights_only=True)["step"] > 0
    resumed = train(data(), out, options, resume=True).dictionary
    whole = train(data(), tmp_path / "whole", options).dictionary
    assert torch.equal(whole.W_enc, resumed.W_enc)
    assert torch.equal(whole.W_dec, resumed.W_dec)


def _train(out: Path, options: TrainOptions) -> None:
    torch.set_num_threads(1)
    train(data(), out, options, every=0.3)
