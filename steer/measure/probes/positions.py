"""Whether a model knows where things and people are after they were moved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from steer.measure.probes.choice import MARGIN, Choice, ForcedChoice
from steer.measure.probes.probe import Metric, Size
from steer.measure.probes.stories import narrated, small_talk, written

MOVES = ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 2), (1, 1, 2), (0, 2, 3), (1, 3, 4), (2, 6, 8))
"""How often each of the three things of a story is moved."""
EASY = 3
"""How many of `MOVES` a quick run uses: the default merge is near chance on longer ones."""
LATER = (0, 0, 2, 8)
"""How many messages of small talk come between a story and its questions."""
LURED = 0.25
"""Share of stories that also name each thing together with a place where it is not."""


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
        "{who} is in the {b}.",
        "{who} leaves the {a} and goes to the {b}.",
        "Nobody sees {who} in the {b}.",
        "Where is {who} now?",
        "{who} is in the",
    ),
    _Kind(
        "carried",
        "rooms",
        "{who} is in the {b} and has the {thing}.",
        "{who} leaves the {a} and goes to the {b}.",
        "The {b} would be a good place for the {thing}.",
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
    """Three things or people and three places: where is each at the end?

    Every place is right for one of the three questions of a story, so that no place is a better guess than another.
    """

    name = "positions"
    n_label = "moves of the thing or person"
    says = "How well the model knows where things and people are after they were moved."
    metrics = (Metric("accuracy", "higher", "share of right answers", 1 / 3), MARGIN)

    def items(self, size: Size) -> list[Choice]:
        """Return three questions on each story."""
        rng, words = random.Random(f"positions {size.seed}"), written("positions")
        levels = MOVES[: size.of(len(MOVES), EASY)]
        return [
            item
            for story in range(size.of(80, 16))
            for item in _questions(rng, words, story, levels[story // len(KINDS) % len(levels)])
        ]


def _questions(rng: random.Random, words: dict[str, list[str]], story: int, counts: Sequence[int]) -> list[Choice]:
    kind, number = KINDS[story % len(KINDS)], len(counts)
    things, places, people = (rng.sample(words[name], number) for name in ("things", kind.places, "people"))
    final = rng.sample(places, number)
    paths = [_path(rng, places, moves, end) for moves, end in zip(counts, final, strict=True)]

    def sentence(form: str, i: int, a: str = "", b: str = "") -> str:
        return form.format(thing=things[i], who=people[i], a=a, b=b)

    starts = [sentence(kind.start, i, b=path[0]) for i, path in enumerate(paths)]
    steps = [iter(pairwise(path)) for path in paths]
    order = [i for i, moves in enumerate(counts) for _ in range(moves)]
    rng.shuffle(order)
    moves = [sentence(kind.move, i, *next(steps[i])) for i in order]
    lured = range(number) if rng.random() < LURED else ()
    lures = [sentence(kind.lure, i, b=rng.choice([p for p in places if p != final[i]])) for i in lured]
    chat = narrated([*rng.sample(starts, number), *moves, *lures]) + small_talk(rng, rng.choice(LATER))
    items = []
    for i, right in enumerate(rng.sample(range(number), number)):
        options = rng.sample([p for p in places if p != final[i]], number - 1)
        options.insert(right, final[i])
        items.append(
            Choice(
                f"{story:02} {kind.name}: {sentence(kind.question, i)}",
                (*chat, ("user", sentence(kind.question, i))),
                sentence(kind.begun, i),
                tuple(f" {o}" for o in options),
                right,
                f"{story:02}",
                counts[i],
                len(chat),
                family=f"{story:02}",
            )
        )
    return items


def _path(rng: random.Random, places: Sequence[str], moves: int, end: str) -> list[str]:
    """Return the places of a thing that is moved `moves` times and ends in `end`."""
    path = [end]
    for _ in range(moves):
        path.insert(0, rng.choice([p for p in places if p != path[0]]))
    return path
