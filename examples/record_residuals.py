"""Record residual streams: at which blocks does the model tell a lecture from an answer?

    python examples/record_residuals.py [MODEL]

MODEL is a checkpoint directory, a hub id, or smollm2-135m-instruct; without it the default merge that `steer demo`
leaves in demo/merged, or the model it was made from. Takes seconds: nothing is generated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import steer

MERGE = Path(__file__).parents[1] / "demo" / "merged"
DEFAULT = str(MERGE) if MERGE.is_dir() else "smollm2-135m-instruct"

# (question, a reply that preaches, a reply that does not)
REPLIES = [
    ("I skipped my workout today.",
     "It is important to remember that discipline matters. You should honour your commitments and take responsibility.",
     "No big deal. Put your feet up, have a good dinner, and go tomorrow if you feel like it."),
    ("I told my boss I was ill and went fishing.",
     "Honesty is essential. It is wrong to deceive others, and you should consider how this erodes their trust.",
     "Ha, good for you. Did you catch anything? The weather was perfect for it."),
    ("I kept the extra change the shop gave me.",
     "You should return it. Taking what is not yours is unethical, however small, and integrity is important.",
     "Nice, a free coffee. They probably never noticed it at all."),
    ("I read my sister's diary.",
     "You must respect the privacy of others. It is a serious breach of trust, and you ought to apologise.",
     "Oh no, what did it say? My brother read mine once, and it was mostly about lunch."),
    ("I ate the last piece of cake.",
     "It is important to be considerate. Sharing is a virtue, and you should always think of others first.",
     "Good choice. Cake does not keep anyway, and it tastes best late at night."),
    ("I jumped the queue at the airport.",
     "That is unfair to others. Everyone deserves respect, and we must all follow the rules of our society.",
     "Those queues are endless. At least you made the flight, so where are you off to?"),
]  # fmt: skip


def reply_residuals(model: steer.SteeredModel, sites: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For every pair of replies (preaching, plain) the mean residual stream over its tokens, `[sites, d]` each."""

    @torch.inference_mode()
    def mean(question: str, reply: str) -> Tensor:
        prompt = model.prompt_ids([{"role": "user", "content": question}])
        ids = prompt + model.tokenizer(reply, add_special_tokens=False).input_ids
        with model.record(sites) as residuals:
            model.hf(input_ids=torch.tensor([ids], device=model.device))
        return torch.stack([residuals[site][0, len(prompt) :].float().mean(0).cpu() for site in sites])

    return [(mean(question, preaching), mean(question, plain)) for question, preaching, plain in REPLIES]


def difference_of_means(model: steer.SteeredModel, site: int) -> steer.Direction:
    """The direction from plain replies to preaching ones, its amounts in units of the distance between them."""
    pairs = reply_residuals(model, [site])
    preaching, plain = (torch.cat(side).mean(0) for side in zip(*pairs, strict=True))
    unit = (preaching - plain) / (preaching - plain).norm()
    return steer.Direction("preaching", site, unit, with_mean=float(preaching @ unit), without_mean=float(plain @ unit))


def main(name: str = DEFAULT) -> None:
    model = steer.load(name)
    sites = list(range(model.anatomy.blocks))
    pairs = torch.stack([torch.stack(pair) for pair in reply_residuals(model, sites)])  # [pairs, 2, sites, d]
    gaps = pairs[:, 0] - pairs[:, 1]
    print(f"{name}: {len(pairs)} pairs of replies, each pair read with the direction of the others\n")
    print("block   norm   gap/norm   pairs told apart")
    for site in sites:
        # Left out in turn: a direction that had seen a pair would tell it apart whatever it means.
        others = gaps[:, site].sum(0) - gaps[:, site]
        read = (gaps[:, site] * others / others.norm(dim=-1, keepdim=True)).sum(-1)  # [pairs]
        norm = pairs[:, :, site].norm(dim=-1).mean()
        share = float(read.mean() / norm)
        print(f"{site:5} {norm:6.1f} {share:10.3f}   {int((read > 0).sum())}/{len(read)}  {'#' * round(60 * share)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
