"""Steer a TransformerBridge of TransformerLens, and look at what the sliders change inside.

    python examples/transformer_lens_hooks.py [MODEL]

MODEL: as in record_residuals.py. The profile is that of plain_hooks.py. Takes half a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from plain_hooks import MESSAGE, write_profile
from record_residuals import DEFAULT
from transformer_lens.model_bridge import TransformerBridge

import steer
from steer.checkpoint.fetch import resolve
from steer.core.profile import Profile
from steer.model.profiles import use


@torch.inference_mode()
def main(name: str = DEFAULT) -> None:
    model = steer.load(name, dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers(resolve(name), device=str(model.device), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        profile = write_profile(model, Path(folder))
        hooks = model.transformer_lens_hooks(profile, bridge)
        use(model.sliders, Profile.load(profile))  # for comparison: the same on a SteeredModel
    print(f"fwd_hooks on: {', '.join(str(point) for point, _ in hooks)}\n\n{MESSAGE}\n")

    tokens = torch.tensor([model.prompt_ids([{"role": "user", "content": MESSAGE}])], device=model.device)
    plain, before = bridge.run_with_cache(tokens)
    steered = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    for label, logits in (("plain", plain), ("steered", steered)):
        top = logits[0, -1].softmax(-1).topk(6)
        words = (f"{model.tokenizer.decode([i])!r} {p:.2f}" for p, i in zip(*(t.tolist() for t in top), strict=True))
        print(f"[{label:7}] the reply begins with {', '.join(words)}")

    with bridge.hooks(fwd_hooks=hooks):
        _, after = bridge.run_with_cache(tokens)
    print("\nblock   moved, of the norm   by attention   by the MLP   (last token of the prompt)")
    for block in range(model.anatomy.blocks):
        names = [f"blocks.{block}.hook_{part}" for part in ("resid_post", "attn_out", "mlp_out")]
        norm = before[names[0]][0, -1].norm()
        moved = [float((after[n][0, -1] - before[n][0, -1]).norm() / norm) for n in names]
        if moved[0]:
            print(f"{block:5} {moved[0]:15.3f} {moved[1]:16.3f} {moved[2]:12.3f}     {'#' * round(100 * moved[0])}")

    difference = (steered - model.hf(tokens).logits).abs().max()
    print(f"\nlogits: at most {difference:.1e} from those of model.sliders")


if __name__ == "__main__":
    main(*sys.argv[1:])
