"""Sliders as hooks for other people's code: a plain transformers model, or a TransformerBridge of TransformerLens.

`SteeredModel.hooks` and `SteeredModel.transformer_lens_hooks` come from here. Hooks are made once, from the amounts at
that moment, and compute the same `ModuleEdit`s as `model.steered`; unlike there, nothing else describes a forward pass
to them, so `_Counter` counts positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer.checkpoint.anatomy import Anatomy
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.errors import MismatchError, UnsupportedError, UsageError
from steer.model.fit_check import warn_of_poor_fits
from steer.model.loaded import LoadedModel
from steer.model.profiles import edit_of
from steer.model.record import replacing
from steer.model.sliders import Sliders, Target
from steer.model.steering.low_rank import ForwardContext
from steer.model.steering.module_edits import ModuleEdit, module_edits
from steer.model.steering.steering import PASSES_WITHOUT_PARTS

Steers = Profile | str | Path | Edit | Mapping[Target, float] | Mapping[str, float]
"""What hooks can be made from: a profile or its file, an Edit, or amounts as `model.steered` takes them."""
ReplyStart = int | Sequence[int] | None
"""How many tokens come before the reply, one number for all rows or one per row. None: a pass of several tokens is
the prompt, and the reply follows it."""
ModuleHook = Callable[[nn.Module, Any, Any], Any]
"""A hook as `nn.Module.register_forward_hook` takes it."""
LensHooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""`fwd_hooks` as TransformerLens types them. Here: (hook point, function of the activation and the hook point)."""
_Act = Callable[[Float[Tensor, "batch new d"]], Float[Tensor, "batch new d"]]


def plain_hooks(sliders: Sliders, what: Steers, reply_start: ReplyStart = None) -> list[tuple[str, ModuleHook]]:
    """See `SteeredModel.hooks`."""
    given = {writer.module for writer in sliders.model.anatomy.live_writers if writer.given}
    return [(name, replacing(act, given=name in given)) for name, act in _acts(sliders, what, reply_start)]


def lens_hooks(sliders: Sliders, what: Steers, bridge: Any = None, reply_start: ReplyStart = None) -> LensHooks:
    """See `SteeredModel.transformer_lens_hooks`."""
    points = _lens_names(sliders.model.anatomy)
    # Only at the token embedding: a position embedding has a hook point too, which sees the same tokens.
    pairs = [
        (point, _lens_hook(act))
        for module, act in _acts(sliders, what, reply_start)
        for point in (points[module][:1] if isinstance(act, _Counter) else points[module])
    ]
    if bridge is not None:
        _check_bridge(sliders.model, bridge, [point for point, _ in pairs])
    return list(pairs)


class _Counter:
    """Counts the tokens that the embedding sees, to know the positions of every pass: hooks are not given them.

    A pass of several tokens is taken for the beginning of a new text, a pass of one token for the text's next token.
    """

    def __init__(self, reply_start: ReplyStart) -> None:
        self.text = ForwardContext()
        self._start = None if reply_start is None else torch.as_tensor(reply_start).reshape(-1, 1)
        self._seen, self._prompt = 0, 1

    def __call__(self, h: Float[Tensor, "batch new d"]) -> Float[Tensor, "batch new d"]:
        new = h.shape[1]
        if new > 1:
            self._seen, self._prompt = 0, new
        columns = torch.arange(self._seen, self._seen + new, device=h.device)[None]
        start = self._prompt if self._start is None else self._start.to(h.device)
        # Reply token 0 is written by the last position of the prompt.
        self.text.index = columns - start + 1
        self._seen += new
        return h


