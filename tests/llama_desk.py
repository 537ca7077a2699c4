"""A tiny checkpoint, its GGUF and a bake for llama.cpp, with the same model in transformers to compare with.

Its tokens are bytes, as llama.cpp takes no words; its embedding and head differ, so that the LoRAs change every writer,
as hooks do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from batched import GREEDY
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat

from steer.baking.bake import bake
from steer.baking.certificate import Certificate, server_command
from steer.checkpoint.gguf_file import write_gguf
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.slider import Slider
from steer.model.steered import SteeredModel, describe, load
from steer.serve.llama_cpp.engine import LlamaCppEngine
from steer.serve.openai_json import token_bytes

STRENGTH = 0.8
"""What the LoRAs remove at scale 1."""
LONG = replace(GREEDY, max_new_tokens=24)


@dataclass(frozen=True)
class Desk:
    """A checkpoint, its GGUF, two ablations and an add baked for llama.cpp, and the model in transformers."""

    checkpoint: Path
    gguf: Path
    baked: Path
    model: SteeredModel
    directions: tuple[Direction, ...]

    def command(self, baked: Path | None = None) -> str:
        """The command that the bake prints."""
        folder = baked or self.baked
        return server_command(Certificate.load(folder), str(folder)).replace("MODEL.gguf", str(self.gguf))

    def edit(self, a: float = 0.0, b: float = 0.0) -> Edit:
        """Amounts of the two ablations beside the add, which llama-server always has."""
        one, other, added = self.directions
        return Edit(moves=(Slider(one, "ablate", a), Slider(other, "ablate", b), Slider(added, "add", 1.0)))

    def asked(self, a: float = 0.0, b: float = 0.0) -> Edit | None:
        """The same without the add, for llama-server."""
        return Edit.of([Slider(d, "ablate", x) for d, x in zip(self.directions, (a, b), strict=False)])

    def prompt(self, text: str = "hello friend") -> list[int]:
        return self.model.prompt_ids([{"role": "user", "content": text}])


def make_desk(tiny_llama: Callable[..., Path], root: Path) -> Desk:
    """Write all files of a `Desk` into a folder."""
    checkpoint = save_tiny_chat(
        tiny_llama, root / "chat", by_bytes=True, merges=[("h", "e")], tie=False, max_position_embeddings=512,
        intermediate_size=64,  # Q4_0 needs a multiple of 32
    )  # fmt: skip
    tokenizer = describe(checkpoint).tokenizer
    weights = load_file(checkpoint / "model.safetensors")
    for token in range(len(tokenizer)):  # ASCII is what it writes, since most other bytes are no characters
        text = token_bytes(tokenizer, token)
        special = token in tokenizer.all_special_ids
        weights["lm_head.weight"][token] *= 0.0 if special or max(text, default=128) > 127 else 6.0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    model = load(checkpoint)
    q, _ = torch.linalg.qr(torch.randn(model.anatomy.width, 3, generator=torch.Generator().manual_seed(1)))
    a, b, c = (
        Direction(name, 1, v.contiguous(), with_mean=1.5, without_mean=-0.5, residual_norm=4.0)
        for name, v in zip("abc", q.T, strict=True)
    )
    write_gguf(checkpoint, root / "model.gguf", "F32")
    bake(checkpoint, root / "baked", Edit((a, b), STRENGTH, add=((c, 1.0),)), "gguf")
    return Desk(checkpoint, root / "model.gguf", root / "baked", model, (a, b, c))


@contextmanager
def engine_on(desk: Desk, url: str, **options: object) -> Iterator[LlamaCppEngine]:
    """The engine in front of a llama-server, for the length of a block."""
    engine = LlamaCppEngine(describe(desk.checkpoint), url=url, place=desk.checkpoint, **options)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        engine.close()
