"""Decoding through torch.compile, one block at a time: blocks of the same kind share one compilation.

`SteeredModel.compile` makes a `CompiledStep`, inside of which `decode.py` then runs the model. The compiled code has no
hooks in it. The model calls each block as usual, so that hooks on blocks run as usual, and only the block's
`forward` is compiled code. A module inside of a block that carries hooks is called uncompiled, and the rest of the
block is compiled around it. So any slider can be moved, come and go without a compilation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from steer.model.forward import logits
from steer.model.kv_cache import GrowingLayer, growing_cache
from steer.model.loaded import LoadedModel
from steer.model.prefill import decoder_pass
from steer.model.products import is_matrix
from steer.model.written import WrittenText


class CompiledStep:
    """The compiled forward pass over one new token of one text. The plain model reads the prompts."""

    def __init__(self, model: LoadedModel, **options: Any) -> None:
        """`options` go to torch.compile."""
        self._model, hf = model, model.hf
        compiled: Any = torch.compile(_forward, **options)
        blocks = [hf.get_submodule(model.anatomy.block_module(b)) for b in range(model.anatomy.blocks)]
        self._blocks = [_Block(block, index, compiled) for index, block in enumerate(blocks)]
        head = hf.get_output_embeddings()
        # A head that is not a plain matrix, or not on the CPU, runs uncompiled.
        self._head: tuple[Any, nn.Module] | None = (
            (head, _Product(head)) if is_matrix(head) and head.weight.device.type == "cpu" else None
        )
        self._compiled = compiled

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile now what the next step would compile."""
        cache, ids = (
            growing_cache(self._model.hf.config),
            torch.zeros(1, 2, dtype=torch.long, device=self._model.device),
        )
        mask, texts = (
            torch.ones(1, 3, dtype=torch.long, device=ids.device),
            [WrittenText(self._model.tokenizer, [0, 0], 2)],
        )
        decoder_pass(self._model, ids, mask[:, :2], cache, None, texts)
        with self.running(cache):
            logits(self._model, decoder_pass(self._model, ids[:, :1], mask, cache, None, texts))

    @contextmanager
    def running(self, cache: Cache) -> Iterator[None]:
        """Inside, the pass over the token after those in the cache runs compiled code in the blocks and the head."""
        places = torch.arange(cache.get_seq_length() + 1, device=self._model.device)
        torch._dynamo.maybe_mark_dynamic(places, 0)
        try:
            for block in self._blocks:
                block.module.forward = block.over(cache, places)
            if self._head is not None:
                head, product = self._head
                head.forward = lambda x: self._compiled(product, x)
            yield
        finally:
            self.leave_blocks()
            if self._head is not None:
                self._head[0].__dict__.pop("forward", None)

    def leave_blocks(self) -> None:
        """Inside of `running`, have the blocks run plain code again, which reads several tokens."""
        for block in self._blocks:
            block.module.__dict__.pop("forward", None)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The function that is compiled: one for all blocks, so that blocks which are alike share one compilation."""
    return module(*args, **kwargs)


class _Block:
    """A block of the model, and copies of it that share its weights and have no hooks."""

    def __init__(self, module: nn.Module, index: int, compiled: Callable[..., Any]) -> None:
        self.module, self.index, self._compiled = module, index, compiled
        self._inside = [(name, m) for name, m in module.named_modules() if name]
        self._copies: dict[tuple[str, ...], nn.Module | None] = {}

    def over(self, cache: Cache, places: Int[Tensor, " seq"]) -> Callable[..., Any]:
        """The block's compiled forward over one token. `places`: the positions in the cache, the new token's last."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            block = self._copy()
            if block is None:
                return type(self.module).forward(self.module, *args, **kwargs)
            layer: Any = cache.layers[self.index]
            slot = _GrowingSlot(layer, places) if type(layer) is GrowingLayer else _Slot(layer)
            args = tuple(slot if a is cache else a for a in args)
            kwargs = {name: slot if a is cache else a for name, a in kwargs.items()}
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor):
                torch._dynamo.maybe_mark_dynamic(mask, mask.ndim - 1)
            out = self._compiled(block, *args, **kwargs)
            slot.close()
            return out

        return forward

    def _copy(self) -> nn.Module | None:
        """The block to compile, in which matrices that carry hooks now stay uncompiled; None where other modules do."""
        hooked = tuple(name for name, m in self._inside if m._forward_hooks or m._forward_pre_hooks)
        if hooked not in self._copies:
            self._copies[hooked] = _copied(self.module, hooked)
        return self._copies[hooked]


