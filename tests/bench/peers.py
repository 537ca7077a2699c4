"""Other libraries that add a vector to the residual stream, each through its installed package.

    python tests/bench/peers.py

prints which of them there are. None is needed. Those that pin older versions of what this project uses go beside it,
not into it: `pip install --no-deps --target DIR PACKAGE...`, and DIR on PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer
from torch import Tensor

Around = Callable[[Callable[[], object]], None]
"""Runs what it is given with something on a model, and takes it off again."""
Peer = Callable[[Any, Sequence[int], Tensor], Around]
"""(transformers model, blocks, vector `[d]` in its dtype): the vector is added after these blocks."""


def main() -> None:
    """Print which peers are installed."""
    found, left_out = installed()
    print(*(f"{name}: installed" for name in found), *left_out, sep="\n")


def bare_hook(hf: Any, sites: Sequence[int], vector: Tensor) -> Around:
    """The least that a hook can do."""

    def around(run: Callable[[], object]) -> None:
        hooks = [hf.base_model.layers[site].register_forward_hook(lambda module, args, h: h + vector) for site in sites]
        run()
        for hook in hooks:
            hook.remove()

    return around


def installed() -> tuple[dict[str, Peer], list[str]]:
    """What there is by name, and a line for each that there is not."""
    found, lines = {}, []
    for name, peer in {"repeng": repeng, "steering-vectors": steering_vectors, "nnsight": nnsight}.items():
        try:
            found[name] = peer()
        except ImportError as e:
            lines.append(f"{name}: left out: not installed: {e} (pip install {name})")
    return found, lines


def repeng() -> Peer:
    """Wraps blocks."""
    package = importlib.util.find_spec("repeng")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'repeng'")
    # Its control.py alone: the part of the package that finds vectors wants NumPy 1.
    spec: Any = importlib.util.spec_from_file_location("_", f"{package.submodule_search_locations[0]}/control.py")
    control: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(control)

    def peer(hf: Any, sites: Sequence[int], vector: Tensor) -> Around:
        def around(run: Callable[[], object]) -> None:
            wrapped = control.ControlModel(hf, list(sites))
            wrapped.set_raw_control(dict.fromkeys(sites, vector))
            run()
            wrapped.unwrap()

        return around

    return peer


def steering_vectors() -> Peer:
    """Hooks that add in place."""
    from steering_vectors import SteeringVector

    def peer(hf: Any, sites: Sequence[int], vector: Tensor) -> Around:
        steering = SteeringVector(dict.fromkeys(sites, vector), "decoder_block")

        def around(run: Callable[[], object]) -> None:
            with steering.apply(hf):
                run()

        return around

    return peer


def nnsight() -> Peer:
    """Code that runs beside the model. One trace around the steps of a turn, so that opening it is not counted."""
    from nnsight import NNsight

    def peer(hf: Any, sites: Sequence[int], vector: Tensor) -> Around:
        model = NNsight(hf)

        def around(run: Callable[[], object]) -> None:
            # It warns of the step that never came after the last.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with model.trace(None, fn=lambda _: run()) as tracer:
                    for _ in tracer.all():
                        for site in sites:
                            model.model.layers[site].output += vector

        return around

    return peer


if __name__ == "__main__":
    typer.run(main)
