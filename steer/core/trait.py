"""A trait: a behaviour, defined by two opposite instructions and by topics for fitting and for held-out measurement.

`steer find` writes replies to the topics under both instructions and finds the direction between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from steer.core.names import check_name
from steer.core.small_files import read_yaml, shown
from steer.errors import SteerError, UsageError

FIT_TOPICS, HELD_OUT_TOPICS = 8, 4
"""Fewest topics for fitting a direction, and for measuring it. Replies are judged in eight folds by topic, and an AUROC
over fewer than four topics means nothing."""


@dataclass(frozen=True)
class Trait:
    """A behaviour, with the instructions and topics that bring it out.

    Example:
        trait = steer.Trait.load("moralizing")
        print(trait.summary, trait.fit[0])
    """

    name: str
    summary: str
    """A description in one line, for people."""
    with_instruction: str
    """System prompt under which the model shows the trait."""
    without_instruction: str
    """System prompt under which the model does not show the trait."""
    markers: tuple[str, ...]
    """Words and phrases that are counted for the marker rate."""
    fit: tuple[str, ...]
    """Topics (user messages) that directions, scorers and searches may see."""
    held_out: tuple[str, ...]
    """Topics that only measurements see."""

    @classmethod
    def load(cls, name_or_path: str | Path) -> Trait:
        """Load a trait that ships with the package, by name, or the user's own YAML file, by path.

        Errors: UsageError for an unknown name, SteerError for a file that is not a valid trait.
        """
        text = str(name_or_path)
        if text in shipped_traits():
            path = Path(str(resources.files("steer") / "traits" / f"{text}.yaml"))
        elif text.endswith((".yaml", ".yml")):
            path = Path(text)
            if not path.is_file():
                raise SteerError(f"{path}: expected a trait file, found none; check the path")
        else:
            raise UsageError(
                f"unknown trait {text!r}: expected one of {', '.join(shipped_traits())} or a .yaml file of "
                "your own; see steer/traits for the layout"
            )
        return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> Trait:
        raw = read_yaml(path, "a trait", aliases=True)
        wanted = {"name": str, "summary": str, "with": str, "without": str}
        lists = ("markers", "fit", "held_out")
        if not isinstance(raw, dict):
            raise SteerError(f"{path}: expected a mapping with {', '.join([*wanted, *lists])}, found no mapping")
        unknown = [key for key in raw if key not in (*wanted, *lists)]
        if unknown:
            raise SteerError(f"{path}: unknown key {shown(unknown[0])}; expected {', '.join([*wanted, *lists])}")
        for key in wanted:
            if not isinstance(raw.get(key), str) or not raw[key].strip():
                raise SteerError(f"{path}: expected text under {key!r}, found {shown(raw.get(key))}; fill it in")
        try:
            check_name(raw["name"], f"{path}: name")
        except UsageError as e:
            raise SteerError(str(e)) from e
        for key in lists:
            value = raw.get(key)
            if not isinstance(value, list):
                raise SteerError(f"{path}: expected a list of texts under {key!r}, found {type(value).__name__}")
            invalid = [v for v in value if not isinstance(v, str) or not v.strip()]
            if invalid or not value:
                found = f"{shown(invalid[0])} among them" if invalid else "none"
                raise SteerError(f"{path}: expected at least one text under {key!r}, found {found}; fill it in")
        trait = cls(
            name=raw["name"],
            summary=raw["summary"].strip(),
            with_instruction=raw["with"].strip(),
            without_instruction=raw["without"].strip(),
            markers=tuple(raw["markers"]),
            fit=tuple(raw["fit"]),
            held_out=tuple(raw["held_out"]),
        )
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
        for place, topics in (("fit", self.fit), ("held_out", self.held_out)):
            for topic in topics:
                first = places.setdefault(_plain(topic), place)
                if first != place:
                    raise SteerError(
                        f"{where}: topic {shown(topic)} is in both 'fit' and 'held_out'; held-out topics must be unseen"
                    )
            if len({_plain(t) for t in topics}) < len(topics):
                twice = next(t for i, t in enumerate(topics) if _plain(t) in map(_plain, topics[:i]))
                raise SteerError(f"{where}: topic {shown(twice)} is twice under {place!r}; expected different topics")
        for place, topics, least in (("fit", self.fit, FIT_TOPICS), ("held_out", self.held_out, HELD_OUT_TOPICS)):
            if len(topics) < least:
                raise SteerError(
                    f"{where}: expected at least {least} topics under {place!r}, found {len(topics)}; add some"
                )


def _plain(text: str) -> str:
    """The text in the form for comparisons: topics that differ only in white space or case are the same."""
    return " ".join(text.casefold().split())


def shipped_traits() -> tuple[str, ...]:
    """Names of the traits that ship with the package."""
    folder = resources.files("steer") / "traits"
    names = (p.name for p in folder.iterdir())
    return tuple(sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml") and n != "neutral.yaml"))


@dataclass(frozen=True)
class NeutralPrompts:
    """Chat prompts that touch no trait, on which steering should change little."""

    fit: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def load(cls) -> NeutralPrompts:
        """The prompts that ship with the package."""
        raw = read_yaml(Path(str(resources.files("steer") / "traits" / "neutral.yaml")), "prompts")
        return cls(tuple(raw["fit"]), tuple(raw["held_out"]))
