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

# ruff: noqa: F401 - the names imported for type checkers are those of `_MODULES`
from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from steer.core.version import __version__

# Torch's libraries read these variables when they are loaded; tests/bench/threads.py measures both. Values that the
# user has set stay.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    # OpenMP threads spin while they wait for a thread whose core another process has taken. Limit that to 0.1 ms; after
    # it they sleep.
    os.environ["GOMP_SPINCOUNT"] = "20000"
# The kernel then hands out new memory in pages of 2 MB instead of 4 kB, which takes a quarter of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# oneDNN keeps code for each shape of the last 1024 products. Shapes change with each token and hardly come again: a
# batch of replies left 0.2 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

if TYPE_CHECKING:
    from steer.baking.certificate import Certificate
    from steer.baking.control_vector import load_control_vector
    from steer.baking.verify import verify
    from steer.chat.session import Session
    from steer.checkpoint.fetch import fetch
    from steer.checkpoint.kin import kin
    from steer.checkpoint.merge import merge
    from steer.core.cards import Card, load_card
    from steer.core.dictionary import Dictionary
    from steer.core.dictionary_files import load_dictionary
    from steer.core.direction import Direction
    from steer.core.edit import Edit
    from steer.core.feature import Feature
    from steer.core.lorebook import Lorebook, load_lorebook
    from steer.core.profile import Profile
    from steer.core.sampler import PRESETS, Sampler
    from steer.core.schedule import Gate, Schedule
    from steer.core.slider import Slider
    from steer.core.trait import Trait
    from steer.errors import SteerError
    from steer.finding.features import find_features
    from steer.finding.traits import find
    from steer.model.steered import SteeredModel, load
    from steer.sae.harvest import harvest
    from steer.sae.train import train_dictionary
    from steer.verbs.bake import bake
    from steer.verbs.eval import evaluate

_MODULES = {
    "steer.baking.certificate": ["Certificate"],
    "steer.baking.control_vector": ["load_control_vector"],
    "steer.baking.verify": ["verify"],
    "steer.chat.session": ["Session"],
    "steer.checkpoint.fetch": ["fetch"],
    "steer.checkpoint.kin": ["kin"],
    "steer.checkpoint.merge": ["merge"],
    "steer.core.cards": ["Card", "load_card"],
    "steer.core.dictionary": ["Dictionary"],
    "steer.core.dictionary_files": ["load_dictionary"],
    "steer.core.direction": ["Direction"],
    "steer.core.edit": ["Edit"],
    "steer.core.feature": ["Feature"],
    "steer.core.lorebook": ["Lorebook", "load_lorebook"],
    "steer.core.profile": ["Profile"],
    "steer.core.sampler": ["PRESETS", "Sampler"],
    "steer.core.schedule": ["Gate", "Schedule"],
    "steer.core.slider": ["Slider"],
    "steer.core.trait": ["Trait"],
    "steer.errors": ["SteerError"],
    "steer.finding.features": ["find_features"],
    "steer.finding.traits": ["find"],
    "steer.model.steered": ["SteeredModel", "load"],
    "steer.sae.harvest": ["harvest"],
    "steer.sae.train": ["train_dictionary"],
    "steer.verbs.bake": ["bake"],
    "steer.verbs.eval": ["evaluate"],
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}
__all__ = list(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
