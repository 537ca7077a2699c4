"""A trait: a behaviour told by two opposite instructions and topics split into fit and held-out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from steer.errors import SteerError, UsageError
from steer.values.names import check_name
from steer.values.small_files import read_yaml, shown

FIT_TOPICS, HELD_OUT_TOPICS = 8, 4
"""The least that a direction is fitted on and measured on. Replies are judged in eight folds by topic, and an AUROC
over fewer than four topics says nothing."""


@dataclass(frozen=True)
class Trait:
    """A behaviour, and the text that draws it out."""

    name: str
    summary: str
    """One line for people."""
    with_instruction: str
    """System prompt under which the model shows the trait."""
    without_instruction: str
    """System prompt under which it does not."""
    markers: tuple[str, ...]
    """Words and phrases for the plain marker rate."""
    fit: tuple[str, ...]
    """Topics (user messages) that directions, scorers and searches may see."""
    held_out: tuple[str, ...]
    """Topics that only measurements see."""

    @classmethod
    def load(cls, name_or_path: str | Path) -> Trait:
        """A trait that ships, by name, or the user's own YAML file, by path.

        Errors: UsageError for an unknown name, SteerError for a file that is no trait.
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
            other = [v for v in value if not isinstance(v, str) or not v.strip()]
            if other or not value:
                found = f"{shown(other[0])} among them" if other else "none"
                raise SteerError(f"{path}: expected at least one text under {key!r}, found {found}; fill it in")
        made = cls(
            name=raw["name"],
            summary=raw["summary"].strip(),
            with_instruction=raw["with"].strip(),
            without_instruction=raw["without"].strip(),
            markers=tuple(raw["markers"]),
            fit=tuple(raw["fit"]),
            held_out=tuple(raw["held_out"]),
        )
        made.check(str(path))
        return made

    def check(self, where: str | None = None) -> None:
        """Raise where no direction can be found with this trait, before replies are written for minutes. `where` is
        the file it stands in.

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
    """A text as it is compared: two topics that differ in blanks or case are one."""
    return " ".join(text.casefold().split())


def shipped_traits() -> tuple[str, ...]:
    """Names of the traits that come with the package."""
    folder = resources.files("steer") / "traits"
    names = (p.name for p in folder.iterdir())
    return tuple(sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml") and n != "neutral.yaml"))


@dataclass(frozen=True)
class NeutralPrompts:
    """Chat prompts with no load of any trait: where steering must change little."""

    fit: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def load(cls) -> NeutralPrompts:
        """The prompts that ship."""
        raw = read_yaml(Path(str(resources.files("steer") / "traits" / "neutral.yaml")), "prompts")
        return cls(tuple(raw["fit"]), tuple(raw["held_out"]))
