"""`Steering` puts the hooks that apply edits on the running model, and takes them off again.

Every `LoadedModel` has one. Live sliders call `Steering.set`, `model.steered` calls `Steering.applied`, and the decode
loops describe each forward pass to the hooks with `Steering.passing`. What a hook computes is a `ModuleEdit` of
`module_edits.py`, or a `WriterHook` of `norm_preserving.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.checkpoint.anatomy import Anatomy
from steer.core.edit import Edit
from steer.errors import UnsupportedError, UsageError
from steer.model.record import replacing
from steer.model.steering.low_rank import ForwardContext
from steer.model.steering.module_edits import ModuleEdit, Rows, module_edits
from steer.model.steering.norm_preserving import WriterHook, keeping, obstacle, writer_hooks

NEUTRAL: Rows = (None,)
PASSES_WITHOUT_PARTS = (
    "when: a slider acts on the thoughts or the answer, which only steer's decoding distinguishes; expected "
    "part text or reply in passes that you run yourself, or model.chat, model.stream or model.replies"
)
_CACHED_ROWS = 8
"""For how many rows the computed hooks are cached: sessions that take turns on a model apply and withdraw theirs at
every token."""


@dataclass(frozen=True, eq=False)
class _Applied:
    """Rows, and the hooks that apply them. Nothing on the model changes before `Steering._bring`."""

    rows: Rows
    programs: dict[str, ModuleEdit]
    modules: dict[str, nn.Module]
    """The modules that `programs` edits, by path."""
    writers: tuple[WriterHook, ...]
    """The hooks of norm-preserving ablations."""

    @cached_property
    def timed(self) -> bool:
        """Whether an edit depends on the position in the reply."""
        return any(p.timed for p in self.programs.values())

    @cached_property
    def splits_reply(self) -> bool:
        """Whether an edit acts on thoughts or answers alone."""
        return any(p.splits_reply for p in self.programs.values())


class Steering:
    """Owns every steering hook on one model. There is no hook while nothing is applied.

    A change first computes everything that may fail. Then it registers the new hooks, switches all of them to the new
    edits in one assignment, and removes hooks that are no longer needed. If it is interrupted, it puts back what was
    applied before. A hook without a `ModuleEdit` does nothing.

    Hooks look up their `ModuleEdit` at every call, so a changed amount registers no hook.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.lock = threading.RLock()
        """Held by the decode loop during a forward: a change waits for the token being made."""
        self.text = ForwardContext()
        """The forward pass that is being made; `passing` sets it."""
        self._base = self._now = _Applied(NEUTRAL, {}, {}, ())
        self._overrides: list[list[_Applied]] = []
        """One entry for each open `applied` block, the innermost last. Each is a separate list, so that blocks which
        apply the same rows are different entries."""
        self._known: dict[Rows, _Applied] = {}
        self._worked_out: WeakSet[Edit] = WeakSet()
        self._handles: dict[object, RemovableHandle] = {}
        self._described = False
        """Whether the current forward pass is inside of `passing`."""
        self._prompt: Tensor | int = 0
        """The length of the prompts, in passes that are not described."""
        self._gains: dict[str, Tensor] = {}

    @property
    def rows(self) -> Rows:
        """What is applied now: the rows of the innermost `applied`, else those of `set`."""
        return self._now.rows

    def set(self, rows: Sequence[Edit | None]) -> None:
        """Replace what is applied, for the next forward pass or, inside of `applied`, for the first one after it.

        `rows`: one edit for all texts, or one per text of the batch; None for no edit.
        Errors: MismatchError for a direction of another width, UsageError for a site the model lacks. After any error,
        what was applied before still is.
        """
        rows = self._checked(rows)
        with self.lock:
            before, new = self._base, self._prepared(rows)
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

        A `set` inside the block is not lost: it takes effect when the block ends. Blocks of several threads may end in
        any order. While they are open, the rows of the block that began last are applied in all threads; `alone` makes
        other threads wait.
        """
        rows = self._checked(rows)
        with self.lock:
            override = [self._prepared(rows)]
        try:
            with self.lock:
                self._overrides.append(override)
                self._go_on()
            yield
        finally:
            try:
                self._end_block(override)
            except BaseException:  # a second Ctrl-C; everything is computed by now, so the second try is quick
                self._end_block(override)
                raise

    @contextmanager
    def alone(self, rows: Sequence[Edit | None]) -> Iterator[None]:
        """As `applied`, while the forward passes and changes of other threads wait until the block ends."""
        with self.lock, self.applied(rows):
            yield

    @contextmanager
    def passing(self, context: ForwardContext) -> Iterator[None]:
        """Describe the forward pass inside the block to the hooks. The caller holds the lock.

        In a pass that is not described, text i of a batch is taken to be under row i, and the first pass over a text
        (the one with an empty cache) to be its prompt.
        """
        before = self.text
        try:
            self.text, self._described = context, True
            yield
        finally:
            self.text, self._described = before, False

    def work_out(self, edit: Edit) -> None:
        """Check that an edit can be applied, by computing the tensors for it. An edit that passed is not tried again.

        Errors: as `set`, and all others of applying it.
        """
        if edit in self._worked_out:
            return
        self.check(edit)
        with self.lock:
            self._prepared((edit,))
        self._worked_out.add(edit)

    def gain(self, name: str) -> Float[Tensor, " d"]:
        """The gain of the norm whose weight has this name, fp64 on the CPU."""
        if name not in self._gains:
            module = self.model.get_submodule(name.removesuffix(".weight"))
            weight: Any = module.weight
            if weight.is_meta:  # offloaded: accelerate holds the weight
                weight = module._hf_hook.weights_map["weight"]  # type: ignore[union-attr]
            self._gains[name] = weight.detach().to("cpu", torch.float64) + self.anatomy.layout.gain_offset
        return self._gains[name]

    def check(self, edit: Edit) -> None:
        """Raise an error unless the edit fits this model and hooks can do it.

        Errors: as `set`; UnsupportedError for a norm-preserving ablation that this model cannot run.
        """
        self.anatomy.check_edit(edit)
        if edit.ablate and edit.method.norm_preserving and (why := self.cannot_keep_norms):
            raise UnsupportedError(why)

    @property
    def cannot_keep_norms(self) -> str | None:
        """Why a norm-preserving ablation cannot run on this model; None where it can."""
        return obstacle(self.model, self.anatomy)

    @property
    def timed(self) -> bool:
        """Whether an applied edit depends on the position in the reply, so that passes need `ForwardContext.index`."""
        return self._now.timed

    @property
    def splits_reply(self) -> bool:
        """Whether an applied edit acts on thoughts or answers alone, so that passes need `ForwardContext.answer`."""
        return self._now.splits_reply

    @property
    def untouched_blocks(self) -> int:
        """How many of the first blocks run as without any edit; 0 where no block, or the embedding, is edited."""
        if self._now.writers or any(
            p.writes_to == -1 for p in self._now.programs.values()
        ):  # -1: the embedding is edited
            return 0
        for block in range(self.anatomy.blocks):
            path = self.anatomy.block_module(block)
            if any(name == path or name.startswith(f"{path}.") for name in self._now.programs):
                return block
        return 0

    def _checked(self, rows: Sequence[Edit | None]) -> Rows:
        for edit in dict.fromkeys(rows):  # many rows of a batch may have one edit
            if edit is not None:
                self.check(edit)
        return tuple(rows) or NEUTRAL

    def _prepared(self, rows: Rows) -> _Applied:
        for known in (self._now, self._base, self._known.get(rows)):
            if known is not None and known.rows == rows:
                return known
        programs = self._programs(rows)
        modules = {name: self.model.get_submodule(name) for name in programs}
        keep = keeping(rows)
        writers = next((a.writers for a in (self._now, self._base) if keeping(a.rows) == keep), None)
        if writers is None:
            writers = writer_hooks(keep, self.model, self.anatomy, self.gain, lambda: self.text)
        new = _Applied(rows, programs, modules, writers)
        if not new.writers:  # their tables are too large: as wide as the writers' inputs, for every edit of a batch
            while len(self._known) >= _CACHED_ROWS:
                self._known.pop(next(iter(self._known)))
            self._known[rows] = new
        return new

    def _programs(self, rows: Rows) -> dict[str, ModuleEdit]:
        return module_edits(rows, self.anatomy, self.gain)

    def _go_on(self) -> None:
        """Apply the rows of the innermost `applied` that is open, else those of `set`."""
        self._bring(self._overrides[-1][0] if self._overrides else self._base)

    def _end_block(self, override: list[_Applied]) -> None:
        with self.lock:
            self._overrides = [o for o in self._overrides if o is not override]
            self._go_on()

    def _bring(self, to: _Applied) -> None:
        """Make the hooks on the model apply `to`. The caller holds the lock, so no forward pass is being made."""
        wanted: dict[object, Callable[[], RemovableHandle]] = {
            name: partial(self._register, name, module, to.programs[name].given) for name, module in to.modules.items()
        }
        wanted |= {hook: hook for hook in to.writers}
        if to.timed:
            base: Any = getattr(self.model, "base_model", self.model)
            wanted["clock"] = partial(base.register_forward_pre_hook, self._count, with_kwargs=True)
        for key, register in wanted.items():
            if key not in self._handles:
                self._handles[key] = register()
        self._now = to
        for key in [k for k in self._handles if k not in wanted]:
            self._handles[key].remove()
            del self._handles[key]

    def _register(self, name: str, module: nn.Module, given: bool) -> RemovableHandle:
        def apply(h: Tensor) -> Tensor:
            module_edit = self._now.programs.get(name)
            return h if module_edit is None else module_edit.apply(h, self.text)

        # Runs before all other hooks, so that a hook that reads the module sees the steered output.
        return module.register_forward_hook(replacing(apply, given=given), prepend=True)

    def _count(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Set `ForwardContext.index` in a pass that `passing` does not describe.

        A pass with an empty cache is taken for the prompt, and the passes after it for the reply.
        """
        if self._described:
            return
        if self.splits_reply:
            raise UsageError(PASSES_WITHOUT_PARTS)
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if positions is None:
            positions = seen + torch.arange(ids.shape[1], device=ids.device)[None]
        if seen == 0:
            self._prompt = positions[:, -1:] + 1
        self.text.index = positions - self._prompt + 1
