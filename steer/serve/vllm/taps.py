"""Sliders inside of vLLM's model: opaque operations at the residual stream and the writers, in the compiled graph.

`plugin.register` calls `tap` for each model that vLLM loads. It places `steer::edit_stream_` after every block and
`steer::edit_writer_` after every writer. torch.compile traces through the hooks that do it and keeps the operations,
which call back into Python at every step; a plain forward hook would run once, while tracing. What they compute is
`ModuleEdit`, as in the transformers engine.

A decoder layer of vLLM returns (hidden, residual), whose sum is the residual stream.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.checkpoint.anatomy import Anatomy
from steer.errors import UnsupportedError
from steer.model.steering.module_edits import ModuleEdit, Rows
from steer.model.steering.steering import Steering


class TapSteering(Steering):
    """`Steering` of a vLLM model: the operations look up what is applied, so no hook comes or goes."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, paths: Collection[str]) -> None:
        """`paths`: the modules that carry an operation, which are those of this pipeline rank."""
        super().__init__(model, anatomy)
        self._paths = frozenset(paths)
        self._recorded: dict[str, list[Tensor]] | None = None
        self._tokens: int | None = None
        """How many tokens the step has; others after them are padding. None: all are tokens."""
        self._changed = 0
        """At how many taps something was applied in the step."""

    @property
    def cannot_keep_norms(self) -> str | None:
        return "ablation that preserves norms: expected an engine of transformers, found vLLM; use another method"

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Tensor]]]:
        """Inside the block, collect what passes each tap: [before, after] of a block's residual stream or a writer's
        output, `[tokens, d]`, by the module's path."""
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Inside the block, a pass over `tokens` tokens is made.

        Errors: UnsupportedError if it did not apply every edit: a graph that was replayed calls no operation.
        """
        self._tokens, self._changed = tokens, 0
        try:
            yield
        finally:
            self._tokens = None
        if self._changed < len(self._now.programs):
            raise UnsupportedError(
                f"vLLM: expected edits at {len(self._now.programs)} modules, found {self._changed} applied; serve with "
                '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
            )

    def change(self, path: str, hidden: Tensor, residual: Tensor | None) -> None:
        """Apply to `hidden + residual` what is applied at a module, in place. Without an edit nothing is touched."""
        program = self._now.programs.get(path)
        if program is None and self._recorded is None:
            return
        self._changed += program is not None
        if self._tokens is not None and self._tokens < len(hidden):
            hidden, residual = hidden[: self._tokens], None if residual is None else residual[: self._tokens]
        h = hidden if residual is None else hidden + residual
        new = h if program is None else program.apply(h[None], self.text)[0]
        if self._recorded is not None:
            self._recorded[path] = [h.clone(), new.clone()]
        if program is not None:
            hidden.copy_(new)
            if residual is not None:
                residual.zero_()  # the next norm adds both, so the sum has to be the edited stream itself

    def _programs(self, rows: Rows) -> dict[str, ModuleEdit]:
        return {path: edit for path, edit in super()._programs(rows).items() if path in self._paths}

    def _bring(self, to: Any) -> None:
        self._now = to


_steering: TapSteering | None = None
"""The steering of this process's model; vLLM runs one model per process."""


def steering() -> TapSteering:
    """The steering of the model that vLLM loaded in this process. Errors: UnsupportedError if it has no taps."""
    if _steering is None:
        raise UnsupportedError("vLLM: expected a model with taps, found none in this process; see the log for why")
    return _steering


def _edit_stream(hidden: Tensor, residual: Tensor, tap: str) -> None:
    if _steering is not None:
        _steering.change(tap, hidden, residual)


def _edit_writer(hidden: Tensor, tap: str) -> None:
    if _steering is not None:
        _steering.change(tap, hidden, None)


def _nothing(*args: Any) -> None:
    """What the operations do on tensors without numbers, while a graph is traced."""


_library = torch.library.Library("steer", "FRAGMENT")
for _name, _schema, _function in (
    ("edit_stream_", "(Tensor(a!) hidden, Tensor(b!) residual, str tap) -> ()", _edit_stream),
    ("edit_writer_", "(Tensor(a!) hidden, str tap) -> ()", _edit_writer),
):
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    _library._register_fake(_name, _nothing)


def tap(model: nn.Module, anatomy: Anatomy) -> TapSteering:
    """Place the operations in a model that is loaded and not yet compiled, and return its steering. Each rank
    of a pipeline has the operations of the blocks that it holds.

    Errors: UnsupportedError where the model has no module at a path of the anatomy, or a writer is edited before it.
    """
    global _steering
    from vllm.distributed import get_pp_group
    from vllm.model_executor.models.utils import PPMissingLayer

    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = {site: anatomy.block_module(site) for site in range(anatomy.blocks)}
    elsewhere: set[int | None] = {
        site for site, path in blocks.items() if isinstance(modules.get(path), PPMissingLayer)
    }
    if not get_pp_group().is_first_rank:  # where the head is the embedding, the last rank has that module too
        elsewhere.add(None)
    given = {w.module for w in anatomy.live_writers if w.given}
    taps = [(w.module, w.block) for w in anatomy.live_writers] + [(path, site) for site, path in blocks.items()]
    paths = dict.fromkeys(path for path, block in taps if block not in elsewhere)
    for path in paths:
        if path not in modules:
            raise UnsupportedError(
                f"{anatomy.architecture} in vLLM: expected a module {path}, found none; use --engine transformers"
            )
        if path in given:
            raise UnsupportedError(
                f"{anatomy.architecture} in vLLM: expected writers whose output is edited, found {path}, whose input "
                "is; use --engine transformers"
            )
        modules[path].register_forward_hook(_hook(path))
    _steering = TapSteering(model, anatomy, paths)
    return _steering


def _hook(path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # A block returns (hidden, residual), a linear layer (output, bias or None).
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            torch.ops.steer.edit_stream_(output[0], output[1], path)
        else:
            h: Any = output
            torch.ops.steer.edit_writer_(h[0] if isinstance(output, tuple) else h, path)

    return hook
