"""Steer a model from Python: find a trait, move it, read the residual stream, bake it.

    python examples/steer_in_python.py MODEL [TRAIT]

MODEL is a checkpoint directory, a hub id, or smollm2-135m-instruct; the default merge that `steer demo` leaves in
demo/merged has its directions shipped with the repository.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import steer


def main(name: str, trait: str = "moralizing") -> None:
    model = steer.load(name)
    message = "I told my friend that I was ill, and went to the beach instead."

    # By name, where a direction of this checkpoint ships or was found before; else: steer.find(model, trait)
    direction = model.sliders.slider(trait).target
    assert isinstance(direction, steer.Direction)
    print(f"{trait}: site {direction.site}, amount 1 moves {direction.share(1):.2f} of the residual norm\n")

    for amount in (0.0, -1.0, 1.0):
        with model.steered({direction: amount}):
            print(f"[{amount:+g}] {model.chat(message, seed=1, max_new_tokens=60)}\n")

    # A slider moved between two pieces of a reply is felt by the next token.
    pieces = model.stream(message, seed=2, max_new_tokens=60)
    print("[live] ", end="")
    for i, piece in enumerate(pieces):
        if i == 20:
            model.sliders[trait] = -1.0
            print(" |moved| ", end="")
        print(piece, end="", flush=True)
    model.sliders.reset()
    print("\n")

    with model.record([direction.site]) as residuals:
        model.chat(message, max_new_tokens=8)
    projection = residuals.passes(direction.site)[-1].float().cpu() @ direction.vector
    print(
        f"projection of the last token: {projection.item():.2f} (neutral {direction.mean:.2f} +- {direction.std:.2f})"
    )

    with tempfile.TemporaryDirectory() as tmp:
        certificate = steer.bake(name, Path(tmp) / "baked", add={direction: -0.5})
        print(f"baked: {len(certificate.biases)} bias, checks: {[c.name for c in steer.verify(Path(tmp) / 'baked')]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