def _acts(sliders: Sliders, what: Steers, reply_start: ReplyStart) -> list[tuple[str, _Act]]:
    """(module path, function that edits its output) of each module. Empty when nothing moves.

    Where positions matter, the first entry is a `_Counter`, which changes nothing.
    """
    starts = reply_start if isinstance(reply_start, Sequence) else [reply_start]
    if reply_start is not None and (not starts or any(type(n) is not int or n < 1 for n in starts)):
        raise UsageError(
            f"reply_start: expected the number of tokens before the reply, from 1, or a list of one a row, "
            f"found {reply_start!r}; count the prompt's tokens, padding on its left included"
        )
    edit, model, counter = _edit(sliders, what), sliders.model, _Counter(reply_start)
    programs = module_edits((edit,), model.anatomy, model.steering.gain)
    out = [(name, _act(program, counter.text)) for name, program in programs.items()]
    if any(program.splits_reply for program in programs.values()):
        raise UsageError(PASSES_WITHOUT_PARTS)
    timed = any(program.timed for program in programs.values())
    return [(model.anatomy.embedding_modules[0], counter), *out] if timed else out


def _act(program: ModuleEdit, context: ForwardContext) -> _Act:
    def act(h: Tensor) -> Tensor:
        if program.timed and (context.index is None or context.index.shape[1] != h.shape[1]):
            new, counted = h.shape[1], 0 if context.index is None else context.index.shape[1]
            raise UsageError(
                f"hooks: expected a pass over token ids, whose positions the embedding's hook counts, found {new} "
                f"positions of which it saw {counted}; register every pair, and pass input_ids, not inputs_embeds"
            )
        return program.apply(h, context)

    return act


def _lens_hook(act: _Act) -> Callable[..., Tensor]:
    def on_activation(h: Tensor, hook: Any) -> Tensor:
        # `run_with_hooks(remove_batch_dim=True)` passes `[new, d]`.
        return act(h) if h.ndim == 3 else act(h[None])[0]

    return on_activation


def _lens_names(anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """Module path -> the hook points that TransformerLens has at its output, or at the parts that sum to its output.

    A sum may be edited part by part, since ablation at a writer is a linear map.
    """
    after = {"attention": "hook_attn_out", "mlp": "hook_mlp_out"}
    before_norm = {"attention": "attn.o.hook_out", "mlp": "mlp.out.hook_out"}
    out: dict[str, tuple[str, ...]] = {
        anatomy.block_module(b): (f"blocks.{b}.hook_resid_post",) for b in range(anatomy.blocks)
    }
    for writer in anatomy.live_writers:
        if writer.block is None:
            out[writer.module] = ("hook_embed", "hook_pos_embed")[: len(anatomy.layout.embeddings)]
        else:
            points = before_norm if writer.norms else after
            out[writer.module] = (f"blocks.{writer.block}.{points[writer.kind]}",)
    return out


def _check_bridge(model: LoadedModel, bridge: Any, names: Sequence[str]) -> None:
    """Raise MismatchError unless the bridge has the model's blocks and width, and these hook points.

    `run_with_hooks` silently ignores names that it does not know.
    """
    wanted = (model.anatomy.blocks, model.anatomy.width)
    found = (bridge.cfg.n_layers, bridge.cfg.d_model)
    if found != wanted:
        raise MismatchError(
            f"bridge: expected {wanted[0]} blocks of width {wanted[1]} as {model.name} has, "
            f"found {found[0]} of width {found[1]}; boot it from the same checkpoint"
        )
    for name in names:
        if name not in bridge.hook_dict:
            raise MismatchError(
                f"bridge: expected the hook point {name}, found none of that name in {type(bridge).__name__}; "
                "boot a TransformerBridge with boot_transformers"
            )


def _edit(sliders: Sliders, what: Steers) -> Edit | None:
    if isinstance(what, str | Path):
        what = Profile.load(what)
    if isinstance(what, Mapping):
        return sliders.edit(what)
    if not isinstance(what, Profile | Edit):
        raise UsageError(
            f"hooks: expected a profile or its file, an Edit, or amounts by slider, found {type(what).__name__}; "
            "give them as model.steered takes them, as in {'moralizing': -1}"
        )
    edit = edit_of(sliders.model, what) if isinstance(what, Profile) else what
    if edit is not None:
        if edit.ablate and edit.method.norm_preserving:
            raise UnsupportedError(
                "hooks: a norm-preserving ablation changes the inputs of writers, which no hook on their outputs "
                "can do; expected another method, or model.edited"
            )
        sliders.model.steering.check(edit)
        warn_of_poor_fits(sliders.model, edit)
    return edit
