"""How much of the bare forward pass's rate a harvest keeps, writing included.

    python tests/bench/harvest.py [--model demo/merged] [--json]

All see the same batches, a round of each in turn, and a figure is the median of the rounds' shares of the bare pass
of the same round. The bare pass is a model that ends with the block of the site, no head, no cache, nothing kept;
`output_hidden_states` is the whole model as transformers gives the hidden states away, fp32 or not as it is loaded.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

import steer
from steer.model import attention
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.sae.documents import documents
from steer.sae.harvest import harvest
from steer.sae.passes import batches_by_length, default_batch_tokens

PLAIN = Path(__file__).parents[2] / "steer/measure/texts/plain.txt"
BAR, PEER, FULL = 0.97, 0.985, 0.44


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    text: Annotated[str, typer.Option(help="What is harvested.")] = str(PLAIN),
    site: Annotated[int | None, typer.Option(help="The block; the middle one without.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text, special ones and outliers counted.")] = 32768,
    rounds: Annotated[int, typer.Option(help="Rounds, three at least for a figure to count.")] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print each rate as a share of the bare forward pass, beside its bar."""
    live = steer.load(model)
    # What the harvest uses on a CPU as well, so that the bare pass is no slower for its attention.
    if live.hf.config._attn_implementation == attention.NAME:
        live.hf.set_attn_implementation("sdpa")
    site = live.anatomy.blocks // 2 - 1 if site is None else site
    with tempfile.TemporaryDirectory() as folder:
        file, made = fixed_text(live, text, tokens, Path(folder))
        numbered = enumerate(documents(live, str(file)))
        sorted_by_length = batches_by_length(numbered, default_batch_tokens(live))
        batches = [padded([d.ids for _, d in b])[0] for b in sorted_by_length]
        shares: dict[str, list[float]] = {"harvest": [], "output_hidden_states": []}
        rates: list[float] = []
        bare(live, batches[:1], site)
        for n in range(rounds):
            # The order turns, so that a machine that slows down is no one's fault.
            runs = {
                "bare": lambda: bare(live, batches, site),
                "harvest": lambda n=n: ours(live, file, site, Path(folder) / f"h{n}"),
                "output_hidden_states": lambda: full(live, batches),
            }
            names = list(runs)
            seconds = {name: timed(runs[name]) for name in names[n % 3 :] + names[: n % 3]}
            rates.append(made / seconds["bare"])
            for name, of in shares.items():
                of.append(seconds["bare"] / seconds[name])
    figures = {name: statistics.median(of) for name, of in shares.items()}
    if as_json:
        bars = {"harvest": BAR, "output_hidden_states": FULL}
        out = {name: {"share": s, "bar": bars[name], "rounds": shares[name]} for name, s in figures.items()}
        print(json.dumps({"bare tokens/s": statistics.median(rates), "site": site, **out}, indent=2))
        return
    print(f"bare forward pass to block {site}: {statistics.median(rates):,.0f} tokens/s, {made:,} tokens a round")
    print(f"{'harvest, writing included':34} {figures['harvest']:6.3f}   bar {BAR} (sae_lens without writing {PEER})")
    print(f"{'whole pass, output_hidden_states':34} {figures['output_hidden_states']:6.3f}   (found before {FULL})")


def fixed_text(model: SteeredModel, text: str, tokens: int, folder: Path) -> tuple[Path, int]:
    """A file with the first documents of the text, again and again if need be, and how many tokens they have."""
    lines, made = [], 0
    while made < tokens:
        before = made
        for document in documents(model, text):
            lines.append(json.dumps({"text": model.tokenizer.decode(document.ids)}))
            made += len(document.ids)
            if made >= tokens:
                break
        if made == before:
            raise typer.BadParameter(f"{text} has no text")
    file = folder / "text.jsonl"
    file.write_text("\n".join(lines))
    return file, sum(len(d.ids) for d in documents(model, str(file)))


def timed(run: object) -> float:
    """Seconds, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def bare(model: SteeredModel, batches: Iterable[torch.Tensor], site: int) -> None:
    """The blocks up to the site and nothing else."""
    decoder = model.hf.base_model
    layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = layers[: site + 1], torch.nn.Identity()
    try:
        for ids in batches:
            decoder(input_ids=ids.to(model.device), use_cache=False)
    finally:
        decoder.layers, decoder.norm = layers, norm


def ours(model: SteeredModel, file: Path, site: int, out: Path) -> None:
    """A whole harvest: reading the text, the model, the shards and the manifest on the disk."""
    harvest(model, out, sites=[site], sources=str(file))


@torch.inference_mode()
def full(model: SteeredModel, batches: Iterable[torch.Tensor]) -> None:
    """What a script without hooks does."""
    for ids in batches:
        model.hf(input_ids=ids.to(model.device), use_cache=False, output_hidden_states=True)


if __name__ == "__main__":
    typer.run(main)
