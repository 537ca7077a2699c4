"""Settings that decide how the next token of a reply is drawn: `Sampler`, its checks, and the presets.

The stages are defined here in order; `steer.model.sampling` computes them.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from steer.core.small_files import shown
from steer.core.validation import Count, Number, Share, Whole, checked
from steer.errors import UsageError

Stage = Literal["penalties", "dry", "temperature", "top_k", "top_p", "min_p", "typical_p", "xtc"]
ORDER: tuple[Stage, ...] = get_args(Stage)
"""All stages, in the order in which transformers applies them."""
TEMPERATURE_LAST: tuple[Stage, ...] = (*(s for s in ORDER if s != "temperature"), "temperature")
"""The same with temperature last: unlikely tokens are dropped by the model's own probabilities, and only the remaining
ones are flattened."""
MAX_BREAKERS = 64
"""Largest number of DRY's sequence breakers, and of characters in each."""
SHAPING = frozenset(ORDER) - {"penalties", "dry"}
"""Stages that shape the distribution; they do not affect a greedy choice."""


def _greedy_or_usual(temperature: float) -> float:
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"expected 0 (greedy) or a number from 1e-6 to 1e6, found {temperature}")
    return temperature


def _pairs(given: Any) -> Any:
    """A mapping as a list of pairs, with token ids in place of the texts that keys of a JSON object are."""
    if not isinstance(given, Mapping):
        return given
    return [(int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 20 else k, v) for k, v in given.items()]


def _different(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a stage, or the token of a pair, that occurs twice."""
    names = Counter(entry[0] if isinstance(entry, tuple) else entry for entry in given)
    if repeated := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"expected different entries, each at most once, found {repeated[0]} again")
    return given


_PositiveShare = Annotated[Number, Field(gt=0, le=1)]
_Additive = Annotated[Number, Field(ge=-2, le=2)]
# Every breaker is searched for in every token of the vocabulary, so their number and length are limited.
_Breakers = Annotated[
    tuple[Annotated[str, Field(strict=True, min_length=1, max_length=MAX_BREAKERS)], ...],
    Field(max_length=MAX_BREAKERS, fail_fast=True),
]
_Biases = Annotated[
    tuple[tuple[Count, Annotated[Number, Field(ge=-100, le=100)]], ...],
    Field(fail_fast=True),
    BeforeValidator(_pairs),
    AfterValidator(_different),
]


@checked
class Sampler:
    """Settings of a reply. `logit_bias` is applied first, then the stages in `order`.

    Sequences may be given as lists and `logit_bias` as a mapping, as JSON and YAML have them.

    >>> Sampler(temperature=0.7, top_k=40).stages
    ('penalties', 'temperature', 'top_k')

    Errors: UsageError of one line that names the field, what was expected and what was found.
    """

    max_new_tokens: Annotated[Whole, Field(ge=1)] = 256
    """Longest reply, in tokens."""
    temperature: Annotated[Number, AfterValidator(_greedy_or_usual)] = 0.8
    """Divides the logits. 0 is greedy: the likeliest token after penalties and DRY, whatever the other settings."""
    top_k: Count = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: _PositiveShare = 1.0
    """Keep the likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 keeps all."""
    min_p: Share = 0.0
    """Drop tokens below this share of the likeliest one's probability (Nguyen et al. 2024); 0 drops none."""
    typical_p: _PositiveShare = 1.0
    """Keep the tokens whose surprise is nearest to the entropy and that together reach this probability (Meister et
    al. 2022); 1 keeps all."""
    repetition_penalty: Annotated[Number, Field(ge=1e-6, le=1e6)] = 1.05
    """Divides the positive logits of tokens in the prompt and reply, and multiplies the negative ones (Keskar et al.
    2019); 1 is off. Tokens repeat less with a value above 1."""
    frequency_penalty: _Additive = 0.0
    """Subtracted from a token's logit once for each time the reply contains it (OpenAI's definition, -2 to 2); 0 is
    off."""
    presence_penalty: _Additive = 0.0
    """Subtracted once from the logit of every token that the reply contains (OpenAI's definition, -2 to 2); 0 is
    off."""
    dry_multiplier: Annotated[Number, Field(ge=0)] = 0.0
    """Subtracted from the logit of a token that would lengthen a repeated sequence, times dry_base for each token of
    the repeat beyond dry_allowed_length (DRY: text-generation-webui, pull request 5677); 0 is off."""
    dry_base: Annotated[Number, Field(ge=1)] = 1.75
    """How fast DRY grows with the length of the repeat."""
    dry_allowed_length: Count = 2
    """The shortest repeat whose next token is penalised."""
    dry_range: Count = 0
    """Number of last tokens in which DRY looks for repeats; 0 is all."""
    dry_sequence_breakers: _Breakers = ("\n", ":", '"', "*")
    """Texts at which DRY ends a repeat."""
    xtc_probability: Share = 0.0
    """Probability that XTC acts on a token: of the tokens at or above xtc_threshold it then drops all but the least
    likely (text-generation-webui, pull request 6335); 0 is off."""
    xtc_threshold: Share = 0.1
    """Probability from which XTC counts a token as a top choice."""
    logit_bias: _Biases = ()
    """(token id, number added to its logit), from -100, which bans the token, to 100, which makes it all but
    certain."""
    order: Annotated[tuple[Stage, ...], AfterValidator(_different)] = ORDER
    """Names of the stages, each at most once; a stage that is left out must be off."""
    seed: Whole = 0
    """Each row of a batch draws from its own random stream, seeded by (seed, the row's key)."""

    def __post_init__(self) -> None:
        for stage in ORDER:
            if stage not in self.order and (found := self._sets(stage)):
                raise ValueError(
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


PresetName = Literal["greedy", "plain", "wild", "near-greedy"]
PRESETS: dict[PresetName, Sampler] = {
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
