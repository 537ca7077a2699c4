"""A trait: a behaviour, defined by one or two opposite instructions and by topics for fitting and for held-out
measurement.

`steer find` writes replies to the topics under both instructions and finds the direction between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field

from steer.core.names import Name
from steer.core.small_files import read_yaml, shown
from steer.core.validation import Line, Text, checked, from_file, mistakes_in
from steer.errors import SteerError, UsageError

FIT_TOPICS, HELD_OUT_TOPICS = 4, 2
"""Fewest topics for fitting a direction, and for measuring it. Each reply is judged by a classifier that never saw its
topic, which leaves three topics to learn from; and a figure taken on one topic says nothing about others."""

FOLDER = Path(str(resources.files("steer"))) / "traits"
"""Where the traits that ship are."""

_Stripped = Annotated[Text, AfterValidator(str.strip)]
END = 40
"""Most characters of the description of a slider's end: both are shown beside the slider."""


def _short(text: str) -> str:
    text = text.strip()
    if len(text) > END:
        raise ValueError(f"expected at most {END} characters, found {len(text)}; shorten it")
    return text


_End = Annotated[Line, AfterValidator(_short)]
_Texts = Annotated[tuple[Text, ...], Field(min_length=1)]


@checked
class _Prompts:
    file: ClassVar[str]
    fit: _Texts
    """User messages that fitting may see."""
    held_out: _Texts
    """User messages that only measurements see."""

    @classmethod
    def load(cls) -> Self:
        """The prompts that ship with the package."""
        return from_file(cls, read_yaml(FOLDER / cls.file, "prompts"), cls.file)


@checked
class NeutralPrompts(_Prompts):
    """Chat prompts that touch no trait, on which steering should change little."""

    file = "neutral.yaml"


@checked
class TopicPool(_Prompts):
    """Everyday topics, for traits that name none."""

    file = "pool.yaml"


