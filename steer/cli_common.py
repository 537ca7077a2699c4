"""What the verbs of the command line share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or smollm2-135m-instruct.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", help="auto: over every GPU, then memory; a device as cuda:1. The first GPU, or the CPU."
    ),
]
FourBit = Annotated[
    bool, typer.Option("--four-bit", help="Quantise the weights to 4 bits as they load (bitsandbytes).")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, all else on stderr.")]


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """A verb's result on stdout."""
    typer.echo(json.dumps(result, indent=2) if as_json else text)
