"""Merges fine-tunes by a mergekit recipe, and repairs what mergekit leaves out of the config and the side files.

`merge` runs mergekit in a staging directory, then carries over the chat template, repairs config and card, and writes a
manifest with the hashes of all inputs.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any
from unittest.mock import patch

from steer.checkpoint.fetch import check_adapter, disk_errors, hub_errors, resolve
from steer.checkpoint.staging import check_output, hash_file, staged, write_json
from steer.core.small_files import read_yaml
from steer.errors import CheckpointError, SteerError, UsageError
from steer.files import one_line, read_json_object, write_atomic_json

MANIFEST = "steer_merge.json"
"""File in the output with the recipe, the hashes of the inputs and the weights, and versions. Written last."""
_GENERATION = "generation_config.json"
_READ = {".safetensors", ".bin", ".pt", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Suffixes of the files that a merge depends on."""
_CONFIGS = {"model": "config.json", "lora": "adapter_config.json"}
"""The parts of a model reference in mergekit's long form, and the file that each must have."""
_MODEL_KEYS = ("model", "base_model")
_TOKENIZER_KEYS = ("source", "tokenizer_source")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a mergekit recipe and check it against mergekit's schema. No weights are read.

    Errors: SteerError if the file is missing or mergekit does not accept it.
    """
    raw = read_yaml(path, "a mergekit recipe", aliases=True)
    validated(raw, path)
    return raw


def validated(raw: Any, where: str | Path) -> Any:
    """A recipe as mergekit's configuration. Errors: SteerError that begins with `where` if mergekit does not accept
    it."""
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    try:
        config = MergeConfiguration.model_validate(raw)
    except (ValidationError, RuntimeError) as e:
        reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise SteerError(f"{where}: mergekit does not accept the recipe: {reason}; mend the recipe") from e
    slices = [s for part in (config, *(config.modules or {}).values()) for s in part.slices or ()]
    for first, end in (source.layer_range for s in slices for source in s.sources):
        if not 0 <= first < end:  # mergekit would write a model without these layers
            raise SteerError(
                f"{where}: layer_range: expected the first layer and the one after the last, as [0, 12], found "
                f"[{first}, {end}]; mend the recipe"
            )
    return config


def recipe_models(raw: Any) -> list[str]:
    """Every model that a recipe names, as written there, in order of first mention."""
    found: list[str] = []
    _walk(deepcopy(raw), lambda name: found.append(name) or name)
    return list(dict.fromkeys(found))


def merge(
    recipe: Path, out: Path, *, device: str | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Run `recipe` and write the merged checkpoint to `out`. `say` is called with a line when a step begins.

    Relative paths in a recipe are looked up beside the recipe, then from the working directory. The default model is
    downloaded if the recipe names it. `model+adapter` first merges a PEFT adapter, in the recipe's `dtype`. `device` is
    the one mergekit computes on. Methods that drop weights at random, as DARE, draw the same numbers in every run, so
    that the same recipe and models give the same bytes.

        steer.merge(Path("recipe.yml"), Path("merged"), say=print)

    Errors: SteerError or CheckpointError that names the recipe or the missing model.
    """
    check_output(out)
    raw = read_recipe(recipe)
    say("1 of 3: getting the models that the recipe names")
    located = {name: locate(name, recipe) for name in recipe_models(raw)}
    for name, reference in located.items():
        _check_hub(name, reference, recipe)
    config = validated(renamed(raw, lambda name: located[name]), recipe)
    import torch
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from steer.checkpoint.adapters import fitting_adapters

    text = recipe.read_text(encoding="utf-8")
    # A new cache for each run: mergekit would take an adapter that a killed run merged in part for a complete one.
    with staged(out) as work:
        with tempfile.TemporaryDirectory(prefix=".adapters-", dir=work) as cache:
            options = MergeOptions(
                lora_merge_cache=cache, lora_merge_dtype=raw.get("dtype"), device=device,
                quiet=not sys.stderr.isatty(), lazy_unpickle=True,
            )  # fmt: skip
            say(f"2 of 3: merging {len(located)} models by {config.merge_method or 'slices'}")
            with (
                _mergekit_errors(recipe), _lists_follow_slices(), _files_closed(), fitting_adapters(),
                torch.random.fork_rng(),
            ):  # fmt: skip
                _check_layers(config)
                torch.manual_seed(0)
                run_merge(config, str(work), options, config_source=text)
        if not (work / "config.json").is_file() or not any(work.glob("*.safetensors")):
            raise SteerError(f"{recipe}: mergekit wrote no checkpoint; run mergekit-yaml on it to see why")
        _check_finite(work, recipe)
        _carry_side_files(raw, located, work)
        add_older_rope_keys(work / "config.json")
        _mend_card(work / "README.md", Path(os.path.realpath(out)).name, located)
        say("3 of 3: hashing what went in and what came out")
        manifest = {
            "recipe": raw,
            "inputs": {name: _input_hashes(reference) for name, reference in located.items()},
            "weights": _hashes(work),
            "versions": {p: version(p) for p in ("mergekit", "torch", "transformers")},
        }
        write_json(work / MANIFEST, manifest)
    return out


