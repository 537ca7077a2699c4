"""PEFT adapters on their models: peft passes over weights that find no place, and so would a merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from peft import PeftModel
from transformers import PreTrainedModel

from steer.checkpoint.fetch import check_adapter, check_complete
from steer.errors import CheckpointError


@contextmanager
def fitting_adapters() -> Iterator[None]:
    """While the block runs, an adapter that peft loads has to fit its model, and the model to be whole.

    Errors: CheckpointError for an adapter with weights for modules that the model lacks, such as one of a deeper model
    or of a wrapper with other names, for one that lacks weights of modules that its own config names, and for one in a
    pickle; and for a model whose files lack a tensor.
    """
    load, read = PeftModel.load_adapter, PreTrainedModel.from_pretrained.__func__

    def read_and_check(cls: type[PreTrainedModel], place: str, *args: Any, **kwargs: Any) -> Any:
        model, report = read(cls, place, *args, **kwargs, output_loading_info=True)
        check_complete(report, place)
        return model

    def load_and_check(model: Any, place: str, *args: Any, **kwargs: Any) -> Any:
        check_adapter(place, place, kwargs.get("revision"))
        result = load(model, place, *args, **kwargs)
        modules = {name.replace(".base_layer", "") for name, _ in model.named_modules()}
        # Beside adapted embeddings a file may hold the model's own, which have their place.
        foreign = [key for key in result.unexpected_keys if key.rpartition(".")[0] not in modules]
        if foreign or result.missing_keys:
            key, lack = (foreign[0], "a weight without a place,") if foreign else (result.missing_keys[0], "no weight")
            raise CheckpointError(
                f"{place}: expected an adapter of this model, found {lack} {key}; name the model that it was made for"
            )
        return result

    with (
        patch.object(PeftModel, "load_adapter", load_and_check),
        patch.object(PreTrainedModel, "from_pretrained", classmethod(read_and_check)),
    ):
        yield
