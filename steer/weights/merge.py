"""Merging by mergekit's recipes, into a directory that is complete or absent."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from steer.errors import CheckpointError, SteerError
from steer.weights.fetch import PACKAGED, resolve
from steer.weights.staging import hash_file, staged, write_json

MANIFEST = "steer_merge.json"
"""In the output: the recipe, the hashes of what went in, versions. Written last."""
_MODEL_KEYS = ("model", "base_model")


def read_recipe(path: Path) -> dict[str, Any]:
    """A mergekit recipe, checked against mergekit's own schema; no weights are touched.

    Errors: SteerError when the file is missing or mergekit does not accept it.
    """
    if not path.is_file():
        raise SteerError(f"{path}: expected a mergekit recipe, found no file; check the path")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SteerError(f"{path}: expected YAML, found {' '.join(str(e).split())}; mend the recipe") from e
    _validated(raw, path)
    return raw


def recipe_models(raw: Any) -> list[str]:
    """Every model a recipe names, as written, in order of first mention."""
    found: list[str] = []
    _walk(raw, lambda name: found.append(name) or name)
    return list(dict.fromkeys(found))


def merge(recipe: Path, out: Path, *, device: str | None = None) -> Path:
    """Run `recipe` and write the merged checkpoint to `out`.

    Relative paths in a recipe are looked up beside the recipe, then from the working directory; the default
    model is fetched when it is named; `model+adapter` merges a PEFT adapter first, as mergekit has it.
    Errors: SteerError or CheckpointError naming the recipe or the model that is missing.
    """
    raw = read_recipe(recipe)
    located = {name: _locate(name, recipe) for name in recipe_models(raw)}
    resolved = _walk(deepcopy(raw), lambda name: located[name])
    config = _validated(resolved, recipe)
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # mergekit warns of duplicate keys in the configs it copies; what matters it raises.
    logging.getLogger("mergekit").setLevel(logging.ERROR)
    with (
        staged(out) as work,
        tempfile.TemporaryDirectory(prefix=".steer-adapters-", dir=work.parent) as cache,
    ):
        # A fresh cache a run: mergekit takes an adapter half merged by a killed run for a whole one.
        options = MergeOptions(lora_merge_cache=cache, device=device, quiet=not sys.stderr.isatty(), lazy_unpickle=True)
        try:
            run_merge(config, str(work), options, config_source=recipe.read_text(encoding="utf-8"))
        except (RuntimeError, ValueError, KeyError) as e:
            raise SteerError(f"{recipe}: mergekit failed: {' '.join(str(e).split())}; mend the recipe") from e
        if not (work / "config.json").is_file() or not any(work.glob("*.safetensors")):
            raise SteerError(f"{recipe}: mergekit wrote no checkpoint; run mergekit-yaml on it to see why")
        _carry_chat_template(resolved, work)
        manifest = {
            "recipe": raw,
            "inputs": {name: _input_hashes(place) for name, place in located.items()},
            "versions": {p: version(p) for p in ("mergekit", "torch", "transformers")},
        }
        write_json(work / MANIFEST, manifest)
    return out


def is_merge_of(out: Path, recipe: Path) -> bool:
    """Whether `out` holds a finished merge of this recipe from the same inputs."""
    file = out / MANIFEST
    if not file.is_file():
        return False
    manifest, raw = json.loads(file.read_text()), read_recipe(recipe)
    inputs = {name: _input_hashes(_locate(name, recipe)) for name in recipe_models(raw)}
    return manifest["recipe"] == raw and manifest["inputs"] == inputs


def _validated(raw: Any, path: Path) -> Any:
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    try:
        return MergeConfiguration.model_validate(raw)
    except (ValidationError, RuntimeError) as e:
        reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise SteerError(f"{path}: mergekit does not accept the recipe: {reason}; mend the recipe") from e


def _walk(node: Any, change: Any) -> Any:
    """Pass every model reference of a recipe through `change`, in place."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        if (key in _MODEL_KEYS and isinstance(value, str)) or (
            key == "source" and isinstance(value, str) and "/" in value
        ):
            node[key] = change(value)
        else:
            _walk(value, change)
    return node


def _locate(name: str, recipe: Path) -> str:
    """A model reference of the recipe with its paths made absolute."""
    parts = name.split("+")
    return "+".join(_locate_one(p, recipe, adapter=i > 0) for i, p in enumerate(parts))


def _locate_one(name: str, recipe: Path, adapter: bool) -> str:
    for place in (recipe.parent / name, Path(name)):
        if place.is_dir():
            wanted = "adapter_config.json" if adapter else "config.json"
            if not (place / wanted).is_file():
                raise CheckpointError(f"{recipe}: {name}: expected {wanted} in {place}, found none; name a whole model")
            return str(place.resolve())
    if name in PACKAGED:
        return resolve(name)
    try:
        return resolve(name.split("@")[0]) + name[len(name.split("@")[0]) :]
    except CheckpointError as e:
        raise CheckpointError(f"{recipe}: names a model that is not there: {e}") from e


def _input_hashes(place: str) -> dict[str, str]:
    """sha256 of the weight files of a local reference; hub ids are named with their revision instead."""
    out = {}
    for part in place.split("+"):
        for file in sorted(Path(part).glob("*.safetensors")) if Path(part).is_dir() else []:
            # Paths differ between machines, the files do not.
            out[f"{file.parent.name}/{file.name}"] = hash_file(file)
    return out


def _carry_chat_template(resolved: dict[str, Any], work: Path) -> None:
    """mergekit copies the tokenizer; a chat template in a file of its own can be left behind."""
    base = Path((resolved.get("base_model") or recipe_models(resolved)[0]).split("+")[0])
    source, target = base / "chat_template.jinja", work / "chat_template.jinja"
    if source.is_file() and not target.exists() and not resolved.get("chat_template"):
        target.write_bytes(source.read_bytes())
