"""A trait: a behaviour, defined by two opposite instructions and by topics for fitting and for held-out measurement.

`steer find` writes replies to the topics under both instructions and finds the direction between them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from steer.core.names import Name
from steer.core.small_files import read_yaml, shown
from steer.core.validation import Text, checked, from_file
from steer.errors import SteerError, UsageError

FIT_TOPICS, HELD_OUT_TOPICS = 8, 4
"""Fewest topics for fitting a direction, and for measuring it. Replies are judged in eight folds by topic, and an AUROC
over fewer than four topics means nothing."""

_FOLDER = Path(str(resources.files("steer"))) / "traits"


_Stripped = Annotated[Text, AfterValidator(str.strip)]
_Texts = Annotated[tuple[Text, ...], Field(min_length=1)]


@checked
class Trait:
    """A behaviour, with the instructions and topics that bring it out.

    Example:
        trait = steer.Trait.load("moralizing")
        print(trait.summary, trait.fit[0])
    """

    name: Name
    summary: _Stripped
    """A description in one line, for people."""
    with_instruction: Annotated[_Stripped, Field(alias="with")]
    """System prompt under which the model shows the trait."""
    without_instruction: Annotated[_Stripped, Field(alias="without")]
    """System prompt under which the model does not show the trait."""
    markers: _Texts
    """Words and phrases that are counted for the marker rate."""
    fit: _Texts
    """Topics (user messages) that directions, scorers and searches may see."""
    held_out: _Texts
    """Topics that only measurements see."""

    @classmethod
    def load(cls, name_or_path: str | Path) -> Trait:
        """Load a trait that ships with the package, by name, or the user's own YAML file, by path.

        Errors: UsageError for an unknown name, SteerError for a file that is not a valid trait.
        """
        text = str(name_or_path)
        if text in shipped_traits():
            path = _FOLDER / f"{text}.yaml"
        elif text.endswith((".yaml", ".yml")):
            path = Path(text)
        else:
            raise UsageError(
                f"unknown trait {text!r}: expected one of {', '.join(shipped_traits())} or a .yaml file of "
                "your own; see steer/traits for the layout"
            )
        trait = from_file(cls, read_yaml(path, "a trait", aliases=True), str(path))
        trait.check(str(path))
        return trait

    def check(self, where: str | None = None) -> None:
        """Raise if no direction can be found with this trait, before minutes are spent on writing replies. `where` is
        the trait's file, for errors.

        Errors: SteerError for too few topics, a topic that occurs twice, and instructions that are the same.
        """
        where = where or f"trait {self.name!r}"
        if _plain(self.with_instruction) == _plain(self.without_instruction):
            raise SteerError(f"{where}: expected opposite instructions under 'with' and 'without', found the same")
        places: dict[str, str] = {}
        for place, topics, least in (("fit", self.fit, FIT_TOPICS), ("held_out", self.held_out, HELD_OUT_TOPICS)):
            for topic in topics:
                if before := places.get(_plain(topic)):
                    twice = f"twice under {place!r}" if before == place else "in both 'fit' and 'held_out'"
                    raise SteerError(f"{where}: topic {shown(topic)} is {twice}; expected different, unseen topics")
                places[_plain(topic)] = place
            if len(topics) < least:
                raise SteerError(
                    f"{where}: expected at least {least} topics under {place!r}, found {len(topics)}; add some"
                )


def _plain(text: str) -> str:
    """The text in the form for comparisons: topics that differ only in white space or case are the same."""
    return " ".join(text.casefold().split())


def shipped_traits() -> tuple[str, ...]:
    """Names of the traits that ship with the package."""
    return tuple(sorted(p.stem for p in _FOLDER.glob("*.yaml") if p.stem != "neutral"))


@checked
class NeutralPrompts:
    """Chat prompts that touch no trait, on which steering should change little."""

    fit: _Texts
    held_out: _Texts

    @classmethod
    def load(cls) -> NeutralPrompts:
        """The prompts that ship with the package."""
        return from_file(cls, read_yaml(_FOLDER / "neutral.yaml", "prompts"), "neutral.yaml")
