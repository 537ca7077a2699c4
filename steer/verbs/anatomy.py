"""The verb `steer anatomy`: the proved anatomy of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers.utils.hub import cached_file

from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.fetch import resolve
from steer.checkpoint.proof import NotProved, structure
from steer.files import read_json_object


def proved_anatomy(model: str) -> Anatomy:
    """The anatomy of a checkpoint, a hub id, or a config.json, proved also where its layout is declared.

    Errors: UnsupportedError for an architecture that transformers does not have, NotProved for one whose anatomy cannot
    be proved or is declared otherwise, CheckpointError for a model that is not there.
    """
    path = Path(model)
    if not path.is_file():
        found = cached_file(resolve(model), "config.json")
        assert found is not None  # else it raises
        path = Path(found)
    config = read_json_object(path, what="a config", do="fetch the model again")
    declared = Anatomy.of(config, model)
    proved = replace(declared, **vars(structure(config, model)))
    for proven, expected in zip(_places(proved), _places(declared), strict=True):
        if proven != expected:
            raise NotProved(f"{model}: {proven} is found to write into the residual stream, {expected} is declared to")
    return proved


def _places(anatomy: Anatomy) -> list[tuple[str, tuple[str, ...]]]:
    """(module, norms after it) of every writer in a block."""
    return [(w.module, w.norms) for w in anatomy.live_writers if w.block is not None]
