"""Tiny random checkpoints of every architecture that can be baked, and where each writes into its residual stream.

What is written here is read from the running models by hand, not from the tables under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.core.edit import Edit

WIDTH, BLOCKS, VOCAB, EXPERTS = 32, 3, 97, 4
FILE = "model.safetensors"
TOKENS = torch.tensor([[1, 5, 17, 60, 3, 96, 44], [1, 2, 8, 8, 71, 30, 0]])
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_O, _DOWN, _POST = "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the first GPT-2 checkpoints are stored: no base's name, causal masks."""
    masks = {f"h.{b}.attn.bias": torch.ones(1, 1, 64, 64).tril() for b in range(BLOCKS)}
    return {name.removeprefix("transformer."): t for name, t in tensors.items()} | masks


def _old_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Pythia is stored: masks and rotary frequencies beside the weights."""
    old = {"bias": torch.ones(1, 1, 64, 64).tril(), "masked_bias": torch.tensor(-1e9)}
    old["rotary_emb.inv_freq"] = torch.ones(1)
    return tensors | {f"gpt_neox.layers.{b}.attention.{k}": v.clone() for b in range(BLOCKS) for k, v in old.items()}


@dataclass(frozen=True)
class Tiny:
    """One architecture, small."""

    name: str
    """What transformers calls its config."""
    config: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    """The model's class, where it is not `<name>ForCausalLM`."""
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    block: str = "model.layers.{}"
    writes: tuple[str, str] = (_O, _DOWN)
    """The live modules of a block whose outputs are added to the residual stream, or are normed first."""
    norms: tuple[str, str] | None = None
    """The norms between."""
    unit: float = 0.0
    """What a norm adds to its weight."""
    change: Change | None = None
    """What other checkpoints of it look like on disk."""
    stacked: bool = False
    """Whether the file holds the tensors as the running model does."""

    def save(self, path: Path, dtype: torch.dtype, turn_up: Callable[[str, nn.Parameter], None] | None = None) -> Path:
        """Write a random checkpoint: random weights, biases, and norm gains of either side of 1. `turn_up` changes
        parameters in place, by name."""
        torch.manual_seed(0)
        known = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
        sizes = known | {"bos_token_id": 1, "eos_token_id": 2} if self.name == "GPT2" else _SIZES
        config = getattr(transformers, f"{self.name}Config")(**(sizes | self.config))
        model = getattr(transformers, self.model or f"{self.name}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or ".ln_" in name:
                    low = 0.3 if name.endswith("weight") else -0.5
                    parameter.uniform_(low, low + 1.4).sub_(self.unit if name.endswith("weight") else 0.0)
                else:
                    parameter.normal_(std=0.3 if parameter.ndim == 1 or name.endswith("bias") else 0.15)
                if turn_up is not None:
                    turn_up(name, parameter)
        model.to(dtype).save_pretrained(path)
        if self.stacked:
            held = {n: t.detach().clone() for n, t in model.named_parameters()}
            save_file(held, path / FILE, metadata={"format": "pt"})
        if self.change is not None:
            changed = self.change(load_file(path / FILE))
            save_file({n: t.contiguous() for n, t in changed.items()}, path / FILE, metadata={"format": "pt"})
        return path

    def edit_points(self, model: nn.Module) -> list[tuple[str, nn.Module, Tensor | None]]:
        """(name, module, gain of the norm after it) of everything whose output goes into the residual stream."""
        out = [(name, model.get_submodule(name), None) for name in self.embeddings]
        for block in range(BLOCKS):
            path = self.block.format(block)
            for i, write in enumerate(self.writes):
                norm = None if self.norms is None else model.get_submodule(f"{path}.{self.norms[i]}")
                gain = None if norm is None else norm.weight.detach().double() + self.unit
                out.append((f"{path}.{write}", model.get_submodule(f"{path}.{write}"), gain))
        return out


def span(vectors: list[Tensor], gain: Tensor | None) -> Tensor:
    """Orthonormal basis of what must leave a write, or the input of the norm after it."""
    q, _ = torch.linalg.qr(torch.stack([v.double() if gain is None else v.double() * gain for v in vectors], dim=1))
    return q


@contextmanager
def ablated(kind: Tiny, model: Any, edit: Edit) -> Iterator[None]:
    """The model with the edit's directions removed from every residual write that it names, and its adds added."""
    handles = []
    for name, module, gain in kind.edit_points(model) if edit.ablate else ():
        q = span([d.vector for d in edit.ablate], gain)

        def remove(module: object, args: object, output: Any, q: Tensor = q) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            z = (y.double() - edit.strength * (y.double() @ q) @ q.T).to(y.dtype)
            return (z, *output[1:]) if isinstance(output, tuple) else z

        if edit.blocks is None or any(f".{b}." in name for b in range(edit.blocks[0], edit.blocks[1] + 1)):
            handles.append(module.register_forward_hook(remove))
    for direction, amount in edit.add:
        shift = amount * direction.gap * direction.vector.double()

        def add(module: object, args: object, output: Any, by: Tensor = shift) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            return (y + by.to(y.dtype), *output[1:]) if isinstance(output, tuple) else y + by.to(y.dtype)

        handles.append(model.get_submodule(kind.block.format(direction.site)).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model as transformers runs it, every weight accounted for."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["mismatched_keys"], report["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


_MOE = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {
    "model": "GPT2LMHeadModel",
    "embeddings": ("transformer.wte", "transformer.wpe"),
    "block": "transformer.h.{}",
    "writes": ("attn.c_proj", "mlp.c_proj"),
}
_NEOX = {
    "embeddings": ("gpt_neox.embed_in",),
    "block": "gpt_neox.layers.{}",
    "writes": ("attention.dense", "mlp.dense_4h_to_h"),
}
_NORMS = {"norms": (_POST, "post_feedforward_layernorm")}

TINY: dict[str, Tiny] = {
    "llama": Tiny("Llama"),
    "llama biases": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("Mistral"),
    "qwen2": Tiny("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Tiny("Qwen3"),
    "phi3": Tiny("Phi3"),
    "gemma2": Tiny("Gemma2", {"query_pre_attn_scalar": 8, "attention_bias": True}, **_NORMS, unit=1.0),
    "gemma3": Tiny("Gemma3Text", {"sliding_window": 4}, "Gemma3ForCausalLM", **_NORMS, unit=1.0),
    "olmo2": Tiny("Olmo2", **_NORMS),
    "gpt2": Tiny("GPT2", **_GPT2),
    "gpt2 bare names": Tiny("GPT2", **_GPT2, change=_bare),
    "gpt-neox": Tiny("GPTNeoX", **_NEOX),
    "gpt-neox sequential": Tiny("GPTNeoX", {"use_parallel_residual": False}, **_NEOX, change=_old_buffers),
    "gpt-neox tied": Tiny("GPTNeoX", {"tie_word_embeddings": True}, **_NEOX),
    "mixtral": Tiny("Mixtral", _MOE, writes=(_O, "mlp")),
    "mixtral stacked": Tiny("Mixtral", _MOE, writes=(_O, "mlp"), stacked=True),
    "qwen2-moe": Tiny("Qwen2Moe", _QWEN | {"shared_expert_intermediate_size": 40}, writes=(_O, "mlp")),
    "qwen2-moe stacked": Tiny(
        "Qwen2Moe", _QWEN | {"shared_expert_intermediate_size": 40}, writes=(_O, "mlp"), stacked=True
    ),
    "qwen3-moe": Tiny("Qwen3Moe", _QWEN | {"mlp_only_layers": [1]}, writes=(_O, "mlp")),
    # in = out here: no shape says which axis faces the stream.
    "qwen3-moe stacked": Tiny("Qwen3Moe", _QWEN | {"moe_intermediate_size": WIDTH}, writes=(_O, "mlp"), stacked=True),
    "gpt-oss": Tiny("GptOss", _MOE | {"intermediate_size": WIDTH}, writes=(_O, "mlp")),
}
