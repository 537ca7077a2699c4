"""Owns the hooks that apply edits to the running model, and what they read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.errors import UnsupportedError
from steer.live.frame import TextPass
from steer.live.kept_norms import KeptNorms
from steer.live.program import Rows, SiteProgram, compiled
from steer.values.edit import Edit
from steer.values.move import Move
from steer.weights.anatomy import Anatomy

NEUTRAL: Rows = (None,)
_KEPT = 8
"""Worked-out rows that are kept: sessions that take turns on a model apply and withdraw theirs at every token."""


class Steering:
    """Owns every hook on one model. With neutral rows there is none.

    Hooks read what to do from `SiteProgram`s at every call, so a changed amount registers nothing; with places held
    for moves (`hold`) it changes numbers in place and nothing else, which compiled code needs.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.lock = threading.RLock()
        """Held by the decode loop during a forward: a change waits for the token being made."""
        self.rows: Rows = NEUTRAL
        """What is applied now: the rows of the innermost `applied`, else those of `set`."""
        self.text = TextPass()
        """The forward pass being made."""
        self._base: Rows = NEUTRAL
        self._over: Rows | None = None
        self._held: tuple[Move, ...] = ()
        self._programs: dict[str, SiteProgram] = {}
        self._known: dict[Rows, dict[str, SiteProgram]] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._clock = Clock(model)
        self._kept = KeptNorms(model, anatomy, lambda: self.text)

    def set(self, rows: Sequence[Edit | None]) -> None:
        """Replace what is applied, felt by the next forward pass, or by the first one after `applied` ends.

        Errors: MismatchError for a direction of another width, UsageError for a site the model lacks.
        """
        rows = self._checked(rows)
        with self.lock:
            self._base = rows
            if self._over is None:
                self._use(rows)

    @contextmanager
    def applied(self, rows: Sequence[Edit | None]) -> Iterator[None]:
        """Apply `rows` inside the block; what was applied before comes back, exceptions included.

        What `set` is told inside the block is not lost: it holds once the block ends.
        """
        rows = self._checked(rows)
        with self.lock:
            before, self._over = self._over, rows
            self._use(rows)
        try:
            yield
        finally:
            with self.lock:
                self._over = before
                self._use(self._base if before is None else before)

    @contextmanager
    def passing(self, text: TextPass) -> Iterator[None]:
        """Tell the hooks what the forward pass inside the block is over. The lock is held by whoever calls.

        Without it every text of a batch is taken to go by the row of its own place, and the first pass over a text
        (that with an empty cache) to be its prompt.
        """
        before, self.text = self.text, text
        self._clock.told = True
        try:
            yield
        finally:
            self.text = before
            self._clock.told = False

    def hold(self, moves: Sequence[Move]) -> None:
        """From now on hooks stay where `moves` act, at any amount and at none, and their numbers change in place:
        code compiled after it needs no second compilation when a slider moves. Without moves that ends."""
        for move in moves:
            self.check(Edit(moves=(move,)))
        with self.lock:
            self._held, self._programs = tuple(moves), {}
            self._known.clear()
            self._use(self.rows)

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
    def hook_count(self) -> int:
        """How many hooks are on the model."""
        return len(self._handles) + self._clock.running + self._kept.running

    def _checked(self, rows: Sequence[Edit | None]) -> Rows:
        for edit in dict.fromkeys(rows):  # many rows of a batch may have one edit
            if edit is not None:
                self.check(edit)
        return tuple(rows) or NEUTRAL

    def _use(self, rows: Rows) -> None:
        if rows == self.rows and not self._held and (self._programs or not any(rows)):
            self._sync_hooks()
            return
        self.rows = rows
        programs = self._known.get(rows)
        if programs is None:
            while len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            programs = compiled(rows, self.anatomy, self._held)
            if not self._held:
                self._known[rows] = programs
        if self._held and _layout(programs) == _layout(self._programs):
            for name, program in programs.items():
                self._programs[name].take(program)
        else:
            self._programs = programs
        self._sync_hooks()

    def _sync_hooks(self) -> None:
        for name in set(self._handles) - set(self._programs):
            self._handles.pop(name).remove()
        for name in set(self._programs) - set(self._handles):
            module = self.model.get_submodule(name)
            # First in line, so that a hook that reads the module sees it steered, whichever came earlier.
            self._handles[name] = module.register_forward_hook(self._hook(name), prepend=True)
        self._clock.run(self if self.timed else None)
        self._kept.run(self.rows)

    def _hook(self, name: str) -> Callable[..., Any]:
        def apply(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = self._programs[name].apply(h, self.text)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return apply


class Clock:
    """Tells reply tokens where nobody else does: in a forward pass that the decode loop does not make.

    A pass with an empty cache reads the prompt, and what follows it is the reply.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.told = False
        """Whether the pass being made is told of by its maker."""
        self._handle: RemovableHandle | None = None
        self._prompt: Tensor | int = 0

    @property
    def running(self) -> bool:
        """Whether it is on the model."""
        return self._handle is not None

    def run(self, steering: Steering | None) -> None:
        """Put it on the model for `steering`, or take it off."""
        if steering is None and self._handle is not None:
            self._handle.remove()
            self._handle = None
        elif steering is not None and self._handle is None:
            base: Any = getattr(self.model, "base_model", self.model)

            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                if not self.told:
                    steering.text.index = self._index(args, kwargs)

            self._handle = base.register_forward_pre_hook(before, with_kwargs=True)

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


def _layout(programs: dict[str, SiteProgram]) -> dict[str, tuple[object, ...]]:
    return {name: program.layout() for name, program in programs.items()}
