"""Settings that decide how the next token of a reply is drawn: `Sampler`, its checks, and the presets.

The stages are defined here in order; `steer.model.sampling` computes them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from steer.core.small_files import shown
from steer.errors import UsageError

ORDER = ("penalties", "dry", "temperature", "top_k", "top_p", "min_p", "typical_p", "xtc")
"""All stages, in the order in which transformers applies them."""
TEMPERATURE_LAST = (*(s for s in ORDER if s != "temperature"), "temperature")
"""The same with temperature last: unlikely tokens are dropped by the model's own probabilities, and only the remaining
ones are flattened."""
MAX_BREAKERS = 64
"""Largest number of DRY's sequence breakers, and of characters in each."""
SHAPING = frozenset(ORDER) - {"penalties", "dry"}
"""Stages that shape the distribution; they do not affect a greedy choice."""


@dataclass(frozen=True)
class Sampler:
    """Settings of a reply. `logit_bias` is applied first, then the stages in `order`.

    Sequences may be given as lists and `logit_bias` as a mapping, as JSON and YAML have them.

    >>> Sampler(temperature=0.7, top_k=40).stages
    ('penalties', 'temperature', 'top_k')

    Errors: UsageError of one line that names the field, what was expected and what was found.
    """

    max_new_tokens: int = 256
    """Longest reply, in tokens."""
    temperature: float = 0.8
    """Divides the logits. 0 is greedy: the likeliest token after penalties and DRY, whatever the other settings."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability (Nguyen et al. 2024); 0 drops none."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the entropy and that together reach this probability (Meister et
    al. 2022); 1 keeps all."""
    repetition_penalty: float = 1.05
    """Divides the positive logits of tokens in the prompt and reply, and multiplies the negative ones (Keskar et al.
    2019); 1 is off. Tokens repeat less with a value above 1."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time the reply contains it (OpenAI's definition, -2 to 2); 0 is
    off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the reply contains (OpenAI's definition, -2 to 2); 0 is
    off."""
    dry_multiplier: float = 0.0
    """Subtracted from the logit of a token that would lengthen a repeated sequence, times dry_base for each token of
    the repeat beyond dry_allowed_length (DRY: text-generation-webui, pull request 5677); 0 is off."""
    dry_base: float = 1.75
    """How fast DRY grows with the length of the repeat."""
    dry_allowed_length: int = 2
    """The shortest repeat whose next token is penalised."""
    dry_range: int = 0
    """Number of last tokens in which DRY looks for repeats; 0 is all."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts at which DRY ends a repeat."""
    xtc_probability: float = 0.0
    """Probability that XTC acts on a token: of the tokens at or above xtc_threshold it then drops all but the least
    likely (text-generation-webui, pull request 6335); 0 is off."""
    xtc_threshold: float = 0.1
    """Probability from which XTC counts a token as a top choice."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit), from -100, which bans the token, to 100, which makes it all but
    certain."""
    order: tuple[str, ...] = ORDER
    """Names of the stages, each at most once; a stage that is left out must be off."""
    seed: int = 0
    """Each row of a batch draws from its own random stream, seeded by (seed, the row's key)."""

    def __post_init__(self) -> None:
        for name, (kind, fine, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if not _is_number(value, kind) or not fine(value):
                raise UsageError(f"{name}: expected {expected}, found {shown(value)}")
        object.__setattr__(self, "dry_sequence_breakers", _breakers(self.dry_sequence_breakers))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "order", _order(self.order))
        for stage in ORDER:
            if stage not in self.order and (found := self._sets(stage)):
                raise UsageError(
                    f"order: expected {stage} in it, because {found} is set, found only "
                    f"{', '.join(self.order) or 'nothing'}; put the stage in or switch it off"
                )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that have an effect, in order."""
        return tuple(s for s in self.order if self._sets(s) and not (self.temperature == 0 and s in SHAPING))

    @property
    def temperature_last(self) -> bool:
        """Whether temperature is the last stage."""
        return self.order[-1:] == ("temperature",)

    def _sets(self, stage: str) -> str:
        """The fields that turn a stage on, as `field value`; empty if it is off."""
        off = {
            "penalties": {"repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0},
            "dry": {"dry_multiplier": 0},
            "temperature": {"temperature": 1},
            "top_p": {"top_p": 1},
            "typical_p": {"typical_p": 1},
            "xtc": {"xtc_probability": 0},
        }.get(stage, {stage: 0})
        return ", ".join(f"{k} {getattr(self, k)}" for k, neutral in off.items() if getattr(self, k) != neutral)


_Check = tuple[type, Callable[[Any], bool], str]
_SHARE: _Check = (Real, lambda v: 0 <= v <= 1, "a number from 0 to 1")
_POSITIVE_SHARE: _Check = (Real, lambda v: 0 < v <= 1, "a number above 0, up to 1 (1 keeps all tokens)")
_NOT_NEGATIVE: _Check = (Real, lambda v: v >= 0, "a number of at least 0")
_ADDITIVE: _Check = (Real, lambda v: -2 <= v <= 2, "a number from -2 to 2")
_COUNT: _Check = (Integral, lambda v: v >= 0, "a whole number of at least 0")
_NUMBERS: dict[str, _Check] = {
    "max_new_tokens": (Integral, lambda v: v >= 1, "a whole number of at least 1"),
    "temperature": (Real, lambda v: v == 0 or 1e-6 <= v <= 1e6, "0 (greedy) or a number from 1e-6 to 1e6"),
    "top_k": (Integral, lambda v: v >= 0, "a whole number of at least 0 (0 keeps all tokens)"),
    "top_p": _POSITIVE_SHARE,
    "min_p": _SHARE,
    "typical_p": _POSITIVE_SHARE,
    "repetition_penalty": (Real, lambda v: 1e-6 <= v <= 1e6, "a number from 1e-6 to 1e6 (1 is off)"),
    "frequency_penalty": _ADDITIVE,
    "presence_penalty": _ADDITIVE,
    "dry_multiplier": _NOT_NEGATIVE,
    "dry_base": (Real, lambda v: v >= 1, "a number of at least 1"),
    "dry_allowed_length": _COUNT,
    "dry_range": _COUNT,
    "xtc_probability": _SHARE,
    "xtc_threshold": _SHARE,
    "seed": (Integral, lambda v: True, "a whole number"),
}


def _is_number(value: Any, kind: type = Real) -> bool:
    """Whether `value` is a finite number of this type; whole numbers must fit 64 bits. True and False do not count."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    # Converting a whole number of hundreds of digits to float would raise.
    return abs(int(value)) < 2**63 if isinstance(value, Integral) else math.isfinite(value)


