"""Loading a checkpoint's weights and tokenizer with transformers, onto the device and in the dtype to run in.

`steered.load` calls `read_model` and makes a `SteeredModel` of the result.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file

from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.dtypes import announce, computing_in
from steer.checkpoint.fetch import check_complete, read_tokenizer, transformers_errors
from steer.checkpoint.layouts import LAYOUTS
from steer.checkpoint.proof import cache_file
from steer.checkpoint.quantised import undeclared
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.tiny import IDS, model_class_of, on_meta, tiny_config, tiny_model, tiny_world
from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.files import read_json_object, write_atomic
from steer.model import attention
from steer.model.products import use_fast_products


def read_model(
    place: str, name: str, dtype: Any, device_map: Any, four_bit: bool, more: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a checkpoint; see `steer.load` for `dtype`, `device_map` and `four_bit`.

    `place`: a directory or a hub id. `name`: what messages call the checkpoint. `more`: arguments for transformers.
    Errors: as `steer.load`.
    """
    if four_bit and find_spec("bitsandbytes") is None:
        raise UsageError("4 bits: expected the package bitsandbytes, found none; pip install bitsandbytes")
    if isinstance(device_map, str) and device_map.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device map {device_map}: expected a GPU that torch can use, found none; leave it out")
    if device_map is None and torch.cuda.is_available():
        device_map = "cuda"
    if not torch.cuda.is_available():
        more = {"attn_implementation": attention.NAME} | more
    if Path(place).is_dir():
        _check_blocks(Path(place), name)
    # If unset, transformers asks on stdin whether to run a checkpoint's code, and takes the first "y" for a yes.
    code = {"trust_remote_code": more.get("trust_remote_code", False)}
    if dtype in (torch.float64, "float64"):  # transformers' grouped products of experts do not support it
        more = {"experts_implementation": "eager"} | more
    with transformers_errors(name), _memory_errors(name, device_map):
        hub = {option: more[option] for option in ("revision", "token", "cache_dir", "subfolder") if option in more}
        small = four_bit or "quantization_config" in more
        chosen = computing_in(place, dtype, device_map=device_map, quantised=small, hub=hub)
        if four_bit:
            dtype_of_products = chosen.dtype or "bfloat16"  # weights are converted to it for every product
            small_weights = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype_of_products
            )
            more = more | {"quantization_config": small_weights}
        tokenizer = _fast_tokenizer(place, name, **code)
        config = AutoConfig.from_pretrained(place, **code, **hub)
        model_class: Any = model_class_of(config) or AutoModelForCausalLM
        declared = getattr(config, "quantization_config", None)
        if isinstance(declared, dict) and not AutoHfQuantizer.supports_quant_method(declared):
            # transformers would take the quantised numbers for weights
            raise CheckpointError(
                f"{name}: config.json: expected a quant_method that transformers {transformers.__version__} knows, "
                f"found {declared.get('quant_method')!r}; update transformers, or fetch the weights without it"
            )
        if more.get("attn_implementation") == attention.NAME and not _grouped_attention_fits(config, model_class):
            more = more | {"attn_implementation": "eager"}
        loaded: Any = model_class.from_pretrained(
            place, dtype=chosen.dtype or "auto", device_map=device_map, use_safetensors=True, output_loading_info=True,
            **code | more,
        )  # fmt: skip
        _check_generation_config(place, hub)
        hf, report = loaded  # transformers declares the type of the model alone
    check_complete(report, name)
    announce(chosen, name)
    use_fast_products(hf)
    return hf, tokenizer


@contextmanager
def _memory_errors(name: str, device_map: Any) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise CheckpointError(
            f"{name}: expected room for it on {device_map}, found too little; spread it with --device-map auto, or "
            "load it in 4 bits with --four-bit"
        ) from e


def release_memory(*, garbage: bool = True) -> None:
    """Give memory that is free back to the system, and the GPU's to other programs. glibc keeps what lies below any
    block in use: half a gigabyte after a merge of 135M models, and more than one after a batch of 192 replies.
    `garbage`: collect Python's first, which takes a tenth of a second; hooks and caches hold modules in circles."""
    if garbage:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # not in musl
        trim(0)


