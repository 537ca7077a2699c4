"""How many votes a taste takes: simulated voters whose taste is known, and what the slider of their votes does.

    python examples/traits/voters.py MODEL OUT [--readme]

A voter sees two replies of the model to one message and prefers the one to which a trait's text scorer gives the higher
log-odds, or neither if these differ by less than a standard deviation; or sees one reply and gives a thumb up or down
if its log-odds are half a standard deviation beyond the median. 10, 20 or 40 % of the votes are then flipped. Replies
are written and read once and shared by all voters, numbers of votes and seeds.

Writes into OUT replies.json, means.safetensors and voters.json; what is there is not made again. --readme writes the
table into README.md. On the default merge and two cores some fifteen minutes.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Int
from safetensors.torch import load_file, save_file

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.core.trait import NeutralPrompts, TopicPool, spread
from steer.files import replacing, write_atomic
from steer.finding.directions import in_band, with_statistics
from steer.finding.taste import Ballots, CrossFit, cross_fit
from steer.measure.contrast import Reply
from steer.measure.harness import Numbers, mean_repetition, replies_under
from steer.measure.scorer import Scorer
from steer.model.loaded import as_messages
from steer.model.steered import SteeredModel, load
from steer.progress import bar

TASTES = ("moralizing", "compliance")
FLIPPED = (0.1, 0.2, 0.4)
NUMBERS = (20, 40, 80, 160, 320)
"""Numbers of votes."""
SEEDS = 10
"""Voters per number: each votes on other replies, in another order."""
SAMPLES = 6
"""Replies to each message."""
TOKENS = 48
CLEAR = 1.0
"""Standard deviations of log-odds by which two replies must differ for a voter to prefer one."""
GOAL = 0.75
TOPICS = 40
"""Held-out messages that are answered under each slider."""


def main(
    model: str,
    out: Path,
    readme: Annotated[bool, typer.Option(help="Write the table into README.md.")] = False,
    dtype: str = "auto",
) -> None:
    """Make what is missing in OUT and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    live = load(model, dtype=dtype)
    pool = TopicPool.load()
    parts = {"fit": pool.fit, "held_out": pool.held_out, "neutral": NeutralPrompts.load().fit[:16]}
    if not (out / "means.safetensors").is_file():
        write(live, parts, out)
    texts: dict[str, list[str]] = json.loads((out / "replies.json").read_text())
    means = load_file(out / "means.safetensors")
    neutral = [
        Reply.of(live, as_messages(p), live.encode(t)) for p, t in zip(parts["neutral"], texts["neutral"], strict=True)
    ]
    done = out / "voters.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.is_file() else []
    for taste in TASTES:
        scorer = Scorer.shipped(taste)
        truth = {part: scorer.log_odds(texts[part]) for part in ("fit", "held_out")}
        untouched = steered(live, None, scorer, 0.0)
        for flipped in FLIPPED:
            if any((row["taste"], row["flipped"]) == (taste, flipped) for row in rows):
                continue
            tried = {
                (kind, n): [vote(means, truth, live.anatomy.blocks, flipped, n, seed, kind) for seed in range(SEEDS)]
                for kind in ("pairs", "thumbs") for n in NUMBERS
            }  # fmt: skip
            row: dict[str, Any] = {"taste": taste, "flipped": flipped, "accuracy": {}, "told": {}, "needed": {}}
            for kind in ("pairs", "thumbs"):
                row["accuracy"][kind] = {str(n): float(np.mean([t[1] for t in tried[kind, n]])) for n in NUMBERS}
                row["told"][kind] = {
                    str(n): float(np.mean([t[0].nested.mean() for t in tried[kind, n]])) for n in NUMBERS
                }
                row["needed"][kind] = next((int(n) for n, a in row["accuracy"][kind].items() if a >= GOAL), None)
            row["votes"] = row["needed"]["pairs"] or NUMBERS[-1]
            fit = tried["pairs", row["votes"]][0][0]
            direction = with_statistics(live, fit.direction("taste", live.anatomy.blocks), neutral, {})
            row |= {"site": direction.site, "share": direction.share(1)}
            row["steered"] = {str(a): steered(live, direction, scorer, a) if a else untouched for a in (-1.0, 0.0, 1.0)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_atomic(out / "voters.json", json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if readme:
        file = Path(__file__).parents[2] / "README.md"
        marks = r"(<!-- voters -->\n).*?(<!-- end of voters -->)"
        text = re.sub(marks, lambda m: m[1] + table(rows) + m[2], file.read_text(), flags=re.DOTALL)
        write_atomic(file, text)


def write(model: SteeredModel, parts: dict[str, tuple[str, ...]], out: Path) -> None:
    """Write and read the untouched replies: their texts, and their mean residual streams at the sites that steer."""
    samples = {name: 1 if name == "neutral" else SAMPLES for name in parts}
    chats = [as_messages(prompt) for name, prompts in parts.items() for prompt in prompts for _ in range(samples[name])]
    sums = torch.zeros(model.anatomy.blocks, len(chats), model.anatomy.width, device=model.device)
    sampler = replace(MEASURE, max_new_tokens=TOKENS)
    with bar("replies", len(chats) * TOKENS, "tokens") as advance, model.untouched():
        made = model.replies(chats, sampler, on_tokens=advance, sums=sums, thoughts=False)
    lengths = torch.tensor([max(1, len(ids)) for ids in made])
    means = (sums.cpu() / lengths[:, None]).movedim(1, 0)[:, in_band(range(model.anatomy.blocks), model.anatomy.blocks)]
    sizes = [len(prompts) * samples[name] for name, prompts in parts.items()]
    replies = iter(model.text(ids) for ids in made)
    texts = {name: [next(replies) for _ in range(size)] for name, size in zip(parts, sizes, strict=True)}
    write_atomic(out / "replies.json", json.dumps(texts, indent=1) + "\n")
    with replacing(out / "means.safetensors") as part:
        save_file({name: m.contiguous() for name, m in zip(parts, means.split(sizes), strict=True)}, part)


def vote(
    means: dict[str, torch.Tensor],
    truth: dict[str, Numbers],
    depth: int,
    flipped: float,
    number: int,
    seed: int,
    kind: str,
) -> tuple[CrossFit, float]:
    """Let a voter vote, and return what is made of the votes, and the share of clear pairs of replies to held-out
    messages that it puts in the order of the voter's true taste."""
    rng, scores = np.random.default_rng(seed), truth["fit"]
    if kind == "pairs":
        shown = rng.permutation(clear_pairs(scores))[:number]
        liked, disliked = np.take_along_axis(shown, np.argsort(-scores[shown], axis=1, kind="stable"), axis=1).T
    else:
        beyond = scores - np.median(scores)
        single = rng.permutation(np.flatnonzero(abs(beyond) > CLEAR / 2 * scores.std()))[:number]
        liked, disliked = np.where(beyond[single] > 0, single, -1), np.where(beyond[single] > 0, -1, single)
    flip = rng.random(number) < flipped
    liked, disliked = np.where(flip, disliked, liked), np.where(flip, liked, disliked)
    messages = tuple(str(max(pair) // SAMPLES) for pair in zip(liked, disliked, strict=True))
    sites = in_band(range(depth), depth)
    fit = cross_fit(means["fit"], means["neutral"].mean(0), Ballots(liked, disliked, messages), sites, depth)
    direction = fit.direction("taste", depth)
    read = (means["held_out"][:, sites.index(direction.site)] @ direction.vector).numpy()
    first, second = clear_pairs(truth["held_out"]).T
    order, true_order = read[first] - read[second], truth["held_out"][first] - truth["held_out"][second]
    return fit, float((order * true_order > 0).mean())


def clear_pairs(scores: Numbers) -> Int[np.ndarray, "pairs 2"]:
    """Indices of the pairs of replies to one message between which the voter sees a difference."""
    first, second = np.triu_indices(SAMPLES, 1)
    starts = np.arange(0, len(scores), SAMPLES)[:, None]
    pairs = np.stack([(starts + first).ravel(), (starts + second).ravel()], 1)
    return pairs[abs(scores[pairs[:, 0]] - scores[pairs[:, 1]]) > CLEAR * scores.std()]


def steered(model: SteeredModel, direction: Direction | None, scorer: Scorer, amount: float) -> dict[str, float]:
    """The rate of the liked trait in replies to held-out messages under the slider, and their repetition."""
    edit = None if direction is None else Edit(add=((direction, amount),))
    prompts = spread(TopicPool.load().held_out, TOPICS)
    with model.untouched():
        (made,) = replies_under(model, prompts, [edit], replace(MEASURE, max_new_tokens=TOKENS))
    texts = [r.text for r in made]
    return {
        "rate": scorer.rate(texts),
        "log_odds": float(scorer.log_odds(texts).mean()),
        "repetition": mean_repetition([r.ids for r in made]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the votes that each taste takes, and of what the slider of so many pairs does."""
    last = NUMBERS[-1]

    def needed(row: dict[str, Any], kind: str) -> str:
        found = row["needed"][kind]
        return str(found) if found else f"over {last} ({row['accuracy'][kind][str(last)]:.2f})"

    lines = [
        "| liked | votes flipped | pairs until 0.75 | thumbs until 0.75 | slider of | says of held-out votes | "
        "rate at -1 | at 0 | at +1 | repetition at +1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = [f"{row['steered'][a]['rate']:.2f}" for a in ("-1.0", "0.0", "1.0")]
        cells = [
            row["taste"], f"{row['flipped']:.0%}", needed(row, "pairs"), needed(row, "thumbs"), f"{row['votes']} pairs",
            f"{row['told']['pairs'][str(row['votes'])]:.2f}", *rates, f"{row['steered']['1.0']['repetition']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    head = (
        "Simulated voters whose taste is known (`examples/traits/voters.py`, default merge): they prefer the reply\n"
        "that a trait's text scorer prefers by over a standard deviation, and some votes are flipped. Accuracy\n"
        f"is on such pairs of replies to other messages, unflipped, mean of {SEEDS} voters:"
    )
    return "\n".join([head, "", *lines, ""])


if __name__ == "__main__":
    typer.run(main)
