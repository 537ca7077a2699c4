"""Forward passes that write no reply: the decoder alone, the LM head a chunk at a time.

Everything here asks the anatomy for its modules, so it holds on every architecture that `weights.layouts` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer.live.record import Reader, reading

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

AT_ONCE = 1 << 25
"""Logits, or activations of latents, held in memory at a time: 128 MB in fp32."""


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of `rows` rows of `size` numbers each, such that a slice holds at most `AT_ONCE` numbers, or one row."""
    step = max(1, AT_ONCE // size)
    return (slice(start, start + step) for start in range(0, rows, step))


def hidden_states(
    model: SteeredModel, ids: Int[Tensor, "rows seq"], attention: Int[Tensor, "rows seq"] | None = None
) -> Float[Tensor, "rows seq d"]:
    """What the LM head is given: the last residual stream after the final norm, under the sliders that stand."""
    decoder = model.hf.get_submodule(model.anatomy.decoder_module)
    return decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state


def read_residuals(
    model: SteeredModel,
    ids: Int[Tensor, "rows seq"],
    sites: Sequence[int],
    reader: Reader,
    attention: Int[Tensor, "rows seq"] | None = None,
) -> None:
    """Call `reader` with (site, residual stream after that block), under the sliders that stand; no block after the
    last of `sites` runs."""
    last = max(sites)

    def read(site: int, h: Tensor) -> None:
        reader(site, h)
        if site == last:
            raise _Enough

    with model.steering.lock, reading(model.hf, model.anatomy, sites, read), suppress(_Enough):
        hidden_states(model, ids, attention)


class _Enough(Exception):
    """Leaves a forward pass after the last block wanted."""


Head = Callable[[Tensor], Tensor]
"""Hidden states after the final norm `[*batch, d]` -> logits `[*batch, vocab]`, fp32 at least."""


def head_of(model: SteeredModel) -> Head:
    """The model's LM head with its final softcap. Holding it keeps no other weights of the model in memory."""
    head, softcap = model.hf.get_submodule(model.anatomy.head_module), model.anatomy.logit_softcap

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden)
        if softcap is not None:  # in the model's dtype, as the model itself does
            out = (out / softcap).tanh() * softcap
        return out.to(torch.promote_types(out.dtype, torch.float32))

    return logits


def logits(model: SteeredModel, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
    """The model's logits for hidden states after the final norm, its final softcap applied; fp32 at least."""
    return head_of(model)(hidden)


def logits_in_chunks(
    model: SteeredModel, hidden: Float[Tensor, "n d"]
) -> Iterator[tuple[slice, Float[Tensor, "chunk vocab"]]]:
    """(which rows, their `logits`), at most `AT_ONCE` numbers at a time: with a large vocabulary the logits of a batch
    would be far larger than everything else in it."""
    for part in chunks(len(hidden), model.anatomy.vocab):
        yield part, logits(model, hidden[part])


def direct_logits(model: SteeredModel, rows: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "chunk vocab"]]:
    """What each row of the residual stream adds to the logits at a fixed scale of the final norm, softcap left out.

    `W_U (g * row)` with g the gain of an RMSNorm. A LayerNorm takes the row's mean away first. In chunks, as above.
    """
    anatomy, norm = model.anatomy, model.hf.get_submodule(model.anatomy.final_norm_module)
    unembedding = model.hf.get_submodule(anatomy.head_module).weight
    wide = torch.promote_types(unembedding.dtype, torch.float32)
    unembedding, gain = unembedding.to(wide), norm.weight.to(wide) + anatomy.layout.gain_offset
    for part in chunks(len(rows), len(unembedding)):
        row = rows[part].to(gain.device, wide)
        if anatomy.layout.centred:
            row = row - row.mean(-1, keepdim=True)
        yield (row * gain).to(unembedding.device) @ unembedding.T


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output, the first of a tuple, by `change` of it while inside."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