def release_threads() -> None:
    """End the OpenMP threads that wait for the calling thread's next operation; the next one starts others.

    Each thread that computes has a team of them. Where all teams together have more threads than there are cores,
    libgomp lets them sleep after every operation, and a token takes up to half as long again
    (tests/bench/vllm_engine.py). So a thread that hands a model to another one calls this.
    """
    if sys.platform != "linux":
        return
    openmp = ctypes.CDLL(torch._C.__file__)  # finds the library that torch itself is linked with
    if hasattr(openmp, "omp_pause_resource"):
        openmp.omp_pause_resource(1, openmp.omp_get_initial_device())  # 1: settings stay


def read_description(place: str, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without numbers in its weights, and the tokenizer. Arguments and errors: as `read_model`."""
    with transformers_errors(name):
        tokenizer = _fast_tokenizer(place, name)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        model_class = model_class_of(config)
        if model_class is None:
            raise ValueError(f"transformers has no model for {config.model_type}")
        hf: Any = on_meta(config, model_class)
        if _check_generation_config(place, {}):
            hf.generation_config = GenerationConfig.from_pretrained(place)
    return hf, tokenizer


def _fast_tokenizer(place: str, name: str, **code: Any) -> Any:
    """The tokenizer of a checkpoint, which has to decode token by token. Errors: as `read_tokenizer`; UnsupportedError
    for one that transformers has in Python alone."""
    tokenizer = read_tokenizer(place, name, **code)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedError(
            f"{name}: expected a tokenizer of the tokenizers library (tokenizer.json), found "
            f"{type(tokenizer).__name__}, which is written in Python alone; name a checkpoint with a tokenizer.json"
        )
    return tokenizer


def _check_generation_config(place: str, hub: dict[str, Any]) -> bool:
    """Whether there is a generation_config.json. transformers passes over a broken one, and its end tokens with it.

    Errors: CheckpointError for a file without a JSON object.
    """
    file = cached_file(place, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if file is not None:
        read_json_object(Path(file), do="delete or mend the file")
    return file is not None


def _grouped_attention_fits(config: PreTrainedConfig, model_class: Any) -> bool:
    """Whether `attention.NAME` computes what the model's own attention does, tried on a tiny model of the class, kept
    beside the proof of its anatomy."""
    if model_class.__name__ in LAYOUTS:
        return True
    if not getattr(model_class, "_supports_attention_backend", False):
        return False
    file = cache_file(config, model_class, "grouped attention")
    try:
        return {"true": True, "false": False}[file.read_text()]
    except (OSError, UnicodeError, KeyError):  # not tried yet, or written by another program
        fits = _tried_grouped_attention(config, model_class)
    write_atomic(file, json.dumps(fits))
    return fits


def _tried_grouped_attention(config: PreTrainedConfig, model_class: Any) -> bool:
    with tiny_world():
        model = tiny_model(tiny_config(config, model_class), model_class)
        ids = torch.arange(IDS.start, IDS.stop)[None]
        plain = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(attention.NAME)
        try:
            adapted = model(input_ids=ids, use_cache=False).logits
        except Exception:  # an argument that it does not know, or shapes that it does not expect
            return False
    return bool((adapted - plain).abs().max() < 1e-6 * plain.abs().max())


def _check_blocks(place: Path, name: str) -> None:
    """Raise CheckpointError for a config with more blocks than the files hold, before transformers builds that many,
    and for one that does not say that the weights are quantised."""
    files = CheckpointFiles.open(place)
    anatomy = Anatomy.of(files.config, name)
    if files.tensors and not anatomy.has_block(anatomy.blocks - 1, files.tensors):
        raise CheckpointError(
            f"{name}: config.json says {anatomy.blocks} blocks, found none with number {anatomy.blocks - 1} in the "
            "files; fetch the model again"
        )
    if found := undeclared(files.config, files.tensors):
        raise CheckpointError(
            f"{name}: expected a quantization_config in config.json, as {found}, found none; fetch the model again"
        )


def files_of(place: str) -> Path:
    """The directory of a checkpoint that was loaded; for a hub id, in the hub's cache."""
    if Path(place).is_dir():
        return Path(place)
    config = cached_file(place, "config.json")
    assert config is not None  # the checkpoint was loaded, so it exists
    return Path(config).parent
