"""The LoRAs of a running llama-server as sliders: what each ablates is read from the certificate of its bake.

`Adapters` is the library of a model behind llama-server: the only names that its sliders have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steer.baking.certificate import CERTIFICATE, CONTROL_VECTOR, Certificate, lora_files
from steer.baking.checks import certified_edit
from steer.baking.llama_cpp import lora_edits
from steer.checkpoint.library import Checkpoint, Library
from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.slider import Slider, parse_name
from steer.errors import MismatchError, UnknownNameError, UnsupportedError, UsageError
from steer.model.loaded import LoadedModel
from steer.model.steering.steering import Steering


@dataclass(frozen=True)
class Adapter:
    """A LoRA that llama-server has loaded."""

    id: int
    """The number by which a request names it."""
    scale: float
    """Its scale in requests that name none. A LoRA that no bake of steer wrote keeps it."""
    slider: str | None = None
    """Name of its slider, as `moralizing:ablate`; None for a LoRA that no bake of steer wrote."""
    edit: Edit | None = None
    """What it does at scale 1."""

    @property
    def strength(self) -> float:
        """The share of the directions that it removes at scale 1; 1 where that differs from writer to writer."""
        return 1.0 if self.edit is None else self.edit.strength


class Adapters(Library):
    """The sliders of a llama-server: `NAME:ablate` for each LoRA that `steer bake --as gguf` wrote.

    An amount is the share that is removed, as for the sliders of the other engines. The directions of a control vector
    are listed too, as `fixed`: llama-server reads it when it starts.
    """

    def __init__(
        self, model: Checkpoint, place: Path, rows: Sequence[Mapping[str, Any]], baked: Sequence[Path]
    ) -> None:
        """`place`: the checkpoint's directory. `rows`: the answer to GET /lora-adapters. `baked`: outputs of bakes, for
        LoRAs whose path in `rows` is on another machine.

        Errors: UsageError without a LoRA of a bake, MismatchError for one of another checkpoint, CheckpointError for a
        certificate that does not fit its files.
        """
        super().__init__(model)
        self.adapters: list[Adapter] = []
        self._sliders: dict[str, Slider] = {}
        self._of: dict[bytes, Adapter] = {}
        """Numbers of a direction -> the LoRA that ablates it."""
        folders: dict[Path, dict[str, Edit]] = {}
        for row in rows:
            path = Path(row["path"])
            places = (path.parent, *baked)
            folder = next((f for f in places if (f / CERTIFICATE).is_file() and (f / path.name).is_file()), None)
            if folder is not None and folder not in folders:
                folders[folder] = self._read(folder, place)
            edit = None if folder is None else folders[folder].get(path.name)
            self._add(Adapter(row["id"], row["scale"]), edit)
        if not folders:
            found = ", ".join(row["path"] for row in rows) or "none"
            raise UsageError(
                f"llama-server: expected LoRAs that steer bake --as gguf wrote, found {found}; start it with the "
                "command that the bake prints, or name the bake's folder with --baked"
            )

    @property
    def directions(self) -> dict[str, Direction]:  # type: ignore[override]
        """The directions by name, those of the control vector too."""
        return {slider.target.name: slider.target for slider in self._sliders.values()}  # type: ignore[misc]

    def sliders(self) -> dict[str, Slider]:
        return dict(self._sliders)

    def slider(self, name: str) -> Slider:
        """See `Library`. Errors: UnknownNameError; UnsupportedError for a slider that only a restart can move."""
        if name in self.fixed:
            raise UnsupportedError(
                f"slider {name!r}: expected one that moves while llama-server runs; {self.fixed[name]}"
            )
        if name in self._sliders:
            return self._sliders[name]
        base, operation = parse_name(name)
        if base not in self.directions:
            known = ", ".join(n for n in self._sliders if n not in self.fixed)
            raise UnknownNameError(f"slider {name!r}: expected one that llama-server has as a LoRA, found {known}")
        return Slider(self.directions[base], operation or "add", label=name if operation else None)

    def scales(self, edit: Edit | None) -> dict[int, float]:
        """Return the scale of every LoRA, by id, under an edit. Errors: UnsupportedError for anything but ablations of
        the LoRAs' directions on every token."""
        scales = {a.id: a.scale if a.slider is None else 0.0 for a in self.adapters}
        for move in () if edit is None else edit.as_moves():
            adapter = self._of.get(_numbers(move.target)) if move.ablates and move.when.always else None
            if adapter is None or adapter.slider is None:
                raise UnsupportedError(
                    f"slider {move.name!r}: expected what a LoRA of llama-server does, which is to ablate one of "
                    f"{', '.join(a.slider for a in self.adapters if a.slider)} on every token, found {move.operation}"
                    f"{'' if move.when.always else ' on some tokens'}; bake it, or serve with --engine transformers"
                )
            scales[adapter.id] = move.amount / adapter.strength
        return scales

    def _read(self, folder: Path, place: Path) -> dict[str, Edit]:
        """Return file -> the edit of each LoRA of a bake, and list what its control vector adds."""
        cert = Certificate.load(folder)
        if cert.source_files.get("config.json") != hash_file(place / "config.json"):
            raise MismatchError(
                f"{folder}: expected a bake of {self.model.name}, found one of {cert.source}; serve that checkpoint"
            )
        edit = certified_edit(folder, cert)
        for direction, amount in edit.add:
            self._sliders[direction.name] = Slider(direction).at(amount)
            self.fixed[direction.name] = (
                f"it is in {folder / CONTROL_VECTOR}, which llama-server reads when it starts, and it does not say "
                "whether it did; bake another amount and start it again"
            )
        return {file: part for file, part in lora_edits(edit).items() if file in lora_files(cert)}

    def _add(self, adapter: Adapter, edit: Edit | None) -> None:
        if edit is not None:
            target = edit.ablate[0]
            if edit.ablate[1:]:  # not orthogonal, so they have one scale: no slider of one of them moves this LoRA
                total = torch.stack([d.vector for d in edit.ablate]).sum(0)
                target = replace(target, name="+".join(d.name for d in edit.ablate), vector=total)
            name = f"{target.name}:ablate"
            while name in self._sliders:
                name += " (2)"
            adapter = replace(adapter, slider=name, edit=edit)
            self._sliders[name] = Slider(target, "ablate", label=name)
            self._of[_numbers(target)] = adapter
        self.adapters.append(adapter)


class AdapterSteering(Steering):
    """The steering of a model that llama-server holds: it applies nothing, and refuses edits that no LoRA does."""

    def __init__(self, model: LoadedModel, adapters: Adapters) -> None:
        super().__init__(model.hf, model.anatomy)
        self._adapters = adapters

    def check(self, edit: Edit) -> None:
        """Raise unless the edit fits this model and llama-server's LoRAs. Errors: as `Adapters.scales`."""
        super().check(edit)
        self._adapters.scales(edit)


def _numbers(target: Any) -> bytes:
    return target.vector.numpy().tobytes() if isinstance(target, Direction) else b""
