"""Reads and writes dictionaries in sae_lens's layout: cfg.json beside sae_weights.safetensors.

Files of sae_lens before version 6 are converted while they are read. Three optional files may be in the same directory:
manifest.json (from training), features.jsonl (one row per labelled latent) and sliders.yaml (named sliders).
"""

from __future__ import annotations

import math
import re
from importlib import metadata as packages
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from steer.core.dictionary import Architecture, Dictionary, Normalize
from steer.core.small_files import shown
from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.files import one_line, parse_json, read_json_object, write_atomic, write_atomic_json

CONFIG, WEIGHTS, MANIFEST, FEATURES = "cfg.json", "sae_weights.safetensors", "manifest.json", "features.jsonl"
SLIDERS = "sliders.yaml"
_AGAIN = "fetch or train it again"

_TENSORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Tensors that each architecture stores in addition to W_enc, W_dec and b_dec."""
_SITES = (
    (re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)"), 0),
    (re.compile(r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in)"), -1),
    (re.compile(r"(?:model\.|transformer\.)?(?:language_model\.)?(?:layers|h)\.(\d+)(?:\.output)?"), 0),
)
"""Patterns of hook names, and the number to add to the block's number to get the site."""


def load_dictionary(place: str | Path) -> Dictionary:
    """Load a dictionary.

    `place`: a directory, or `RELEASE/SAE_ID` as sae_lens lists it, which may download it.

        dictionary = steer.load_dictionary("path/to/dictionary")
        feature = steer.Feature.latent(dictionary, 123)

    Errors: CheckpointError for files that are missing or broken; UnsupportedError for an architecture or normalisation
    that cannot be steered, or whose meaning would have to be guessed.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return _from_disk(path)
    text = str(place)
    if path.is_file():
        raise _refused(text, "a directory with cfg.json and sae_weights.safetensors", "a file; pass the directory")
    if isinstance(place, Path) or "/" not in text or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{text}: expected a dictionary's directory, or RELEASE/SAE_ID as sae_lens lists them, found neither; "
            "check the path"
        )
    return _from_release(text)


def from_sae(sae: Any, where: str = "SAE") -> Dictionary:
    """Convert an sae_lens SAE in memory, for inference or in training. `where` names it in errors.

    Errors: UnsupportedError for an architecture or normalisation that cannot be steered.
    """
    tensors = {k: v.detach().clone() for k, v in sae.state_dict().items()}
    config = sae.cfg.to_dict()
    if hasattr(sae, "process_state_dict_for_saving_inference"):
        sae.process_state_dict_for_saving_inference(tensors)
        config = sae.cfg.get_inference_sae_cfg_dict()
    return _build(config, tensors, where)


def save_dictionary(dictionary: Dictionary, directory: str | Path) -> None:
    """Write cfg.json and sae_weights.safetensors, which `sae_lens.SAE.load_from_disk` can load.

    Site and norm are written into the metadata, so that they are not lost without a manifest.
    """
    d, directory = dictionary, Path(directory)
    dtypes = {t.dtype for t in (d.W_enc, d.W_dec)}
    metadata: dict[str, Any] = dict(d.metadata)
    if d.site is not None:
        metadata.setdefault("hook_name", f"blocks.{d.site}.hook_resid_post")
    if d.norm is not None:
        metadata["residual_norm"] = d.norm
    # If the metadata names no version of 6 or later, sae_lens takes the file for an old one and drops the metadata.
    metadata.setdefault("sae_lens_version", packages.version("sae-lens"))
    config: dict[str, Any] = {
        "architecture": d.architecture,
        "d_in": d.width,
        "d_sae": d.latents,
        # The dtype in which sae_lens computes: as wide as this project's maths, however narrow the tensors are stored.
        "dtype": "float64" if torch.float64 in dtypes else "float32",
        "device": "cpu",
        "apply_b_dec_to_input": d.subtract_b_dec,
        "normalize_activations": d.normalize,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if d.architecture == "topk":
        config |= {"k": d.k, "rescale_acts_by_decoder_norm": d.rescale_by_decoder_norm}
    tensors = {"W_enc": d.W_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
    for name in _TENSORS[d.architecture]:
        tensors[name] = getattr(d, "b_enc" if name == "b_gate" else name)
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    write_atomic(directory / WEIGHTS, data)
    write_atomic_json(directory / CONFIG, config)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest.json in a dictionary's directory; empty without that file.

    Errors: CheckpointError if it is broken.
    """
    file = directory / MANIFEST
    return read_json_object(file, do=_AGAIN) if file.is_file() else {}


