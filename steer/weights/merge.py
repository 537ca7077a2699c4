"""Merging by mergekit's recipes, into a directory that is complete or absent."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steer.errors import CheckpointError, SteerError
from steer.files import read_json_object
from steer.values.small_files import read_yaml
from steer.weights.fetch import PACKAGED, disk_errors, hub_errors, resolve
from steer.weights.merged_config import add_older_rope_keys, lists_follow_slices
from steer.weights.staging import check_output, hash_file, staged, write_json

MANIFEST = "steer_merge.json"
"""In the output: the recipe, the hashes of what went in, versions. Written last."""
_GENERATION = "generation_config.json"
_READ = {".safetensors", ".bin", ".pt", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Endings of the files that a merge depends on."""
_MODEL_KEYS = ("model", "base_model")
_TOKENIZER_KEYS = ("source", "tokenizer_source")


def read_recipe(path: Path) -> dict[str, Any]:
    """A mergekit recipe, checked against mergekit's own schema; no weights are touched.

    Errors: SteerError when the file is missing or mergekit does not accept it.
    """
    raw = read_yaml(path, "a mergekit recipe", aliases=True)
    _validated(raw, path)
    return raw


def recipe_models(raw: Any) -> list[str]:
    """Every model a recipe names, as written, in order of first mention."""
    found: list[str] = []
    _walk(deepcopy(raw), lambda name: found.append(name) or name)
    return list(dict.fromkeys(found))


