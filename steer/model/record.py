"""Forward hooks: reading the residual stream after each block, and replacing the output of a module.

Activations are read with `reading`: by `LoadedModel.record`, `forward.read_residuals`, `decode.generate`, token
readouts. Whatever changes an output, sliders included, does it with `replacing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.checkpoint.anatomy import Anatomy

Reader = Callable[[int, Float[Tensor, "batch seq d"]], None]
"""Called with (site, residual stream) in every forward pass."""


def replacing(change: Callable[[Tensor], Tensor], *, given: bool = False) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that replaces a module's output, or the first entry of a tuple, by `change` of it. `change` sees
    `[batch, new, d]`, also where a module of experts puts out a list of tokens. With `given` the output becomes
    the module's output for `change` of its input, for a norm."""

    def again(module: nn.Module, args: Any, output: Any) -> Any:
        return module.forward(change(args[0]), *args[1:])

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        shape = (*args[0].shape[:-1], h.shape[-1]) if h.ndim == 2 and args else h.shape
        changed = change(h.view(shape)).view(h.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return again if given else hook


@contextmanager
def reading(model: nn.Module, anatomy: Anatomy, sites: Sequence[int], reader: Reader) -> Iterator[None]:
    """While inside, call `reader` with (site, residual stream after that block), steering included, in every pass.

    Hooks are removed when the block ends, exceptions included.
    """
    handles: list[RemovableHandle] = []
    modules = {site: model.get_submodule(anatomy.block_module(site)) for site in sites}
    try:
        for site, module in modules.items():

            def hook(module, args, output, site=site):  # type: ignore[no-untyped-def]
                reader(site, output[0] if isinstance(output, tuple) else output)

            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        try:
            _take_off(handles)
        except BaseException:  # Ctrl-C between two handles
            _take_off(handles)
            raise


def _take_off(handles: list[RemovableHandle]) -> None:
    while handles:
        handles[-1].remove()
        handles.pop()


class Recording:
    """Residual streams by site, one tensor `[batch, seq, d]` per forward pass."""

    def __init__(self) -> None:
        self._passes: dict[int, list[Tensor]] = {}

    def __getitem__(self, site: int) -> Float[Tensor, "batch seq d"]:
        """The residual stream of the last forward pass at `site`."""
        return self._passes[site][-1]

    def passes(self, site: int) -> list[Float[Tensor, "batch seq d"]]:
        """One tensor for every forward pass since recording began; with a KV cache each holds the new tokens only."""
        return self._passes[site]

    def append(self, site: int, residual: Tensor) -> None:
        """Add the residual stream of a pass; a `Reader`."""
        self._passes.setdefault(site, []).append(residual.detach())