def _copied(block: nn.Module, hooked: tuple[str, ...]) -> nn.Module | None:
    """A copy of a block that shares its weights and has no hooks; the matrices in `hooked` are called uncompiled."""
    modules = dict(block.named_modules())
    if any(not is_matrix(modules[name]) for name in hooked):
        return None
    # The copy shares weights, buffers and configurations with the block.
    shared: dict[int, Any] = {id(t): t for t in (*block.parameters(), *block.buffers())}
    shared |= {id(v): v for m in modules.values() for v in vars(m).values() if isinstance(v, PretrainedConfig)}
    matrices = {name: m for name, m in modules.items() if is_matrix(m)}
    for name, module in matrices.items():
        if name in hooked:
            shared[id(module)] = _Hooked(module)
        elif module.weight.device.type == "cpu":
            shared[id(module)] = _Product(module)
    out = copy.deepcopy(block, shared)
    out.__dict__.pop("forward", None)
    for hooks in (out._forward_hooks, out._forward_pre_hooks):
        hooks.clear()
    return out


class _Product(nn.Module):
    """A matrix times one vector, written as a sum, which compiled code computes in one pass on all cores.

    MKL and oneDNN use one core for so thin a product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Float[Tensor, "1 1 in"]) -> Float[Tensor, "1 1 out"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (self.weight.to(wide) * x.to(wide).flatten()).sum(-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


class _Hooked(nn.Module):
    """A matrix that carries hooks: compiled code calls the model's module, which runs its hooks."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        _hooked[id(module)] = module
        # A tensor, since compiled code would treat a number as a constant.
        self.key = nn.Buffer(torch.tensor(id(module)))
        self.features = module.out_features

    def forward(self, x: Float[Tensor, "1 1 in"]) -> Float[Tensor, "1 1 out"]:
        return _call_hooked(x, self.key, self.features)


_hooked: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


@torch.library.custom_op("steer::call_hooked", mutates_args=())
def _call_hooked(x: Tensor, key: Tensor, features: int) -> Tensor:
    out: Tensor = _hooked[int(key)](x)
    # What an operation returns must not be its own input.
    return out.clone() if out is x else out


@_call_hooked.register_fake
def _(x: Tensor, key: Tensor, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


class _GrowingSlot:
    """One block's keys and values in the pass over one token. New ones are written into the cache's buffers."""

    def __init__(self, layer: GrowingLayer, places: Int[Tensor, " seq"]) -> None:
        self.keys, self.values = layer.extend()
        self.places = places
        for room in (self.keys, self.values):
            torch._dynamo.maybe_mark_dynamic(room, 2)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update`: return all keys and values, the new ones included."""
        last, seq = self.places[-1:], self.places.shape[0]
        self.keys.index_copy_(2, last, keys)
        self.values.index_copy_(2, last, values)
        return self.keys[:, :, :seq], self.values[:, :, :seq]

    def close(self) -> None:
        """Nothing to do: `update` has written into the cache."""


class _Slot:
    """The same for one of transformers' layers, such as a sliding window: `close` adds the new entries to it."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.new = [layer], None
        self.keys, self.values = layer.keys.contiguous(), layer.values.contiguous()
        for held in (self.keys, self.values):
            torch._dynamo.maybe_mark_dynamic(held, 2)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `Cache.update`: return all keys and values, the new ones included."""
        self.new = keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def close(self) -> None:
        """Add the new keys and values to the cache."""
        assert self.new is not None
        self.layer[0].update(*self.new)