def with_absolute_paths(raw: dict[str, Any], recipe: Path) -> dict[str, Any]:
    """A copy of a recipe that may be merged from any file: each model in mergekit's short form, the paths absolute.
    `recipe` is where relative paths are looked up, as in `merge`. Hub ids and the default model's name stay.

    Errors: CheckpointError for a model that is not there; UsageError for a path that the short form cannot hold.
    """
    return renamed(raw, lambda name: absolute_name(name, recipe))


def renamed(raw: dict[str, Any], change: Callable[[str], Any]) -> dict[str, Any]:
    """A copy of a recipe with `change(name)` for each model's name, the tokenizer's source among them."""
    return _walk(deepcopy(raw), change)


def absolute_name(name: str, recipe: Path | None = None) -> str:
    """One model reference, as in `with_absolute_paths`."""
    locate(name, recipe)  # raises for a model that is not there
    parts = [name] if _beside(name, recipe) else name.split("+")
    places = [_beside(part, recipe) for part in parts]
    out = "+".join(str(place.resolve()) if place else part for place, part in zip(places, parts, strict=True))
    if len(parts) > 1 and any("+" in str(place.resolve()) for place in places if place):
        raise UsageError(f"{name}: expected an adapter whose path has no +, found {out}; move the models")
    return out


def merge_bytes(recipe: Path) -> int:
    """The most bytes that a merge by this recipe writes at a time: the output, and every model that an adapter is
    merged into first. Models that are not downloaded yet count as none.

    Errors: as `merge`.
    """
    raw = read_recipe(recipe)
    located = {name: locate(name, recipe) for name in recipe_models(raw)}
    within = raw.get("dtype")
    places = [(Path(reference["model"]["path"] or ""), "lora" in reference) for reference in located.values()]
    out = max(_stored_bytes(place, raw.get("out_dtype") or within) for place, _ in places)
    return out + sum(_stored_bytes(place, within) for place, adapted in places if adapted)


def input_hashes(recipe: Path) -> dict[str, dict[str, str]]:
    """sha256 of every file that a merge by this recipe may read, by model. A hub id has none; its name stands for it.

    Errors: as `merge`.
    """
    return {name: _input_hashes(locate(name, recipe)) for name in recipe_models(read_recipe(recipe))}


def is_merge_of(out: Path, recipe: Path) -> bool:
    """Whether `out` holds a complete merge of this recipe from the same inputs, unchanged since it was written."""
    file = out / MANIFEST
    if not file.is_file():
        return False
    manifest, raw = read_json_object(file, do="merge again"), read_recipe(recipe)
    if manifest.get("recipe") != raw or manifest.get("weights") != _hashes(out):
        return False
    return manifest.get("inputs") == input_hashes(recipe)


def _check_layers(config: Any) -> None:
    """Raise SteerError for layers that a source does not have: mergekit would plan every one of them first."""
    for source in (source for s in config.slices or () for source in s.sources):
        depth = source.model.config().get_text_config().num_hidden_layers
        if source.layer_range[1] > depth:
            raise SteerError(
                f"layer_range: expected at most {depth}, the number of layers of {Path(source.model.model.path).name}, "
                f"found {list(source.layer_range)}; mend the recipe"
            )


