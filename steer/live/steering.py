"""Owns the hooks that apply edits to the running model, and what they read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.errors import UnsupportedError
from steer.live.frame import TextPass
from steer.live.kept_norms import KeptNorms, WriterHook, keeping
from steer.live.program import Rows, SiteProgram, compiled
from steer.values.edit import Edit
from steer.weights.anatomy import Anatomy

NEUTRAL: Rows = (None,)
_KEPT = 8
"""Rows that are kept worked out: sessions that take turns on a model apply and withdraw theirs at every token."""


@dataclass(frozen=True, eq=False)
class _Applied:
    """Rows, worked out. Nothing of it is on the model before `Steering._bring`."""

    rows: Rows
    programs: dict[str, SiteProgram]
    modules: dict[str, nn.Module]
    """Of the programs, by path."""
    writers: tuple[WriterHook, ...]
    """Of norm-preserving ablations."""


class Steering:
    """Owns every hook on one model. With neutral rows there is none.

    Whatever may fail is worked out first. Then hooks are registered, one assignment says what they do, and hooks that
    are not needed go; if that is interrupted, what was applied before is put back. A hook without a program does
    nothing.

    Hooks read what to do from `SiteProgram`s at every call, so a changed amount registers nothing.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.lock = threading.RLock()
        """Held by the decode loop during a forward: a change waits for the token being made."""
        self.text = TextPass()
        """The forward pass being made."""
        self._base = self._now = _Applied(NEUTRAL, {}, {}, ())
        self._overs: list[list[_Applied]] = []
        """What each `applied` that is open brought, the innermost last. A list each: two may bring the same."""
        self._programs: dict[str, SiteProgram] = {}
        """What the hooks read: those of `_now`, or, with places held, copies whose numbers change."""
        self._known: dict[Rows, _Applied] = {}
        self._handles: dict[object, RemovableHandle] = {}
        self._clock = Clock(model, self)
        self._gains: dict[str, Tensor] = {}
        self._kept = KeptNorms(model, anatomy, self.gain, lambda: self.text)

    @property
    def rows(self) -> Rows:
        """What is applied now: the rows of the innermost `applied`, else those of `set`."""
        return self._now.rows

    def set(self, rows: Sequence[Edit | None]) -> None:
        """Replace what is applied, felt by the next forward pass, or by the first one after `applied` ends.

        Errors: MismatchError for a direction of another width, UsageError for a site the model lacks. After an error,
        whichever, what was applied before still is.
        """
        rows = self._checked(rows)
        with self.lock:
            before, new = self._base, self._worked_out(rows)
            try:
                self._base = new
                self._go_on()
            except BaseException:
                self._base = before
                self._go_on()
                raise

    @contextmanager
    def applied(self, rows: Sequence[Edit | None]) -> Iterator[None]:
        """Apply `rows` inside the block; what was applied before comes back, exceptions included.

        What `set` is told inside the block is not lost: it holds once the block ends. Blocks of several threads may end
        in any order; meanwhile the one that began last holds for all, so see `alone`.
        """
        rows = self._checked(rows)
        with self.lock:
            own = [self._worked_out(rows)]
        try:
            with self.lock:
                self._overs.append(own)
                self._go_on()
            yield
        finally:
            try:
                self._leave(own)
            except BaseException:  # a second Ctrl-C; the work was done before, so the second try costs nothing
                self._leave(own)
                raise

    @contextmanager
    def alone(self, rows: Sequence[Edit | None]) -> Iterator[None]:
        """As `applied`, and the other threads' passes and moves wait until the block ends."""
        with self.lock, self.applied(rows):
            yield

    @contextmanager
    def passing(self, text: TextPass) -> Iterator[None]:
        """Tell the hooks what the forward pass inside the block is over. The lock is held by whoever calls.

        Without it every text of a batch is taken to go by the row of its own place, and the first pass over a text
        (that with an empty cache) to be its prompt.
        """
        before = self.text
        try:
            self.text, self._clock.told = text, True
            yield
        finally:
            self.text, self._clock.told = before, False

    def work_out(self, edit: Edit) -> None:
        """Find out now whether `edit` can be applied. Errors: as `set`, and whatever else applying it would raise."""
        self.check(edit)
        with self.lock:
            self._worked_out((edit,))

    def gain(self, name: str) -> Float[Tensor, " d"]:
        """The gain of the norm whose weight has this name, fp64 on the CPU."""
        if name not in self._gains:
            module = self.model.get_submodule(name.removesuffix(".weight"))
            weight: Any = module.weight
            if weight.is_meta:  # offloaded: accelerate has it
                weight = module._hf_hook.weights_map["weight"]  # type: ignore[union-attr]
            self._gains[name] = weight.detach().to("cpu", torch.float64) + self.anatomy.layout.gain_offset
        return self._gains[name]

    def check(self, edit: Edit) -> None:
        """Raise unless the edit fits this model, and hooks can do it."""
        self.anatomy.check_edit(edit)
        if edit.ablate and edit.method.norm_preserving and (why := self.cannot_keep_norms):
            raise UnsupportedError(why)

    @property
    def cannot_keep_norms(self) -> str | None:
        """Why a norm-preserving ablation cannot run on this model; None where it can."""
        return self._kept.cannot

    @property
    def timed(self) -> bool:
        """Whether something applied depends on the position in the reply, so that passes must tell `index`."""
        return any(p.timed for p in self._programs.values())

    @property
    def untouched_blocks(self) -> int:
        """How many of the first blocks run as without any edit."""
        if self._now.writers:
            return 0
        for block in range(self.anatomy.blocks):
            path = self.anatomy.block_module(block)
            if any(name == path or name.startswith(f"{path}.") for name in self._programs):
                return block
        return 0

    @property
    def hook_count(self) -> int:
        """How many hooks are on the model."""
        return len(self._handles)

    def _checked(self, rows: Sequence[Edit | None]) -> Rows:
        for edit in dict.fromkeys(rows):  # many rows of a batch may have one edit
            if edit is not None:
                self.check(edit)
        return tuple(rows) or NEUTRAL

    def _worked_out(self, rows: Rows) -> _Applied:
        for known in (self._now, self._base, self._known.get(rows)):
            if known is not None and known.rows == rows:
                return known
        programs = compiled(rows, self.anatomy, self.gain)
        modules = {name: self.model.get_submodule(name) for name in programs}
        keep = keeping(rows)
        there = next((a.writers for a in (self._now, self._base) if keeping(a.rows) == keep), None)
        new = _Applied(rows, programs, modules, self._kept.hooks(keep) if there is None else there)
        if not new.writers:  # whose tables are as wide as the writers' inputs, for every edit of a batch
            while len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[rows] = new
        return new

    def _go_on(self) -> None:
        """Bring what is to be applied now."""
        self._bring(self._overs[-1][0] if self._overs else self._base)

    def _leave(self, own: list[_Applied]) -> None:
        with self.lock:
            self._overs = [over for over in self._overs if over is not own]
            self._go_on()

    def _bring(self, to: _Applied) -> None:
        """Have the model go by `to`. The lock is held: no forward pass is being made."""
        wanted: dict[object, Callable[[], RemovableHandle]] = {
            name: partial(self._register, name, module) for name, module in to.modules.items()
        }
        wanted |= {hook: hook.register for hook in to.writers}
        if any(p.timed for p in to.programs.values()):
            wanted[self._clock] = self._clock.register
        for key, register in wanted.items():
            if key not in self._handles:
                self._handles[key] = register()
        self._programs, self._now = to.programs, to
        for key in [k for k in self._handles if k not in wanted]:
            self._handles[key].remove()
            del self._handles[key]

    def _register(self, name: str, module: nn.Module) -> RemovableHandle:
        # First in line, so that a hook that reads the module sees it steered, whichever came earlier.
        return module.register_forward_hook(self._hook(name), prepend=True)

    def _hook(self, name: str) -> Callable[..., Any]:
        def apply(module: nn.Module, args: Any, output: Any) -> Any:
            program = self._programs.get(name)
            if program is None:
                return output
            h = output[0] if isinstance(output, tuple) else output
            h = program.apply(h, self.text)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return apply


class Clock:
    """Tells reply tokens where nobody else does: in a forward pass that the decode loop does not make.

    A pass with an empty cache reads the prompt, and what follows it is the reply.
    """

    def __init__(self, model: nn.Module, steering: Steering) -> None:
        self.model, self.steering = model, steering
        self.told = False
        """Whether the pass being made is told of by its maker."""
        self._prompt: Tensor | int = 0

    def register(self) -> RemovableHandle:
        """Put it on the model."""
        base: Any = getattr(self.model, "base_model", self.model)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.told:
                self.steering.text.index = self._index(args, kwargs)

        return base.register_forward_pre_hook(before, with_kwargs=True)

    def _index(self, args: Any, kwargs: Any) -> Tensor:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        assert isinstance(ids, Tensor)
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if positions is None:
            positions = seen + torch.arange(ids.shape[1], device=ids.device)[None]
        if seen == 0:
            self._prompt = positions[:, -1:] + 1
        return positions - self._prompt + 1