def merge(
    recipe: Path, out: Path, *, device: str | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Run `recipe` and write the merged checkpoint to `out`. `say` is told which step begins.

    Relative paths in a recipe are looked up beside the recipe, then from the working directory; the default
    model is fetched when it is named; `model+adapter` merges a PEFT adapter first, in the recipe's `dtype`.
    Errors: SteerError or CheckpointError naming the recipe or the model that is missing.
    """
    check_output(out)
    raw = read_recipe(recipe)
    say("1 of 3: getting the models that the recipe names")
    located = {name: _locate(name, recipe) for name in recipe_models(raw)}
    for name, parts in located.items():
        _check_hub(name, parts, recipe)
    resolved = _walk(deepcopy(raw), lambda name: _reference(located[name]))
    config = _validated(resolved, recipe)
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = recipe.read_text(encoding="utf-8")
    # A fresh cache a run: mergekit takes an adapter half merged by a killed run for a whole one.
    with staged(out) as work:
        with tempfile.TemporaryDirectory(prefix=".adapters-", dir=work) as cache:
            options = MergeOptions(
                lora_merge_cache=cache, lora_merge_dtype=raw.get("dtype"), device=device,
                quiet=not sys.stderr.isatty(), lazy_unpickle=True,
            )  # fmt: skip
            say(f"2 of 3: merging {len(located)} models by {config.merge_method or 'slices'}")
            with _mergekit_errors(recipe), lists_follow_slices(), _files_let_go():
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
            "inputs": {name: _input_hashes(parts) for name, parts in located.items()},
            "weights": _weight_hashes((str(work),)),
            "versions": {p: version(p) for p in ("mergekit", "torch", "transformers")},
        }
        write_json(work / MANIFEST, manifest)
    return out


def is_merge_of(out: Path, recipe: Path) -> bool:
    """Whether `out` holds a finished merge of this recipe from the same inputs, as it was written."""
    file = out / MANIFEST
    if not file.is_file():
        return False
    manifest, raw = read_json_object(file, do="merge again"), read_recipe(recipe)
    if manifest.get("recipe") != raw or manifest.get("weights") != _weight_hashes((str(out),)):
        return False
    return manifest.get("inputs") == {n: _input_hashes(_locate(n, recipe)) for n in recipe_models(raw)}


def _validated(raw: Any, path: Path) -> Any:
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    try:
        return MergeConfiguration.model_validate(raw)
    except (ValidationError, RuntimeError) as e:
        reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise SteerError(f"{path}: mergekit does not accept the recipe: {reason}; mend the recipe") from e


def _walk(node: Any, change: Callable[[str], Any]) -> Any:
    """Pass every model reference of a recipe through `change`, in place."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        name = _model_name(value)
        if name and (key in _MODEL_KEYS or (key in _TOKENIZER_KEYS and name not in ("union", "base"))):
            node[key] = change(name)
        else:
            _walk(value, change)
    return node


def _model_name(value: Any) -> str | None:
    """A model reference in mergekit's short form, `model@revision+adapter`, also for one in its form of mappings,
    `{model: {path, revision}, lora: {path, revision}}`; None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or "model" not in value or not set(value) <= {"model", "lora"}:
        return None
    parts = []
    for part in (value["model"], value.get("lora")):
        if isinstance(part, dict):
            path, revision = part.get("path"), part.get("revision")
            part = f"{path}@{revision}" if path and revision else path
        if part is not None:
            parts.append(str(part))
    return "+".join(parts) or None


def _locate(name: str, recipe: Path) -> tuple[str, ...]:
    """A model reference of the recipe, (model,) or (model, adapter), with its paths made absolute."""
    parts = [name] if _beside(name, recipe) else name.split("+")
    return tuple(_locate_one(p, recipe, adapter=i > 0) for i, p in enumerate(parts))


def _locate_one(name: str, recipe: Path, adapter: bool) -> str:
    if place := _beside(name, recipe):
        wanted = "adapter_config.json" if adapter else "config.json"
        if not (place / wanted).is_file():
            raise CheckpointError(f"{recipe}: {name}: expected {wanted} in {place}, found none; name a whole model")
        return str(place.resolve())
    if name in PACKAGED:
        return resolve(name)
    try:
        repo, at, revision = name.partition("@")
        return resolve(repo) + at + revision
    except CheckpointError as e:
        raise CheckpointError(f"{recipe}: names a model that is not there: {e}") from e


def _beside(name: str, recipe: Path) -> Path | None:
    return next((p for p in (recipe.parent / name, Path(name)) if p.is_dir()), None)


def _reference(parts: tuple[str, ...]) -> dict[str, Any]:
    """For mergekit, in the form that lets a path hold the `+` and `@` its short form gives a meaning."""
    out = {}
    for key, part in zip(("model", "lora"), parts, strict=False):
        path, _, revision = (part, "", "") if Path(part).is_dir() else part.partition("@")
        out[key] = {"path": path, "revision": revision or None}
    return out


def _check_hub(name: str, parts: tuple[str, ...], recipe: Path) -> None:
    """Raise CheckpointError for a hub id that cannot be had, before gigabytes of the others are fetched."""
    from huggingface_hub import hf_hub_download

    for part, file in zip(parts, ("config.json", "adapter_config.json"), strict=False):
        if Path(part).is_dir():
            continue
        repo, _, revision = part.partition("@")
        with hub_errors(f"{recipe}: names a model that is neither beside it nor on the hub: {name}"):
            hf_hub_download(repo, file, revision=revision or None)


def _weight_hashes(parts: tuple[str, ...]) -> dict[str, str]:
    """sha256 of the weight files of local directories; a hub id has none, its name stands for it."""
    folders = [Path(p) for p in parts if Path(p).is_dir()]
    # By the place in the reference: paths differ between machines, the files do not.
    return {f"{i}/{f.name}": hash_file(f) for i, d in enumerate(folders) for f in sorted(d.glob("*.safetensors"))}


def _input_hashes(parts: tuple[str, ...]) -> dict[str, str]:
    """sha256 of every file of local directories that a merge may read: weights, configs, tokenizers, templates."""
    folders = [Path(p) for p in parts if Path(p).is_dir()]
    return {
        f"{i}/{f.name}": hash_file(f)
        for i, d in enumerate(folders)
        for f in sorted(d.iterdir())
        if f.suffix in _READ and not f.name.startswith(".") and f.is_file()
    }


def _check_finite(work: Path, recipe: Path) -> None:
    """Raise SteerError for a weight that is not finite: it ends in replies of one token, or in NaN."""
    import torch
    from safetensors import safe_open

    for file in sorted(work.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                tensor = f.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    raise SteerError(
                        f"{recipe}: expected finite weights, found {name} with some that {dtype} cannot hold or that "
                        "are not finite in a source; set out_dtype to bfloat16 or float32"
                    )


@contextmanager
def _mergekit_errors(recipe: Path) -> Iterator[None]:
    """mergekit's failures as ours, those too that it only logs; its chatter goes nowhere."""
    kit, transformers = logging.getLogger("mergekit"), logging.getLogger("transformers")
    before, complaints = (kit.level, kit.propagate, transformers.level), _Complaints()
    # `logging.info` in one of its libraries would have everything that anyone logs printed from then on.
    handlers = list(logging.root.handlers)
    kit.addHandler(complaints)
    kit.setLevel(logging.ERROR)
    kit.propagate = False
    transformers.setLevel(logging.ERROR)
    try:
        with disk_errors():
            yield
        # A disk that is full when the tokenizer is copied is logged, and the merge called successful.
        for e in complaints.found:
            if isinstance(e, OSError) and e.errno:
                raise e
    except OSError as e:
        if e.errno:  # the disk's: `staged` has the sentence
            raise
        raise SteerError(f"{recipe}: mergekit failed: {_line(e)}; mend the recipe") from e
    except Exception as e:  # whatever any of its libraries raises
        raise SteerError(f"{recipe}: mergekit failed: {_line(e)}; mend the recipe") from e
    finally:
        kit.removeHandler(complaints)
        logging.root.handlers[:] = handlers
        kit.setLevel(before[0])
        kit.propagate = before[1]
        transformers.setLevel(before[2])


@contextmanager
def _files_let_go() -> Iterator[None]:
    """mergekit keeps the files of every merge mapped as long as the process lives, and would read an adapter that was
    trained further since as it was."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache.loaders.clear()
    try:
        yield
    finally:
        LoaderCache.loaders.clear()


class _Complaints(logging.Handler):
    """Keeps the exceptions of what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.found.append(record.exc_info[1])


def _line(e: Exception) -> str:
    return textwrap.shorten(str(e), 300, placeholder=" ...") or type(e).__name__


def _carry_side_files(raw: dict[str, Any], located: dict[str, tuple[str, ...]], work: Path) -> None:
    """mergekit leaves behind generation_config.json, which holds the ids that end a reply, and can leave the chat
    template, in a file of its own."""
    base = Path(located[_model_name(raw.get("base_model")) or recipe_models(raw)[0]][0])
    tokenizer = raw.get("tokenizer_source") or (raw.get("tokenizer") or {}).get("source")
    renumbered = tokenizer not in (None, "base")
    for name, wanted in (("chat_template.jinja", not raw.get("chat_template")), (_GENERATION, not renumbered)):
        source, target = base / name, work / name
        if wanted and source.is_file() and not target.exists():
            target.write_bytes(source.read_bytes())


def _mend_card(card: Path, title: str, located: dict[str, tuple[str, ...]]) -> None:
    """mergekit titles its card by the directory it writes to, and names models by this machine's paths."""
    text = re.sub("^# .*$", f"# {title}", card.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    places = {p: n for name, parts in located.items() for p, n in zip(parts, name.split("+"), strict=False)}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    card.write_text(text, encoding="utf-8")