def _walk(node: Any, change: Callable[[str], Any]) -> Any:
    """Replace every model reference in a recipe by `change(reference)`, in place."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        name = _model_name(value)
        if name and (key in _MODEL_KEYS or (key in _TOKENIZER_KEYS and name not in ("union", "base"))):
            node[key] = change(name)
        else:
            _walk(value, change)
    return node


def _model_name(value: Any) -> str | None:
    """The model reference `value` in mergekit's short form, `model@revision+adapter`; the long form `{model: {path,
    revision}, lora: {path, revision}}` is converted. None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or "model" not in value or not set(value) <= {"model", "lora"}:
        return None
    from mergekit.common import ModelReference

    try:
        return str(ModelReference.model_validate(value))
    except ValueError:  # an entry of a list whose only key is `model`
        return None


def locate(name: str, recipe: Path | None = None) -> dict[str, dict[str, str | None]]:
    """A model reference in mergekit's long form, `{model: {path, revision}, lora: {path, revision}}`, with absolute
    paths, or names of the hub. Paths may contain `+` and `@`, which separate the parts of the short form.

    Errors: CheckpointError for a model that is not there, which begins with the recipe's name if that is given.
    """
    parts = [name] if _beside(name, recipe) else name.split("+")
    return {key: _locate_one(part, recipe, _CONFIGS[key]) for key, part in zip(_CONFIGS, parts, strict=False)}


def _locate_one(name: str, recipe: Path | None, wanted: str) -> dict[str, str | None]:
    where = f"{recipe}: " if recipe else ""
    if place := _beside(name, recipe):
        if not (place / wanted).is_file():
            adapter = wanted == _CONFIGS["model"] and (place / _CONFIGS["lora"]).is_file()
            found, do = ("an adapter", f"write BASE+{name}") if adapter else ("none", "name a whole model")
            raise CheckpointError(f"{where}{name}: expected {wanted} in {place}, found {found}; {do}")
        if wanted == _CONFIGS["lora"]:
            check_adapter(str(place), f"{where}{name}")
        return {"path": str(place.resolve()), "revision": None}
    repo, _, revision = name.partition("@")
    try:
        return {"path": resolve(repo), "revision": revision or None}
    except CheckpointError as e:
        raise CheckpointError(f"{where and where + 'names a model that is not there: '}{e}") from e


def _beside(name: str, recipe: Path | None) -> Path | None:
    places = [Path(name)] if recipe is None else [recipe.parent / name, Path(name)]
    return next((p for p in places if p.is_dir()), None)


def _check_hub(name: str, reference: Mapping[str, Mapping[str, Any]], recipe: Path) -> None:
    """Raise CheckpointError if a hub id cannot be downloaded, before gigabytes of other models are."""
    from huggingface_hub import hf_hub_download

    for key, part in reference.items():
        if not Path(part["path"]).is_dir():
            with hub_errors(f"{recipe}: names a model that is neither beside it nor on the hub: {name}"):
                hf_hub_download(part["path"], _CONFIGS[key], revision=part["revision"])


def _input_hashes(reference: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """sha256 of every file that a merge may read. Hub ids have no hashes; their names stand for them."""
    folders = [Path(part["path"]) for part in reference.values() if Path(part["path"]).is_dir()]
    # Keyed by the position in the reference, because paths differ between machines and the files do not.
    return {name: digest for i, d in enumerate(folders) for name, digest in _hashes(d, _READ, i).items()}


def _hashes(folder: Path, suffixes: Collection[str] = (".safetensors",), number: int = 0) -> dict[str, str]:
    """sha256 of the files with these suffixes in a directory."""
    files = [f for f in sorted(folder.iterdir()) if f.suffix in suffixes and f.is_file()]
    return {f"{number}/{f.name}": hash_file(f) for f in files if not f.name.startswith(".")}


def _stored_bytes(folder: Path, dtype: str | None) -> int:
    """Size of a checkpoint's weights in a dtype, or as they are stored; 0 if they are not on this disk."""
    import torch
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if dtype is None:
        return sum(file.stat().st_size for file in files)
    count = 0
    for file in files:
        with safe_open(str(file), framework="pt") as f:
            count += sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118
    return count * getattr(torch, dtype).itemsize


def _check_finite(work: Path, recipe: Path) -> None:
    """Raise SteerError for a weight that is not finite: the model would repeat one token, or compute NaN."""
    import torch
    from safetensors import safe_open

    for file in sorted(work.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                tensor = f.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    half = tensor.dtype == torch.float16
                    do = "set out_dtype to bfloat16" if half else "see whether weights of the recipe add up to 0"
                    raise SteerError(
                        f"{recipe}: expected finite weights, found {name} with some that {str(tensor.dtype)[6:]} "
                        f"cannot hold or that are not finite in a source; {do}"
                    )


@contextmanager
def _mergekit_errors(recipe: Path) -> Iterator[None]:
    """Turn mergekit's failures into SteerError, including those that it only logs, and silence its other messages."""
    kit, transformers = logging.getLogger("mergekit"), logging.getLogger("transformers")
    before, errors = (kit.level, kit.propagate, transformers.level), BufferingHandler(1000)
    # One of mergekit's libraries calls `logging.info`, which would add a handler that prints everyone's messages from
    # then on.
    handlers = list(logging.root.handlers)
    kit.addHandler(errors)
    kit.setLevel(logging.ERROR)
    kit.propagate = False
    transformers.setLevel(logging.ERROR)
    try:
        with disk_errors():
            yield
        # If the disk is full when the tokenizer is copied, mergekit logs the error and reports success.
        for record in errors.buffer:
            e = record.exc_info and record.exc_info[1]
            if isinstance(e, OSError) and e.errno:
                raise e
    except SteerError as e:
        raise type(e)(f"{recipe}: {e}") from e
    except Exception as e:  # mergekit's libraries raise anything
        if isinstance(e, OSError) and e.errno:  # an error of the disk, for which `staged` has the message
            raise
        raise SteerError(f"{recipe}: mergekit failed: {one_line(e)}; mend the recipe") from e
    finally:
        kit.removeHandler(errors)
        logging.root.handlers[:] = handlers
        kit.setLevel(before[0])
        kit.propagate = before[1]
        transformers.setLevel(before[2])


@contextmanager
def _files_closed() -> Iterator[None]:
    """While the block runs, mergekit closes a file after each tensor, and it forgets its cache of files after the
    block.

    mergekit would keep every file mapped until the process ends: the default merge took up to 3.5 GB, 2.4 of them pages
    of merged adapters. It would also read old contents of an adapter that was trained further between two merges.
    """
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader
    from mergekit.io.tasks import LoaderCache

    read = LazyTensorLoader.get_tensor

    def read_and_close(loader: LazyTensorLoader, *args: Any, **kwargs: Any) -> Any:
        tensor = read(loader, *args, **kwargs)
        if loader.index.is_safetensors:  # opening another file reads all of its index
            loader.flush()
        return tensor

    LoaderCache.loaders.clear()
    try:
        with patch.object(LazyTensorLoader, "get_tensor", read_and_close):
            yield
    finally:
        LoaderCache.loaders.clear()


def _carry_side_files(raw: dict[str, Any], located: Mapping[str, Mapping[str, Any]], work: Path) -> None:
    """Copy the base model's generation_config.json, which holds the ids that end a reply and which mergekit leaves out,
    and its chat template file, which mergekit may leave out."""
    base = Path(located[_model_name(raw.get("base_model")) or next(iter(located))]["model"]["path"])
    tokenizer = raw.get("tokenizer_source") or (raw.get("tokenizer") or {}).get("source")
    renumbered = tokenizer not in (None, "base")
    for name, wanted in (("chat_template.jinja", not raw.get("chat_template")), (_GENERATION, not renumbered)):
        source, target = base / name, work / name
        if wanted and source.is_file() and not target.exists():
            target.write_bytes(source.read_bytes())


def _mend_card(card: Path, title: str, located: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the card's title, which mergekit takes from the staging directory, and this machine's paths in model
    names."""
    text = re.sub("^# .*$", lambda _: f"# {title}", card.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    parts = [pair for name, ref in located.items() for pair in zip(ref.values(), name.split("+"), strict=False)]
    places = {part["path"]: name for part, name in parts if Path(part["path"]).is_dir()}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    card.write_text(text, encoding="utf-8")


_INDICES = ("mlp_only_layers", "moe_layers")
"""Lists that contain layer numbers. Any other list with as many entries as there are layers has one value per layer."""


def sliced_lists(slices: list[tuple[Mapping[str, Any], int, int]]) -> dict[str, list[Any]]:
    """The per-layer lists in the config of a model that stacks slices. Each slice is (config of the source, first
    layer, end).

    Errors: SteerError if one source has a list and another has not.
    """
    first = slices[0][0]
    out: dict[str, list[Any]] = {}
    for key, value in first.items():
        if not isinstance(value, list) or (key not in _INDICES and len(value) != first["num_hidden_layers"]):
            continue
        out[key], at = [], 0
        for config, start, end in slices:
            values = config.get(key)
            if not isinstance(values, list):
                raise SteerError(
                    f"expected {key} in the config of every source, found one without; merge sources alike"
                )
            if key in _INDICES:
                out[key] += [at + i - start for i in values if start <= i < end]
            else:
                out[key] += values[start:end]
            at += end - start
    return out


@contextmanager
def _lists_follow_slices() -> Iterator[None]:
    """While the block runs, mergekit's config for the output gets the per-layer lists of its slices.

    mergekit sets the number of layers but leaves these lists, so that the finished merge fails when its config is
    saved.
    """
    import mergekit.merge as kit

    original = kit._model_out_config

    def sliced(merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(merge_config, *args, **kwargs)
        if merge_config.slices:
            sources = [s.sources[0] for s in merge_config.slices]
            configs = [(s.model.config(), *s.layer_range) for s in sources]
            depth = "num_hidden_layers"  # under another name in some files
            found = sliced_lists([(c.to_dict() | {depth: c.num_hidden_layers}, *r) for c, *r in configs])
            for key, value in found.items():
                setattr(out, key, value)
        return out

    with patch.object(kit, "_model_out_config", sliced):
        yield


def add_older_rope_keys(file: Path) -> None:
    """Add `rope_theta` and `rope_scaling` to the top level of a config.json, beside transformers 5's `rope_parameters`.

    Programs on transformers 4 use the architecture's defaults if the two keys are missing.
    """
    config = read_json_object(file)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(rope := part.get("rope_parameters"), dict):
            older = _older_rope(rope, str(part.get("model_type")))
            part.update({k: v for k, v in older.items() if k not in part})
    write_atomic_json(file, config)


def _older_rope(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The keys that transformers 4 reads, from `rope_parameters`. 5 reads them too, and takes a `rope_scaling` in place
    of `rope_parameters`."""
    out: dict[str, Any] = {}
    by_type = {k: v for k, v in rope.items() if isinstance(v, dict)}
    if by_type:  # as in Gemma 3: one set for layers with full attention, one for layers with a window
        if theta := by_type.get("sliding_attention", {}).get("rope_theta"):
            out["rope_local_base_freq"] = theta
        rope = by_type.get("full_attention", {})
    if "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if model_type == "phi3" and scaling.get("rope_type") == "longrope":  # it takes these three keys and no other
            scaling = {"type": "longrope", **{k: scaling[k] for k in ("short_factor", "long_factor")}}
        default = scaling.get("rope_type", scaling.get("type", "default")) == "default"
        out["rope_scaling"] = None if default else scaling
        if (share := rope.get("partial_rotary_factor")) is not None:
            out["partial_rotary_factor"] = share
        if model_type.startswith("gpt_neox"):
            out["rotary_emb_base"] = rope["rope_theta"]
            out |= {} if share is None else {"rotary_pct": share}
    return out
