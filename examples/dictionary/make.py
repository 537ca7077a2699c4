"""Make the dictionary of the default merge again, from the merge to the folder that ships.

    python examples/dictionary/make.py demo/merged

Every step is a `steer` command, printed before it runs, and a step whose output is there is not done again: a stopped
run goes on where it was. Some 80 minutes on two CPU cores, half an hour of them for sae_lens's own trainer
(`--no-peer` leaves that out). What is written goes to `--work`; `--ship` copies it to dictionaries/.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHIPPED = ROOT / "dictionaries" / "smollm2-135m-default-merge" / "14"
STEER = str(Path(sys.executable).with_name("steer"))
SITE = 14
TRAITS = ("moralizing", "compliance")
OPTIONS = {"architecture": "batchtopk", "latents": 4608, "k": 32, "tokens": 5_000_000, "batch": 2048, "lr": 5e-4}


def main(
    model: Annotated[Path, typer.Argument(help="The default merge: `steer merge examples/merge/default.yml merged`.")],
    work: Annotated[Path, typer.Option(help="Where everything on the way goes.")] = Path("demo/dictionary"),
    peer: Annotated[bool, typer.Option(help="Train sae_lens's own way too, on the same activations and steps.")] = True,
    ship: Annotated[bool, typer.Option("--ship", help="Copy the result to dictionaries/.")] = False,
) -> None:
    """Corpus, harvest, train, control, peer, labels, features of both traits, README."""
    work.mkdir(parents=True, exist_ok=True)
    corpus, activations, out = work / "corpus", work / "activations", work / "dictionary"
    if not (corpus / "prose.jsonl.gz").exists():
        run([sys.executable, HERE / "make_corpus.py", model, corpus])
    texts = [x for name in ("chats", "prose") for x in ("--text", corpus / f"{name}.jsonl.gz")]
    if not (activations / "manifest.json").exists():
        run([STEER, "harvest", model, activations, "--site", SITE, *texts, "--context", 256])
    options = [x for name, value in OPTIONS.items() for x in (f"--{name}", value)]
    given = ["--model", model, "--resume"]
    if not out.exists():
        run([STEER, "train", activations, out, *options, *given])
    if not (work / "control").exists():
        run([STEER, "train", activations, work / "control", *options, "--frozen-decoder", *given])
    if peer and not (work / "peer.json").exists():
        (work / "peer.json").write_text(json.dumps(sae_lens_fit(activations), indent=2))
    if not (out / "features.jsonl").exists():
        run([STEER, "features", out, "--label", activations, "--model", model, "--limit", 5])
    for trait in TRAITS:
        if not (out / "traits" / f"{trait}.json").exists():
            run([STEER, "find", model, trait, "--dictionary", out])
    for name, more in (("train", ["--harvest", activations]), ("harvest", ["--model", model])):
        if not (work / f"bench-{name}.json").exists():
            bench = [sys.executable, ROOT / "tests" / "bench" / f"{name}.py", *more, "--json"]
            run(bench, to=work / f"bench-{name}.json")
    figures = readme(work, out)
    (out / "README.md").write_text(figures, encoding="utf-8")
    if ship:
        shutil.rmtree(SHIPPED, ignore_errors=True)
        shutil.copytree(out, SHIPPED)
        file = ROOT / "tests" / "bench" / "README.md"
        marks = r"(<!-- training -->\n).*?(<!-- end of training -->)"
        file.write_text(re.sub(marks, lambda m: m[1] + benches(work) + m[2], file.read_text(), flags=re.DOTALL))
        print(SHIPPED)


def run(command: list[Any], to: Path | None = None) -> None:
    """A command, shown and run, its output kept in a file where one is named; its failure ends this script."""
    words = [str(w) for w in command]
    print("$", shlex.join(words), flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE if to else None, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    if to:
        to.write_text(done.stdout)


def benches(work: Path) -> str:
    """What tests/bench/train.py and harvest.py said, as a table."""
    train = json.loads((work / "bench-train.json").read_text())
    lines = ["| step: width 576, 4,608 latents, k = 32, batch 2,048 | tokens/s | share of the encoder product |",
             "|---|---|---|"]  # fmt: skip
    lines += [f"| {n} | {r['tokens_per_s']:,} | {r['share']:.2f} |" for n, r in train.items() if "share" in r]
    loss = train["loss after equal steps, steer / sae_lens"]
    told = ", ".join(f"{kind} {ratio:.4f}" for kind, ratio in loss.items())
    lines += ["", f"Loss after equal steps from equal weights, over sae_lens's: {told}.", ""]
    harvest = json.loads((work / "bench-harvest.json").read_text())
    shares = ", ".join(f"{n} {v['share']:.3f}" for n, v in harvest.items() if isinstance(v, dict))
    lines += [f"Harvest, as a share of a bare forward pass cut at the same block: {shares}.", ""]
    return "\n".join(["", *lines])


def sae_lens_fit(activations: Path) -> dict[str, Any]:
    """sae_lens's own trainer on the same activations, batches, steps and learning rate, and its held-out fit.

    It is given the input scaled as ours is (its `expected_average_only_in` does the same) and our schedule; everything
    else is its default.
    """
    import sae_lens
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from steer.core.dictionary_files import from_sae
    from steer.core.fit import measure_fit
    from steer.sae.options import TrainOptions
    from steer.sae.shards import Harvest

    torch.manual_seed(0)
    options = TrainOptions(**OPTIONS)  # pyright: ignore[reportArgumentType]
    harvest = Harvest.open(activations)
    batches = harvest.batches(SITE, options.batch)
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=harvest.width, d_sae=options.latents, k=options.k, normalize_activations="expected_average_only_in"
    )
    settings = SAETrainerConfig(
        total_training_samples=options.steps * options.batch, train_batch_size_samples=options.batch, lr=options.lr,
        lr_end=0.0, lr_warm_up_steps=round(options.warmup * options.steps),
        lr_decay_steps=round(options.decay * options.steps), n_batches_for_norm_estimate=8,
    )  # fmt: skip
    rows = (x.float() for x in iter(lambda: next(batches), None))
    sae = SAETrainer(cfg=settings, sae=sae_lens.BatchTopKTrainingSAE(config), data_provider=rows).fit()
    fit = measure_fit(from_sae(sae), harvest.held_out_rows(SITE, 50_000).float().split(16_384))
    return {"fvu": fit.fvu, "l0": fit.l0, "alive": fit.alive, "tokens": fit.tokens, "sae_lens": sae_lens.__version__}


def readme(work: Path, out: Path) -> str:
    """The folder's README, every figure from the files beside it."""
    from steer.verbs.catalogue import trait_tables

    m = json.loads((out / "manifest.json").read_text())
    control = json.loads((work / "control" / "manifest.json").read_text())
    peer = json.loads((work / "peer.json").read_text()) if (work / "peer.json").exists() else None
    fit, ce = m["fit"], m["spliced"]
    rows = [("this dictionary", fit), ("control: random decoder, frozen", control["fit"])]
    rows += [(f"sae_lens {peer['sae_lens']}'s own trainer, same activations and steps", peer)] if peer else []
    table = "\n".join(f"| {name} | {f['fvu']:.4f} | {f['l0']:.1f} | {f['alive']:.1%} |" for name, f in rows)
    parts = [
        f"# Dictionary of the default merge, site {m['site']}",
        f"A {m['options']['architecture']} sparse autoencoder of {m['options']['latents']:,} latents, k = "
        f"{m['options']['k']}, on the residual stream after block {m['site']} of the checkpoint that `steer merge "
        "examples/merge/default.yml OUT` makes. sae_lens layout: `sae_lens.SAE.load_from_disk` loads it, as "
        "jumprelu. Made, and every figure below written, by\n\n"
        "```\npython examples/dictionary/make.py demo/merged --ship\n```",
        f"Trained on {m['options']['tokens']:,} tokens, {m['inputs']['tokens']:,} of them different (chats that the "
        f"merge answered, and prose), at {m['tokens_per_second']:,} tokens/s, {m['share_of_encoder_product']:.2f} of "
        f"the fp32 encoder product alone. Measured on {fit['tokens']:,} tokens of documents never trained on; latents "
        f"dead over the last {m['dead_window_tokens']:,} training tokens: {m['dead']}.",
        f"| held-out | FVU | L0 | latents that fire |\n|---|---|---|---|\n{table}",
    ]
    if ce:
        parts.append(
            f"Cross-entropy on {ce['tokens']:,} held-out tokens: {ce['plain']:.3f} nats as it is, {ce['spliced']:.3f} "
            f"with the reconstruction in the model's place, {ce['ablated']:.3f} with the mean: "
            f"{ce['recovered']:.1%} recovered."
        )
    for t in trait_tables(out):
        head = "| " + " | ".join(t["columns"]) + " |\n|" + "---|" * len(t["columns"])
        body = "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in t["rows"])
        parts.append(f"## {t['trait']}\n\n{head}\n{body}\n\n{t['note']}")
    parts.append(
        "Files: `cfg.json`, `sae_weights.safetensors`, `features.jsonl` (labels and scores), `sliders.yaml`, "
        "`traits/*.json` (steering checks), `training.csv`, `manifest.json`."
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    typer.run(main)
