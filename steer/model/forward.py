"""Forward passes that write no reply: hidden states, residual streams and logits of given texts.

Finding, measuring and dictionary training read a model through these functions. The decoder runs without the LM head,
and the head is applied one chunk at a time. The anatomy names the modules, so these functions work on every
supported architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer.model.loaded import LoadedModel
from steer.model.record import Reader, reading, replacing

AT_ONCE = 1 << 25
"""How many logits, or activations of latents, are held in memory at a time: 128 MB in fp32."""


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices over `rows` rows of `size` numbers each. A slice holds at most `AT_ONCE` numbers, but at least one row."""
    step = max(1, AT_ONCE // size)
    return (slice(start, start + step) for start in range(0, rows, step))


def hidden_states(
    model: LoadedModel, ids: Int[Tensor, "rows seq"], attention: Int[Tensor, "rows seq"] | None = None
) -> Float[Tensor, "rows seq d"]:
    """The input of the LM head: the last residual stream after the final norm, under the current sliders."""
    decoder = model.hf.get_submodule(model.anatomy.decoder_module)
    return decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state


def read_residuals(
    model: LoadedModel,
    ids: Int[Tensor, "rows seq"],
    sites: Sequence[int],
    reader: Reader,
    attention: Int[Tensor, "rows seq"] | None = None,
) -> None:
    """Call `reader` with (site, residual stream after that block), under the current sliders.

    Blocks after the last of `sites` do not run.
    """
    last = max(sites)

    def read(site: int, h: Tensor) -> None:
        reader(site, h)
        if site == last:
            raise _Enough

    with model.steering.lock, reading(model.hf, model.anatomy, sites, read), suppress(_Enough):
        hidden_states(model, ids, attention)


class _Enough(Exception):
    """Ends a forward pass after the last block that is needed."""


Head = Callable[[Tensor], Tensor]
"""Hidden states after the final norm `[*batch, d]` -> logits `[*batch, vocab]`, fp32 at least."""


def head_of(model: LoadedModel) -> Head:
    """The model's LM head with its scale and softcap. Holding it keeps no other weights of the model in memory."""
    anatomy = model.anatomy
    head, scale, softcap = model.hf.get_submodule(anatomy.head_module), anatomy.logit_scale, anatomy.logit_softcap

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden)
        if scale != 1.0:
            out = out * scale
        if softcap is not None:  # in the model's dtype, as the model itself does
            out = (out / softcap).tanh() * softcap
        return out.to(torch.promote_types(out.dtype, torch.float32))

    return logits


def logits(model: LoadedModel, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
    """The model's logits for hidden states after the final norm, its final softcap applied; fp32 at least."""
    return head_of(model)(hidden)


def logits_in_chunks(
    model: LoadedModel, hidden: Float[Tensor, "n d"]
) -> Iterator[tuple[slice, Float[Tensor, "chunk vocab"]]]:
    """Yield (a slice of the rows, their `logits`), at most `AT_ONCE` numbers at a time.

    With a large vocabulary the logits of a whole batch would be far larger than everything else in memory.
    """
    for part in chunks(len(hidden), model.anatomy.vocab):
        yield part, logits(model, hidden[part])


def direct_logits(model: LoadedModel, rows: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "chunk vocab"]]:
    """What vectors in the residual stream, such as decoder rows, add to the logits, without the final softcap.

    At a fixed scale of the final norm this is `W_U (g * row)`, with g the gain of an RMSNorm; for a LayerNorm the mean
    of the row is subtracted first. It comes in chunks, as in `logits_in_chunks`.
    """
    anatomy, norm = model.anatomy, model.hf.get_submodule(model.anatomy.final_norm_module)
    unembedding = model.hf.get_submodule(anatomy.head_module).weight
    wide = torch.promote_types(unembedding.dtype, torch.float32)
    unembedding = unembedding.to(wide) * anatomy.logit_scale
    weight = getattr(norm, "weight", None)  # OLMo's norms have no gain
    gain = torch.ones(anatomy.width).to(unembedding) if weight is None else weight.to(wide) + anatomy.layout.gain_offset
    for part in chunks(len(rows), len(unembedding)):
        row = rows[part].to(gain.device, wide)
        if anatomy.layout.centred:
            row = row - row.mean(-1, keepdim=True)
        yield (row * gain).to(unembedding.device) @ unembedding.T


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While inside, replace a module's output, or the first entry of a tuple, by `change` of it."""
    handle = module.register_forward_hook(replacing(change))
    try:
        yield
    finally:
        handle.remove()
