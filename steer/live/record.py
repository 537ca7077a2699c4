"""Reading the residual stream: forward hooks that hand each site's output to a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer.weights.anatomy import Anatomy

Reader = Callable[[int, Float[Tensor, "batch seq d"]], None]
"""Called with (site, residual stream) in every forward pass."""


@contextmanager
def reading(model: nn.Module, anatomy: Anatomy, sites: Sequence[int], reader: Reader) -> Iterator[None]:
    """Call `reader` with the residual stream after each block in `sites`, steering included, while inside.

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
        except BaseException:  # Ctrl-C between two of them
            _take_off(handles)
            raise


def _take_off(handles: list[RemovableHandle]) -> None:
    while handles:
        handles[-1].remove()
        handles.pop()


class Recording:
    """Residual streams by site, one tensor `[batch, seq, d]` a forward pass."""

    def __init__(self) -> None:
        self._passes: dict[int, list[Tensor]] = {}

    def __getitem__(self, site: int) -> Float[Tensor, "batch seq d"]:
        """The residual stream of the last forward pass at `site`."""
        return self._passes[site][-1]

    def passes(self, site: int) -> list[Float[Tensor, "batch seq d"]]:
        """Every forward pass since recording began; under a KV cache each holds its new tokens."""
        return self._passes[site]

    def append(self, site: int, residual: Tensor) -> None:
        self._passes.setdefault(site, []).append(residual.detach())
