"""What the verbs of the command line share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or smollm2-135m-instruct.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, all else on stderr.")]


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """A verb's result on stdout."""
    typer.echo(json.dumps(result, indent=2) if as_json else text)