@checked
class Trait:
    """A behaviour, with the instructions and topics that bring it out. A trait without topics uses those of the
    shipped pool of everyday topics.

    Example:
        trait = steer.Trait.load("moralizing")
        print(trait.summary, trait.fit[0])
    """

    name: Name
    summary: _Stripped
    """A description in one line, for people."""
    with_instruction: Annotated[_Stripped, Field(alias="with")]
    """System prompt under which the model shows the trait."""
    without_instruction: Annotated[_Stripped | None, Field(alias="without")] = None
    """System prompt under which the model does not show the trait; None: the replies under no system prompt."""
    markers: tuple[Text, ...] = ()
    """Words and phrases that are counted for the marker rate, if there are any."""
    fit: _Texts = field(default_factory=lambda: TopicPool.load().fit)
    """Topics (user messages) that directions, scorers and searches may see."""
    held_out: _Texts = field(default_factory=lambda: TopicPool.load().held_out)
    """Topics that only measurements see."""
    low_end: _End | None = None
    """What the model does at the low end of the slider, in a few plain words: "never lectures"."""
    high_end: _End | None = None
    """What the model does at the high end of the slider: "preaches"."""

    @classmethod
    def load(cls, name_or_path: str | Path) -> Trait:
        """Load a trait that ships with the package, by name, or the user's own YAML file, by path.

        Errors: UsageError for an unknown name, SteerError for a file that is not a valid trait.
        """
        text = str(name_or_path)
        if text in shipped_traits():
            path = FOLDER / f"{text}.yaml"
        elif text.endswith((".yaml", ".yml")):
            path = Path(text)
        else:
            raise UsageError(
                f"unknown trait {text!r}: expected one of {', '.join(shipped_traits())} or a .yaml file of "
                "your own, see steer/traits for the layout; a sentence needs a name: --as NAME"
            )
        data = read_yaml(path, "a trait", aliases=True)
        if half := _half_absent(data):
            raise SteerError(f"{path}: {half}")
        trait = from_file(cls, data, str(path))
        trait.check(str(path))
        return trait

    @classmethod
    def mistakes(cls, path: str | Path) -> list[str]:
        """Everything that is wrong with a trait's file, one line for each mistake; empty for a file that can be used.
        `load` raises the first."""
        try:
            data = read_yaml(Path(path), "a trait", aliases=True)
        except SteerError as e:
            return [str(e)]
        trait, lines = mistakes_in(cls, data)
        found = [*lines, _half_absent(data), *(trait.faults() if trait else ())]
        return [f"{path}: {line}" for line in found if line]

    @classmethod
    def from_sentences(cls, sentence: str, opposite: str | None = None, name: str | None = None) -> Trait:
        """A trait of two sentences, on the pool of topics that ships: what the model is to be, and the opposite.

        Without `opposite` the replies under no instruction are the other side. `name` is by default made of the
        sentence's words.
        Errors: UsageError for a sentence that is blank or a trait's name, and for an invalid name or a shipped
        trait's; SteerError for the same sentence twice.

            rhymes = steer.Trait.from_sentences("You answer in rhyming couplets.", "You answer in plain prose.")
            direction = steer.find(model, rhymes, quick=True)
        """
        if name is None:
            name = "-".join(re.findall(r"\w+", sentence.casefold()))[:40].strip("-")
        if name in shipped_traits():
            raise UsageError(f"name: expected a name that no shipped trait has, found {name!r}; choose another")
        for key, text in (("sentence", sentence), ("opposite", opposite)):
            if text is not None and (not text.strip() or text in shipped_traits() or text.endswith((".yaml", ".yml"))):
                raise UsageError(f"{key}: expected an instruction to the model, found {shown(text)}; write it out")
        summary = " ".join(sentence.split())
        trait = cls(name=name, summary=summary, with_instruction=sentence, without_instruction=opposite)
        trait.check()
        return trait

    def shortened(self, fit: int, held_out: int) -> Trait:
        """The trait with at most so many topics of each part, spread evenly over those it has."""
        return replace(self, fit=spread(self.fit, fit), held_out=spread(self.held_out, held_out))

    def check(self, where: str | None = None) -> None:
        """Raise if no direction can be found with this trait, before minutes are spent on writing replies. `where` is
        the trait's file, for errors.

        Errors: SteerError, the first of `faults`.
        """
        for fault in self.faults():
            raise SteerError(f"{where or f'trait {self.name!r}'}: {fault}")

    def faults(self) -> Iterator[str]:
        """Why no direction can be found with this trait: instructions that are the same, too few topics, a topic that
        occurs twice."""
        if _plain(self.with_instruction) == _plain(self.without_instruction or ""):
            yield "expected opposite instructions under 'with' and 'without', found the same"
        places: dict[str, str] = {}
        for place, topics, least in (("fit", self.fit, FIT_TOPICS), ("held_out", self.held_out, HELD_OUT_TOPICS)):
            for topic in topics:
                if before := places.get(_plain(topic)):
                    twice = f"twice under {place!r}" if before == place else "in both 'fit' and 'held_out'"
                    yield f"topic {shown(topic)} is {twice}; expected different, unseen topics"
                places[_plain(topic)] = place
            if len(topics) < least:
                yield f"expected at least {least} topics under {place!r}, found {len(topics)}; add some"


def _half_absent(data: Any) -> str | None:
    """Return the error for a trait's mapping that has only one list of topics; the pool would supply the other."""
    absent = [k for k in ("fit", "held_out") if data.get(k) is None] if isinstance(data, Mapping) else []
    return f"expected topics under 'fit' and 'held_out', found no {absent[0]!r}; add it" if len(absent) == 1 else None


def _plain(text: str) -> str:
    """The text in the form for comparisons: topics that differ only in white space or case are the same."""
    return " ".join(text.casefold().split())


def spread(topics: tuple[str, ...], count: int) -> tuple[str, ...]:
    """At most `count` topics, at even distances."""
    count = min(count, len(topics))
    return tuple(topics[i * len(topics) // count] for i in range(count))


def shipped_traits() -> tuple[str, ...]:
    """Names of the traits that ship with the package."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.yaml") if p.name not in (NeutralPrompts.file, TopicPool.file)))