def feature_row(dictionary: Dictionary, index: int) -> dict[str, Any]:
    """The row of features.jsonl that describes a latent. Other rows are skipped without being parsed.

    Errors: UsageError for a latent without a row (it never fired, or the dictionary has no labels), CheckpointError for
    a broken file.
    """
    name = dictionary.name
    if not 0 <= index < dictionary.latents:
        raise UsageError(f"dictionary {name!r}: expected a latent from 0 to {dictionary.latents - 1}, found {index}")
    file = dictionary.place / FEATURES if dictionary.place is not None else None
    if file is None or not file.is_file():
        raise UsageError(
            f"dictionary {name!r}: expected {FEATURES} with the unit of latent {index}, found none; "
            "label the dictionary, or give the unit yourself"
        )
    mark = re.compile(rf'"index"\s*:\s*{index}\b'.encode())
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not mark.search(line):
                continue
            try:
                row = parse_json(line)
            except ValueError as e:
                raise CheckpointError(f"{file}: line {number} is no JSON ({e}); label the dictionary again") from e
            if isinstance(row, dict) and row.get("index") == index:
                unit = row.get("unit")
                if not isinstance(unit, int | float) or abs(unit) > 1e300:  # a whole number may have any length
                    raise CheckpointError(f"{file}: line {number}: expected a number under 'unit'; label it again")
                return row
    raise UsageError(f"{file}: expected latent {index}, found no row for it; it never fired, take a live one")


def _from_disk(path: Path) -> Dictionary:
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        missing = CONFIG if not (path / CONFIG).is_file() else WEIGHTS
        if any(p.suffix in (".pt", ".pth", ".bin", ".pkl", ".npz") for p in path.iterdir()):
            raise _refused(str(path), f"{CONFIG} and {WEIGHTS}", f"no {missing}; only safetensors are loaded")
        raise CheckpointError(f"{path}: expected a dictionary with {CONFIG} and {WEIGHTS}, found no {missing}")
    config = read_json_object(path / CONFIG, do=_AGAIN)
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as e:
        found = f"something unreadable ({one_line(e)})"
        raise CheckpointError(f"{path / WEIGHTS}: expected a safetensors file, found {found}; {_AGAIN}") from e
    return _build(config, tensors, str(path), path)


def _from_release(text: str) -> Dictionary:
    import sae_lens
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, sae_id = text.partition("/")
    if release not in get_pretrained_saes_directory():  # then it is a hub repository: ORG/NAME/SAE_ID
        org, name, sae_id = (*text.split("/", 2), "", "")[:3]
        release = f"{org}/{name}"
    if not sae_id:
        raise CheckpointError(
            f"{text}: expected a directory, a release that sae_lens lists with a SAE_ID, or ORG/REPOSITORY/SAE_ID, "
            "found none of them; check the path"
        )
    try:
        sae = sae_lens.SAE.from_pretrained(release, sae_id)
    except Exception as e:  # the hub and its many formats raise anything
        raise CheckpointError(
            f"{text}: sae_lens cannot load {sae_id!r} of {release!r}: {one_line(e)}; check both names and the network"
        ) from e
    return from_sae(sae, text)


