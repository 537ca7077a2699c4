"""Keys of the prefix cache: texts share the cache of a common beginning where the same edit was applied to it."""

from __future__ import annotations

import hashlib

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature


def timed(edit: Edit) -> bool:
    """Whether the edit depends on where the prompt ends, so that no other text may use the cache."""
    return any(m.when.timed for m in edit.as_moves())


def edit_key(edit: Edit) -> str:
    """A digest that is equal for edits that do the same to every token: their directions, amounts and gates."""
    digest = hashlib.sha256(repr((edit.blocks, edit.strength)).encode())
    for move in edit.as_moves():
        gate = move.when.gate
        digest.update(repr((move.operation, move.coefficients, gate and (gate.above, gate.below))).encode())
        for target in (move.target, gate and gate.on):
            if isinstance(target, Direction):
                numbers = target.vector
                digest.update(repr((target.site, target.without_mean, target.gap, target.residual_norm)).encode())
            elif isinstance(target, Feature):
                dictionary = target.dictionary
                numbers = dictionary.part(target.indices).decoder_rows(range(len(target.indices)))
                digest.update(repr((dictionary.name, dictionary.site, target.indices, target.units)).encode())
            else:
                continue
            digest.update(numbers.double().cpu().numpy().tobytes())
    return digest.hexdigest()
