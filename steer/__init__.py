"""steer: feature sliders for merged language models.

    import steer

    model = steer.load("path-or-hub-id")
    moral = steer.find(model, "moralizing")
    with model.steered({moral: -1.5}):
        print(model.chat("My friend lied to me."))
    model.sliders["moralizing"] = -0.5
    steer.bake("path", "out", ablate=[moral])

Names are imported when they are first used: `import steer` is instant.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read by torch's libraries when they are loaded; tests/bench/threads.py measures both. What the user has set stays.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    # Threads that wait for one that lost its core to another process spin for as long as that takes: 0.1 ms, then
    # they sleep.
    os.environ["GOMP_SPINCOUNT"] = "20000"
# Memory that is new to the process comes 2 MB at a time in place of 4 kB, a quarter of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from steer.baking import bake
    from steer.errors import SteerError
    from steer.feature_finding import find_features
    from steer.features.harvest import harvest
    from steer.finding import find
    from steer.live.model import SteeredModel, load
    from steer.live.session import Session
    from steer.training import train_dictionary
    from steer.values.cards import Card, load_card
    from steer.values.dictionary import Dictionary
    from steer.values.dictionary_files import load_dictionary
    from steer.values.direction import Direction
    from steer.values.edit import Edit
    from steer.values.feature import Feature
    from steer.values.move import Move
    from steer.values.profile import Profile
    from steer.values.sampler import PRESETS, Sampler
    from steer.values.slider import Slider
    from steer.values.trait import Trait
    from steer.values.when import Gate, When
    from steer.weights.certify import Certificate, verify
    from steer.weights.control_vector import load_control_vector
    from steer.weights.fetch import fetch
    from steer.weights.merge import merge

__version__ = "0.1.0"

_WHERE = {
    "load_card": "steer.values.cards",
    "When": "steer.values.when",
    "Session": "steer.live.session",
    "Profile": "steer.values.profile",
    "PRESETS": "steer.values.sampler",
    "Move": "steer.values.move",
    "Gate": "steer.values.when",
    "Card": "steer.values.cards",
    "Certificate": "steer.weights.certify",
    "Direction": "steer.values.direction",
    "Dictionary": "steer.values.dictionary",
    "Edit": "steer.values.edit",
    "Feature": "steer.values.feature",
    "Sampler": "steer.values.sampler",
    "Slider": "steer.values.slider",
    "SteerError": "steer.errors",
    "SteeredModel": "steer.live.model",
    "Trait": "steer.values.trait",
    "bake": "steer.baking",
    "fetch": "steer.weights.fetch",
    "find": "steer.finding",
    "find_features": "steer.feature_finding",
    "harvest": "steer.features.harvest",
    "load_control_vector": "steer.weights.control_vector",
    "load_dictionary": "steer.values.dictionary_files",
    "train_dictionary": "steer.training",
    "load": "steer.live.model",
    "merge": "steer.weights.merge",
    "verify": "steer.weights.certify",
}

__all__ = [
    "PRESETS",
    "Card",
    "Certificate",
    "Dictionary",
    "Direction",
    "Edit",
    "Feature",
    "Gate",
    "Move",
    "Profile",
    "Sampler",
    "Session",
    "Slider",
    "SteerError",
    "SteeredModel",
    "Trait",
    "When",
    "bake",
    "fetch",
    "find",
    "find_features",
    "harvest",
    "load",
    "load_card",
    "load_control_vector",
    "load_dictionary",
    "merge",
    "train_dictionary",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
