"""How fast dictionaries are trained: steps of ours, sae_lens's and eai-sparsify's beside the encoder product alone.

    python tests/bench/train.py [--harvest DIR --site L] [--width 576 --latents 4608 --k 32 --batch 2048] [--json]

A rate is tokens a second of whole training steps, optimiser included, on activations in memory. A share is the
rate over that of the fp32 product `x @ W_enc`, forward only, in the same run; everything is interleaved, and the
figures are medians. With `--harvest` the activations are real, and the loss after equal steps is compared too.
On a GPU try --width 4096 --latents 65536 --k 64.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from steer.sae.objectives import Stopwatch, objective_for
from steer.sae.options import TrainOptions
from steer.sae.shards import Harvest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[torch.Tensor], float]
"""A training step: batch in, loss out."""
BARS = {"steer topk": 0.5, "steer batchtopk": 0.5}
LR = 5e-4


def main(
    harvest: Annotated[Path | None, typer.Option(help="Real activations; random ones without it.")] = None,
    site: Annotated[int | None, typer.Option(help="Site of the harvest; its first without it.")] = None,
    width: int = 576,
    latents: int = 4608,
    k: int = 32,
    batch: int = 2048,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; each figure is the median.")] = 7,
    steps: Annotated[int, typer.Option(help="Steps over which the losses are compared, with --harvest.")] = 100,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print each rate, its share of the encoder product's, and its bar."""
    torch.manual_seed(0)
    batches = real(harvest, site, batch) if harvest else made_up(width, batch)
    width = batches[0].shape[1]
    options = TrainOptions(latents=latents, k=k, batch=batch, tokens=10**9, warmup=0.0, decay=0.0, lr=LR)
    mean = torch.cat(batches).double().mean(0)
    scale = width**0.5 / float(torch.cat(batches).float().norm(dim=1).mean())
    product = torch.randn(width, latents, device=DEVICE)
    watch = Stopwatch(DEVICE)
    contestants: dict[str, Step] = {}
    for kind in ("topk", "batchtopk"):
        contestants[f"steer {kind}"] = ours(kind, options, width, scale, mean, watch)
        contestants[f"sae_lens {kind}"] = sae_lens_step(kind, options, width, scale, mean, autocast=False)
    contestants["sae_lens topk, autocast"] = sae_lens_step("topk", options, width, scale, mean, autocast=True)
    if (peer := sparsify_step(options, width, scale)) is not None:
        contestants["eai-sparsify topk"] = peer
    rate = {name: batch / s for name, s in timed(contestants, batches, product, rounds).items()}
    result: dict[str, Any] = {
        name: {"tokens_per_s": round(r), "share": round(r / rate["encoder product, fp32"], 3), "bar": BARS.get(name)}
        for name, r in rate.items()
    }
    result["where steer's time goes"] = {part: round(share, 3) for part, share in watch.shares().items()}
    if harvest:
        result["loss after equal steps, steer / sae_lens"] = {
            kind: round(loss_ratio(kind, options, width, scale, mean, batches, steps), 4)
            for kind in ("topk", "batchtopk")
        }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, row in result.items():
        if "share" in row:
            bar = f"   bar {row['bar']}" if row["bar"] else ""
            print(f"{name:28} {row['tokens_per_s']:>10,} tokens/s   share {row['share']:.2f}{bar}")
        else:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if peer is None:
        print("eai-sparsify topk: not installed; pip install eai-sparsify")


def made_up(width: int, batch: int) -> list[torch.Tensor]:
    """Activations of low rank plus noise, so that a dictionary has something to find."""
    mix = torch.randn(width // 4, width)
    return [(torch.randn(batch, width // 4) @ mix + torch.randn(batch, width)).bfloat16().to(DEVICE) for _ in range(16)]


def real(place: Path, site: int | None, batch: int) -> list[torch.Tensor]:
    """Batches of a harvest."""
    harvest = Harvest.open(place)
    source = harvest.batches(harvest.sites[0] if site is None else site, batch)
    return [next(source).to(DEVICE) for _ in range(64)]


def ours(
    kind: str, options: TrainOptions, width: int, scale: float, mean: torch.Tensor, watch: Stopwatch | None = None
) -> Step:
    """A step of this project's own training."""
    from dataclasses import replace

    objective = objective_for(replace(options, architecture=kind), width, scale, mean, DEVICE)  # pyright: ignore
    weights = list(objective.weights.values())
    optimiser = torch.optim.Adam(weights, lr=LR, fused=True)
    dead = torch.zeros(options.latents, dtype=torch.bool, device=DEVICE)
    watch, count = watch or Stopwatch(DEVICE), iter(range(10**9))

    def step(x: torch.Tensor) -> float:
        made = objective.step(x, dead, next(count), watch)
        with watch("optimiser"):
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
            optimiser.step()
        return made.mse

    return step


def sae_lens_step(
    kind: str, options: TrainOptions, width: int, scale: float, mean: torch.Tensor, *, autocast: bool
) -> Step:
    """A step of sae_lens's own trainer, from the same initial weights."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK"}[kind]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=width, d_sae=options.latents, k=options.k, device=str(DEVICE)
    )
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    start = objective_for(options, width, scale, mean, DEVICE).weights
    with torch.no_grad():
        sae.W_enc.copy_(start["encoder"].T)
        sae.W_dec.copy_(start["decoder"])
        sae.b_dec.copy_(start["b_dec"])
    settings = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=options.batch, lr=LR, lr_end=LR, device=str(DEVICE),
        autocast=autocast, dead_feature_window=10**9,
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))

    def step(x: torch.Tensor) -> float:
        out = trainer.step(x.float() * scale)
        trainer.n_training_steps += 1
        return float(out.losses["mse_loss"].detach())

    return step


def sparsify_step(options: TrainOptions, width: int, scale: float) -> Step | None:
    """A step as eai-sparsify's trainer does it: FVU, its decoder's gradient and norm kept in hand."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        return None
    coder = SparseCoder(width, SparseCoderConfig(num_latents=options.latents, k=options.k), device=DEVICE)
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR)
    dead = torch.zeros(options.latents, dtype=torch.bool, device=DEVICE)

    def step(x: torch.Tensor) -> float:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x.float() * scale, dead_mask=dead)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(out.fvu.detach())

    return step


def timed(
    contestants: dict[str, Step], batches: list[torch.Tensor], product: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of a step of each, and of the encoder product, taken in turns."""
    wide = [x.float() for x in batches[:4]]
    runs: dict[str, Callable[[int], object]] = {"encoder product, fp32": lambda n: wide[n % 4] @ product}
    runs |= {name: lambda n, step=step: step(batches[n % len(batches)]) for name, step in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + 1):
        for name, run in runs.items():
            for again in range(3):
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run(3 * n + again)
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                if n:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def loss_ratio(
    kind: str,
    options: TrainOptions,
    width: int,
    scale: float,
    mean: torch.Tensor,
    batches: list[torch.Tensor],
    steps: int,
) -> float:
    """Mean squared error over the last tenth of equal steps, ours over sae_lens's."""
    with contextlib.redirect_stderr(io.StringIO()):
        pair = [
            ours(kind, options, width, scale, mean),
            sae_lens_step(kind, options, width, scale, mean, autocast=False),
        ]
    losses = [[step(batches[n % len(batches)]) for n in range(steps)] for step in pair]
    tail = max(1, steps // 10)
    return statistics.mean(losses[0][-tail:]) / statistics.mean(losses[1][-tail:])


if __name__ == "__main__":
    typer.run(main)
