"""The config of a merge: per-layer lists follow the slices, and readers on transformers 4 find their keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.files import read_json_object, write_atomic

_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_INDICES = ("mlp_only_layers", "moe_layers")
"""Lists that name layers by number; every other list with an entry a layer has one value for each."""


def sliced_lists(slices: list[tuple[Mapping[str, Any], int, int]]) -> dict[str, list[Any]]:
    """The per-layer lists of a config for a model of stacked slices, each (the source's config, first layer, end).

    Errors: SteerError for sources of which one has a list and another has none.
    """
    first = slices[0][0]
    out: dict[str, list[Any]] = {}
    for key, value in first.items():
        if not isinstance(value, list) or (key not in _INDICES and len(value) != _depth(first)):
            continue
        made: list[Any] = []
        at = 0
        for config, start, end in slices:
            there = config.get(key)
            if not isinstance(there, list):
                raise SteerError(
                    f"expected {key} in the config of every source, found one without; merge sources alike"
                )
            if key in _INDICES:
                made += [at + i - start for i in there if start <= i < end]
            else:
                made += there[start:end]
            at += end - start
        out[key] = made
    return out


@contextmanager
def lists_follow_slices() -> Iterator[None]:
    """Inside, the config that mergekit makes for the output has the per-layer lists of its slices.

    It sets the number of layers and leaves the lists, so that the finished merge fails when its config is saved.
    """
    import mergekit.merge as kit

    made = kit._model_out_config

    def sliced(merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        out = made(merge_config, *args, **kwargs)
        if merge_config.slices:
            sources = [s.sources[0] for s in merge_config.slices]
            configs = [(s.model.config().to_dict(), *s.layer_range) for s in sources]
            for key, value in sliced_lists(configs).items():
                setattr(out, key, value)
        return out

    kit._model_out_config = sliced
    try:
        yield
    finally:
        kit._model_out_config = made


def add_older_rope_keys(file: Path) -> None:
    """Write `rope_theta` and `rope_scaling` at the top of a config.json too, beside transformers 5's `rope_parameters`.

    Readers on transformers 4 take the defaults of the architecture where the two are missing.
    """
    config = read_json_object(file)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update({k: v for k, v in _older_rope(part).items() if k not in part})
    write_atomic(file, json.dumps(config, indent=2) + "\n")


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    out: dict[str, Any] = {}
    by_type = {k: v for k, v in rope.items() if isinstance(v, dict)}
    if by_type:  # as Gemma 3: one set for layers with full attention, one for those with a window
        if theta := by_type.get("sliding_attention", {}).get("rope_theta"):
            out["rope_local_base_freq"] = theta
        rope = by_type.get("full_attention", {})
    if "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
        kept = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        out["rope_scaling"] = None if kept.get("rope_type", "default") == "default" else kept
    return out


def _depth(config: Mapping[str, Any]) -> int:
    return next((n for k in _DEPTH if type(n := config.get(k)) is int), -1)
