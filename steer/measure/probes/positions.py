"""Whether a model knows where things and people are after they were moved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from steer.measure.probes.choice import Choice, ForcedChoice
from steer.measure.probes.probe import Size
from steer.measure.probes.stories import small_talk, told, written

MOVES = ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 2), (0, 1, 2, 3), (1, 2, 2, 4), (0, 2, 3, 6), (1, 2, 4, 8))
"""How often each of the four things of a story is moved."""
LATER = (0, 4, 10)
"""How many messages of small talk come between a story and its questions."""


@dataclass(frozen=True)
class _Kind:
    """How one kind of story says that a thing is in a place. {who} is a person, {a} the place before, {b} the next."""

    name: str
    places: str
    """The list of words that the places are from."""
    start: str
    move: str
    lure: str
    """A mention of a thing together with a place where it is not."""
    question: str
    begun: str


KINDS = (
    _Kind(
        "boxes",
        "boxes",
        "The {thing} is in the {b}.",
        "{who} takes the {thing} out of the {a} and puts it into the {b}.",
        "{who} looks for the {thing} in the {b}, but it is not there.",
        "Where is the {thing} now?",
        "The {thing} is in the",
    ),
    _Kind(
        "rooms",
        "rooms",
        "{who} is in the {b} and has the {thing} with {who}.",
        "{who} leaves the {a} and goes to the {b}.",
        "The {b} is a good place for a {thing}.",
        "Where is the {thing} now?",
        "The {thing} is in the",
    ),
    _Kind(
        "hands",
        "people",
        "{b} has the {thing}.",
        "{a} gives the {thing} to {b}.",
        "{b} would like to have the {thing}.",
        "Who has the {thing} now?",
        "The {thing} is with",
    ),
)


class Positions(ForcedChoice):
    """Four things and four places: where is each thing at the end?

    Every place is right for one of the four questions of a story, so that no place is a better guess than another.
    """

    name = "positions"
    says = "how well the model knows where things and people are after they were moved"

    def items(self, size: Size) -> list[Choice]:
        """Return four questions on each story."""
        rng, words = random.Random(f"positions {size.seed}"), written("positions")
        return [item for story in range(size.of(84, 15)) for item in _questions(rng, words, story)]


def _questions(rng: random.Random, words: dict[str, list[str]], story: int) -> list[Choice]:
    kind, counts = KINDS[story % len(KINDS)], MOVES[story % len(MOVES)]
    later = LATER[story % 5 % 3]
    things, places, people = (rng.sample(words[name], 4) for name in ("things", kind.places, "people"))
    final = rng.sample(places, 4)
    paths = [_path(rng, places, moves, end) for moves, end in zip(counts, final, strict=True)]
    order = [i for i, moves in enumerate(counts) for _ in range(moves)]
    rng.shuffle(order)

    def said(form: str, i: int, a: str, b: str) -> str:
        return form.format(thing=things[i], who=people[i], a=a, b=b)

    starts = [said(kind.start, i, "", path[0]) for i, path in enumerate(paths)]
    done = [0] * 4
    moves = []
    for i in order:
        done[i] += 1
        moves.append(said(kind.move, i, paths[i][done[i] - 1], paths[i][done[i]]))
    lures = [
        said(kind.lure, i, "", rng.choice([p for p in places if p != final[i]])) for i in range(4) if story // 3 % 2
    ]
    rng.shuffle(starts)
    rng.shuffle(lures)
    chat = told([*starts, *moves, *lures]) + small_talk(rng, later)
    rights = rng.sample(range(4), 4)
    items = []
    for i in range(4):
        options = rng.sample([p for p in places if p != final[i]], 3)
        options.insert(rights[i], final[i])
        items.append(
            Choice(
                f"{story:03} {kind.name} {things[i]}",
                (*chat, ("user", said(kind.question, i, "", ""))),
                said(kind.begun, i, "", ""),
                tuple(f" {o}" for o in options),
                rights[i],
                f"{story:03}",
                counts[i],
                len(chat),
                family=f"{story:03}",
            )
        )
    return items


def _path(rng: random.Random, places: Sequence[str], moves: int, end: str) -> list[str]:
    """Return the places of a thing that is moved `moves` times and ends in `end`."""
    path = [end]
    for _ in range(moves):
        path.insert(0, rng.choice([p for p in places if p != path[0]]))
    return path
