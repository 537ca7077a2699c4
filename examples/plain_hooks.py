"""Steer a model that transformers loaded, with hooks made from a profile.

    python examples/plain_hooks.py [MODEL]

MODEL: as in record_residuals.py, from which the direction comes. Takes half a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record_residuals import DEFAULT, difference_of_means
from transformers import AutoModelForCausalLM

import steer
from steer.checkpoint.fetch import resolve
from steer.core.profile import Profile
from steer.model.profiles import use

MESSAGE = "My friend lied to me about her weekend."
PROFILE = """\
name: plain speaking
notes: A third less preachy, and while it replies never more so than a plain answer.
sliders:
- slider: preaching.safetensors
  operation: cap
  amount: 0.0
  when: {part: reply}
- slider: preaching.safetensors
  amount: -0.3
"""


def write_profile(model: steer.SteeredModel, folder: Path) -> Path:
    """A profile and, beside it, the direction that it names."""
    difference_of_means(model, model.anatomy.blocks // 2).save(folder / "preaching.safetensors")
    path = folder / "plain-speaking.yaml"
    path.write_text(PROFILE)
    return path


def main(name: str = DEFAULT) -> None:
    model = steer.load(name, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        profile = write_profile(model, Path(folder))
        pairs = model.hooks(profile)
        use(model.sliders, Profile.load(profile))  # for comparison: the same on a SteeredModel
    print(f"hooks on: {', '.join(module for module, _ in pairs)}\n\n{MESSAGE}\n")

    hf: Any = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32, device_map=model.device)
    prompt = torch.tensor([model.prompt_ids([{"role": "user", "content": MESSAGE}])], device=model.device)

    def reply() -> str:
        made = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False)
        return model.text(made[0, prompt.shape[1] :])

    print(f"[plain]   {reply()}\n")
    handles = [hf.get_submodule(module).register_forward_hook(hook) for module, hook in pairs]
    try:
        print(f"[steered] {reply()}\n")
        with torch.inference_mode():
            difference = (hf(prompt).logits - model.hf(prompt).logits).abs().max()
        print(f"logits: at most {difference:.1e} from those of model.sliders")
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main(*sys.argv[1:])
