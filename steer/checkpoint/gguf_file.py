"""Writes a checkpoint as one GGUF file for llama.cpp: weights, hyperparameters, tokenizer and chat template.

The Llama family only (`LlamaForCausalLM`, and `MistralForCausalLM` without sliding windows), with a byte-level BPE
tokenizer. Anything that the file could not hold as transformers computes it is refused before a byte is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from steer.checkpoint.fetch import transformers_errors
from steer.checkpoint.projection import read_tensor
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import CheckpointFiles
from steer.errors import CheckpointError, SteerError, UnsupportedError, UsageError
from steer.files import one_line, read_json_object, replacing

Stored = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
STORED: tuple[Stored, ...] = get_args(Stored)
"""How matrices are stored. Vectors are always fp32, as llama.cpp wants them."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama"}
"""Model type of transformers -> architecture of llama.cpp."""
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA_3), ("ByteLevel", False)): "llama-bpe",
}
"""Steps of a tokenizer.json before BPE -> the name by which llama.cpp knows the same splitting of a text."""


def write_gguf(
    source: Path,
    out: Path,
    stored: Stored | None = None,
    *,
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Stored:
    """Write the checkpoint in `source` to the new file `out`, and return how its matrices are stored.

    `stored`: one of `STORED`; by default the dtype of the checkpoint. `tokenizer`: a GGUF file of the same
    family whose tokenizer is copied, in place of the one in tokenizer.json. `progress`: called with (tensors written,
    tensors in all). One tensor is in memory at a time. `out` is complete or absent.

        write_gguf(Path("merged"), Path("merged.gguf"), "Q8_0")

    Errors: UsageError for `out` that exists and an unknown `stored`, UnsupportedError for an architecture, a position
    encoding, a tensor or a tokenizer that the file could not hold, CheckpointError for a number beyond the dtype.
    """
    import gguf

    files = dequantised(CheckpointFiles.open(source))
    if stored is not None and stored not in STORED:
        raise UsageError(f"dtype: expected one of {', '.join(STORED)}, found {stored!r}")
    if out.exists():
        raise UsageError(f"{out}: expected no file of this name, found one; name another")
    files, expected = _completed(files)
    architecture, factors = _architecture(files), _rope_factors(files)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, files.config["num_hidden_layers"])
    tensors: dict[str, str] = {}
    for name in files.tensors:
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer of old checkpoints, which transformers ignores
        if place is None:
            raise _refusal(source, "the tensors of a Llama", f"{name}, for which llama.cpp has no place")
        tensors[name] = place
    for name in expected:
        if names.get_name(name, try_suffixes=(".weight", ".bias")) not in tensors.values():
            raise CheckpointError(f"{source}: expected tensor {name}, found none; fetch the model again")
    stored_as = stored or _own_dtype(files)
    quantise = _quantiser(files, stored_as)
    with replacing(out) as part:
        writer = gguf.GGUFWriter(part, architecture)
        try:
            _add_config(writer, files, stored_as)
            _add_vocabulary(writer, files, tokenizer)
            entries = [*tensors.items(), *([("", "rope_freqs.weight")] if factors is not None else [])]
            data: list[Callable[[], np.ndarray]] = []
            for name, place in entries:
                shape = files.tensors[name].shape if name else (len(factors),)  # type: ignore[arg-type]
                kind = gguf.GGMLQuantizationType[stored_as if len(shape) > 1 else "F32"]
                raw = gguf.quant_shape_to_byte_shape(shape, kind) if stored_as not in ("F32", "F16") else shape
                byte = len(shape) > 1 and stored_as not in ("F32", "F16")
                dtype = np.dtype(np.uint8 if byte else np.float32 if kind.name == "F32" else np.float16)
                size = int(np.prod(raw if byte else shape)) * dtype.itemsize
                writer.add_tensor_info(place, raw if byte else shape, dtype, size, kind)
                data.append(partial(quantise, name) if name else partial(np.asarray, factors, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, read in enumerate(data, 1):
                writer.write_tensor_data(read())
                if progress:
                    progress(done, len(data))
        finally:
            writer.close()
    return stored_as


def write_tensors(writer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors in fp32 to a `gguf.GGUFWriter`, write its file and close it."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.to(torch.float32).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf(
    path: Path, architecture: str, dims: int, wrong: Callable[[str], CheckpointError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) of a small GGUF file of fp32 tensors, all in memory.

    Errors: what `wrong` makes of a sentence on what was found, for a broken file, another architecture, and
    a tensor that has not `dims` dimensions or holds anything but finite fp32 numbers.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = [(t.name, t.tensor_type, np.array(t.data)) for t in reader.tensors]
    except Exception as e:  # the reader raises whatever a broken file makes numpy and struct raise
        raise wrong(f"something unreadable ({type(e).__name__})") from e
    if fields.get("general.architecture") != architecture:
        raise wrong(f"one of architecture {fields.get('general.architecture')}")
    for name, kind, data in tensors:
        if kind != gguf.GGMLQuantizationType.F32 or data.ndim != dims or not np.isfinite(data).all():
            raise wrong(f"tensor {name}, {kind.name} {list(data.shape)}, where {dims}-d finite fp32 ones are expected")
    return fields, {name: torch.from_numpy(data) for name, _, data in tensors}


def _refusal(source: Path, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(f"{source}: expected {expected}, found {found}; convert it with llama.cpp's own script")


def _completed(files: CheckpointFiles) -> tuple[CheckpointFiles, list[str]]:
    """The checkpoint with every key that transformers reads in its config, which may be left out of the file where it
    is the default; and the names of the tensors that the model is made of.

    Errors: UnsupportedError for another type of model, CheckpointError for a config that transformers cannot read.
    """
    from transformers import CONFIG_MAPPING

    from steer.checkpoint.tiny import model_class_of, on_meta

    kind = files.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise _refusal(files.root, f"a model of type {' or '.join(ARCHITECTURES)}", str(kind))
    given = {k: v for k, v in files.config.items() if k not in ("architectures", "model_type")}
    with transformers_errors(str(files.root)):
        config = CONFIG_MAPPING[kind](**given)
        model_class = model_class_of(config)
        assert model_class is not None
        tensors = list(on_meta(config, model_class).state_dict())
    if config.tie_word_embeddings:
        tensors.remove("lm_head.weight")
    return replace(files, config=config.to_dict()), tensors


def _architecture(files: CheckpointFiles) -> str:
    """The architecture's name in llama.cpp. Errors: UnsupportedError for a model that computes otherwise."""
    config, root = files.config, files.root
    kind = config["model_type"]
    if config["hidden_act"] != "silu":
        raise _refusal(root, "the activation silu", str(config["hidden_act"]))
    if kind == "mistral" and config["sliding_window"] is not None:
        raise _refusal(root, "attention to the whole context", f"a window of {config['sliding_window']} tokens")
    return ARCHITECTURES[kind]


def _rope_factors(files: CheckpointFiles) -> list[float] | None:
    """What Llama 3 divides each frequency by; None for plain rotary positions."""
    rope = files.config["rope_parameters"]
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise _refusal(files.root, "rotary positions of type default or llama3", str(kind))
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = LlamaConfig(**{k: v for k, v in files.config.items() if k != "architectures"})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).tolist()


def _head_width(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _own_dtype(files: CheckpointFiles) -> Stored:
    codes = {t.dtype for t in files.tensors.values() if len(t.shape) > 1}
    return next((code for code in ("BF16", "F16") if codes == {code}), "F32")  # type: ignore[return-value]


def _quantiser(files: CheckpointFiles, stored: Stored) -> Callable[[str], np.ndarray]:
    """A function from a tensor's name to its data in the file."""
    import gguf

    heads = {"q_proj": files.config["num_attention_heads"]}
    heads["k_proj"] = files.config["num_key_value_heads"]
    if stored.startswith("Q") and (
        odd := next((t for t in files.tensors.values() if len(t.shape) > 1 and t.shape[-1] % 32), None)
    ):
        raise _refusal(files.root, f"rows of a multiple of 32 numbers for {stored}", f"{odd.name} with {odd.shape[-1]}")

    def quantise(name: str) -> np.ndarray:
        data = read_tensor(files, name).float()
        if count := heads.get(name.split(".")[-2]):
            # The two halves of a head that rotate together lie side by side in llama.cpp.
            data = data.reshape(count, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if stored == "F16" and data.ndim > 1 and float(data.abs().max()) > np.finfo(np.float16).max:
            raise CheckpointError(f"{files.root}: expected {name} within fp16, found larger numbers; write BF16 or F32")
        array = np.ascontiguousarray(data.numpy())
        return gguf.quants.quantize(array, gguf.GGMLQuantizationType[stored]) if data.ndim > 1 else array

    return quantise


def _add_config(writer: Any, files: CheckpointFiles, stored: Stored) -> None:
    import gguf

    config = files.config
    writer.add_name(files.root.resolve().name)
    writer.add_file_type({"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}[stored])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_vocabulary(writer: Any, files: CheckpointFiles, tokenizer: Path | None) -> None:
    root = files.root
    if tokenizer is not None:
        _copy_vocabulary(writer, files, tokenizer)
    elif (root / "tokenizer.json").is_file():
        try:
            for add, value in _vocabulary(files):
                getattr(writer, f"add_{add}")(value)
        except SteerError:
            raise
        except Exception as e:  # whatever a file of another shape makes Python, tokenizers and gguf raise
            found = f"{type(e).__name__} {one_line(e)}"
            raise CheckpointError(
                f"{root / 'tokenizer.json'}: expected a tokenizer of the tokenizers library, found another file "
                f"({found}); fetch it again"
            ) from e
    elif any(root.glob("tokenizer*")):
        raise _refusal(root, "a tokenizer.json", "a tokenizer in other files; or name a GGUF with --tokenizer")
    else:
        writer.add_tokenizer_model("no_vocab")
    template = root / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(found := _settings(root).get("chat_template"), str):
        writer.add_chat_template(found)


def _settings(root: Path) -> dict[str, Any]:
    path = root / "tokenizer_config.json"
    return read_json_object(path, what="a tokenizer's settings", do="fetch it again") if path.is_file() else {}


def _copy_vocabulary(writer: Any, files: CheckpointFiles, path: Path) -> None:
    """Copy all entries of another file's tokenizer. Errors: UnsupportedError for one of another size."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if k.startswith("tokenizer.") and k != "tokenizer.chat_template"}
    count = len(fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in fields else 0
    if count != files.config["vocab_size"]:
        raise _refusal(path, f"a tokenizer of {files.config['vocab_size']} tokens, as the checkpoint has", str(count))
    for key, entry in fields.items():
        kind = entry.types[0]
        writer.add_key_value(key, entry.contents(), kind, entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def _vocabulary(files: CheckpointFiles) -> Iterator[tuple[str, Any]]:
    """(name of the writer's method without `add_`, value) of a byte-level BPE tokenizer in tokenizer.json."""
    import gguf
    from tokenizers import Tokenizer

    root = files.root
    given = json.loads((root / "tokenizer.json").read_text(encoding="utf-8"))
    model = given["model"]
    steps = given.get("pre_tokenizer") or {}
    form = tuple(map(_step, steps.get("pretokenizers", [steps])))
    if model.get("type") != "BPE" or form not in _PRE_TOKENIZERS or given.get("normalizer") is not None:
        found = f"{model.get('type')} after {', '.join(str(s[0]) for s in form)}"
        raise _refusal(root, "a byte-level BPE tokenizer of a known kind", f"{found}; or name a GGUF with --tokenizer")
    size, kinds = files.config["vocab_size"], gguf.TokenType
    tokens, types = [f"[PAD{i}]" for i in range(size)], [kinds.UNUSED] * size
    added = {t["content"]: t for t in given["added_tokens"]}
    entries = model["vocab"] | {text: t["id"] for text, t in added.items()}
    if max(entries.values()) >= size:
        raise _refusal(root, f"token ids below {size}, the rows of its embedding", str(max(entries.values())))
    for text, number in entries.items():
        tokens[number] = text
        special = added.get(text, {}).get("special")
        types[number] = {None: kinds.NORMAL, True: kinds.CONTROL, False: kinds.USER_DEFINED}[special]
    yield "tokenizer_model", "gpt2"
    yield "tokenizer_pre", _PRE_TOKENIZERS[form]
    yield "token_list", tokens
    yield "token_types", types
    yield "token_merges", [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    settings, config = _settings(root), files.config
    ids = {}
    for which in ("bos", "eos", "unk", "pad"):
        named = settings.get(f"{which}_token")
        text = named["content"] if isinstance(named, dict) else named
        number = config.get(f"{which}_token_id") if text is None else entries.get(text)
        if isinstance(number, int):
            ids[which] = number
            yield f"{which}_token_id", number
    framed = Tokenizer.from_file(str(root / "tokenizer.json")).encode("a").ids
    yield "add_bos_token", bool(framed) and framed[0] == ids.get("bos")


def _step(step: Mapping[str, Any]) -> tuple[str | None, Any]:
    """(type, the setting that decides how it splits) of one step; a setting that llama.cpp lacks makes it unknown."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step["pattern"].get("Regex")
    return kind, None
