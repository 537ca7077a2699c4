"""Every probe of `steer eval`, by name, in the order of the report."""

from __future__ import annotations

from collections.abc import Sequence

from steer.errors import UsageError
from steer.measure.probes.capability import Capability
from steer.measure.probes.characters import Characters
from steer.measure.probes.consequences import Consequences
from steer.measure.probes.consistency import Consistency
from steer.measure.probes.drift import Drift
from steer.measure.probes.implications import Implications
from steer.measure.probes.knowledge import Knowledge
from steer.measure.probes.persona import Persona
from steer.measure.probes.positions import Positions
from steer.measure.probes.probe import Probe
from steer.measure.probes.prose import Prose
from steer.measure.probes.traits import COMPLIANCE, MORALIZING

_OTHERS = (
    Positions(),
    Consequences(),
    Implications(),
    Consistency(),
    Characters(),
    Persona(),
    Knowledge(),
    MORALIZING,
    COMPLIANCE,
    Prose(),
)
PROBES: dict[str, Probe] = {probe.name: probe for probe in (*_OTHERS, Drift(_OTHERS), Capability())}


def probes_named(names: Sequence[str] | None = None) -> list[Probe]:
    """Return the probes of these names, all without any. Errors: UsageError that lists the probes."""
    if names is None:
        return list(PROBES.values())
    for name in names:
        if name not in PROBES:
            raise UsageError(f"--probes: expected some of {', '.join(PROBES)}, found {name!r}; mend the list")
    return [PROBES[name] for name in dict.fromkeys(names)]