def _build(config: dict[str, Any], tensors: dict[str, Tensor], where: str, place: Path | None = None) -> Dictionary:
    """Check config and tensors, and make the Dictionary. `where` names it in errors."""
    config, manifest = _modern(config, where), {} if place is None else read_manifest(place)
    architecture: Any = config.get("architecture")
    normalize = config.get("normalize_activations") or "none"
    if architecture not in get_args(Architecture):
        training = "batchtopk" in str(architecture)
        do = "; it is a training checkpoint, save it with save_inference_model" if training else ""
        raise _refused(where, f"architecture {', '.join(get_args(Architecture))}", f"{architecture!r}{do}")
    if normalize not in get_args(Normalize):
        do = "fold it into the weights with sae_lens first"
        raise _refused(where, f"normalize_activations {', '.join(get_args(Normalize))}", f"{normalize!r}; {do}")
    if config.get("reshape_activations", "none") != "none":
        raise _refused(where, "a dictionary of the residual stream", f"one of {config['reshape_activations']}")
    tensors = _known(tensors, architecture, where)
    metadata = config.get("metadata") or {}
    d, m = tensors["W_enc"].shape if tensors["W_enc"].ndim == 2 else (-1, -1)
    if (config.get("d_in", d), config.get("d_sae", m)) != (d, m):
        says = f"{CONFIG} says width {config.get('d_in')} and {config.get('d_sae')} latents"
        raise CheckpointError(f"{where}: {says}, W_enc has shape {list(tensors['W_enc'].shape)}; {_AGAIN}")
    k = config.get("k") if architecture == "topk" else None
    norm = manifest.get("norm", metadata.get("residual_norm"))
    if norm is not None and not (type(norm) in (int, float) and 0 <= norm < 1e30):  # NaN fails
        raise _refused(where, "a number from 0 under norm, in its manifest or metadata", shown(norm))
    site = manifest.get("site", _site(metadata))
    if site is not None and not (type(site) is int and site >= 0):
        raise _refused(where, "a whole number from 0 under site, in its manifest", shown(site))
    return Dictionary(
        architecture,
        tensors["W_enc"],
        tensors["b_gate" if architecture == "gated" else "b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        threshold=tensors.get("threshold"),
        k=int(k) if isinstance(k, int) or (isinstance(k, float) and math.isfinite(k)) else None,
        b_mag=tensors.get("b_mag"),
        r_mag=tensors.get("r_mag"),
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        rescale_by_decoder_norm=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
        normalize=normalize,
        site=site,
        norm=float(norm) if norm else None,
        place=place,
        metadata=metadata,
        manifest=manifest,
    )


def _modern(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a config of any sae_lens version to the form of version 6."""
    if isinstance(config.get("metadata"), dict) and "architecture" in config:
        return config
    config = {k: v for k, v in config.items() if v is not None}
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation not in ("relu", "topk"):
        raise _refused(where, "activation_fn relu or topk", f"{activation!r}")
    if config.get("architecture", "standard") not in get_args(Architecture):
        return config  # refused by its architecture
    from sae_lens.loading.pretrained_sae_loaders import handle_pre_6_0_config

    if config.get("activation_fn_str", activation) != activation:
        raise _refused(
            where, f"one activation, as activation_fn {activation!r}", f"{config['activation_fn_str']!r} too"
        )
    try:
        made = handle_pre_6_0_config(config)
        if activation == "topk":  # without a k, sae_lens would make it a plain dictionary
            made |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
        return made | {"metadata": made.get("metadata", {}) | (config.get("metadata") or {})}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{where}: {CONFIG}: expected a config of sae_lens, found {one_line(e)}; {_AGAIN}") from e


def _known(tensors: dict[str, Tensor], architecture: str, where: str) -> dict[str, Tensor]:
    """The tensors of the architecture under their current names.

    Errors: CheckpointError for a missing tensor, UnsupportedError for an unknown one.
    """
    tensors = dict(tensors)
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.pop(name, None)
        if factor is not None and not bool((factor == 1).all()):
            raise _refused(where, "no finetuning factors", f"{name} other than 1; fold them into W_dec first")
    wanted = {"W_enc", "W_dec", "b_dec", *_TENSORS[architecture]}
    if missing := sorted(wanted - set(tensors)):
        expected = f"tensor {missing[0]} in a {architecture} dictionary"
        raise CheckpointError(f"{where}: expected {expected}, found {', '.join(sorted(tensors))}; {_AGAIN}")
    if unknown := sorted(set(tensors) - wanted):
        raise _refused(where, f"the tensors {', '.join(sorted(wanted))}", f"{unknown[0]} too")
    if coded := sorted(name for name in wanted if not tensors[name].is_floating_point()):
        raise _refused(where, "floating-point tensors", f"{coded[0]} in {tensors[coded[0]].dtype}, quantised perhaps")
    # bf16 holds every number of fp8, which nothing computes in.
    return {name: tensors[name].bfloat16() if tensors[name].itemsize == 1 else tensors[name] for name in wanted}


def _site(metadata: dict[str, Any]) -> int | None:
    """The site that a hook's name stands for; None for anything but the residual stream before or after a block."""
    name = str(metadata.get("hook_name") or metadata.get("hf_hook_name") or "")
    for pattern, offset in _SITES:
        if match := pattern.fullmatch(name):
            site = int(match[1]) + offset
            return site if site >= 0 else None
    return None


def _refused(where: str, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(f"{where}: expected {expected}, found {found}")