def _breakers(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(b, str) and b for b in given):
        raise UsageError(f"dry_sequence_breakers: expected a list of texts, none of them empty, found {shown(given)}")
    # Every breaker is searched for in every token of the vocabulary.
    if len(given) > MAX_BREAKERS or any(len(b) > MAX_BREAKERS for b in given):
        found = f"{len(given)}, the longest of {max(map(len, given))}"
        raise UsageError(
            f"dry_sequence_breakers: expected at most {MAX_BREAKERS} texts of {MAX_BREAKERS} characters, found {found}"
        )
    for text in given:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UsageError(f"dry_sequence_breakers: expected whole characters, found {shown(text)}")
    return tuple(given)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise UsageError(f"logit_bias: expected token ids with a number each, found {shown(given)}")
    biases: dict[int, float] = {}
    for key, bias in pairs:
        # Keys of a JSON object are always text.
        token: Any = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
        if not _is_number(token, Integral) or token < 0 or token in biases:
            raise UsageError(
                f"logit_bias: expected different token ids, whole numbers of at least 0, found {shown(token)}"
            )
        if not _is_number(bias) or not -100 <= bias <= 100:
            raise UsageError(f"logit_bias: expected a number from -100 to 100 for token {token}, found {shown(bias)}")
        biases[int(token)] = float(bias)
    return tuple(biases.items())


def _order(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | tuple):
        raise UsageError(f"order: expected a list of stages, found {shown(given)}; the stages are {', '.join(ORDER)}")
    for stage in given:
        if stage not in ORDER:
            raise UsageError(f"order: expected stages out of {', '.join(ORDER)}, found {shown(stage)}")
        if (times := list(given).count(stage)) > 1:
            raise UsageError(f"order: expected every stage at most once, found {stage} {times} times")
    return tuple(given)


PRESETS: dict[str, Sampler] = {
    "greedy": Sampler(temperature=0.0, repetition_penalty=1.0),
    "plain": Sampler(temperature=1.0, min_p=0.1, repetition_penalty=1.02),
    "wild": Sampler(temperature=1.4, min_p=0.1, repetition_penalty=1.02),
    "near-greedy": Sampler(temperature=3.0, min_p=0.5, repetition_penalty=1.03, order=TEMPERATURE_LAST),
}
"""`near-greedy` leaves a choice only where the model is unsure: tokens at least half as likely as the likeliest."""
CHAT = PRESETS["plain"]
"""Preset of the chat: the least random one whose replies are still varied."""
MEASURE = Sampler(max_new_tokens=80, temperature=0.7, top_k=40, repetition_penalty=1.05)
"""Sampler of the replies that are scored."""


def preset(name: str) -> Sampler:
    """The preset of that name. Errors: UsageError that lists the presets."""
    if name in PRESETS:
        return PRESETS[name]
    similar = difflib.get_close_matches(str(name)[:60], PRESETS, n=1)
    suggestion = f"; did you mean {similar[0]}?" if similar else ""
    raise UsageError(f"sampler preset: expected one of {', '.join(PRESETS)}, found {shown(name)}{suggestion}")
