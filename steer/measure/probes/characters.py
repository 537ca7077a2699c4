"""Characters: whether speakers that the model writes from their cards still sound different late in a chat.

A word classifier learns from first replies who says what; the late replies follow a chat made of these first replies,
in which all speakers have talked in turns. It judges two speakers at a time, so that chance is one half in every scene,
and does not see their names.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from typing import Any

from sklearn.model_selection import StratifiedKFold, cross_val_predict

from steer.measure.probes.probe import (
    QUICK_TOKENS,
    Chat,
    Example,
    Figure,
    Metric,
    Opening,
    Probe,
    Reader,
    Result,
    Size,
    fits_with_reply,
    fitting_openings,
    replies_to,
)
from steer.measure.probes.stories import written
from steer.measure.probes.words import words
from steer.measure.scorer import word_classifier
from steer.progress import Advance

FOLDS = 8
Line = tuple[str, str]
"""(speaker, question)"""


class Characters(Probe):
    """Who is speaking, judged from words alone."""

    name = "characters"
    says = "How well the speakers of a scene can be told apart by their words after all have talked for a while."
    metrics = (
        Metric("recognised", "higher", "share of replies whose speaker is recognised", 0.5),
        Metric("late", "higher", "share of late replies whose speaker is recognised", 0.5),
    )
    needs = frozenset({"replies"})

    def plan(self, size: Size) -> Any:
        """Return per scene the cards, the first questions, those of them that the chat has, and the late ones."""
        given, rng = written("characters"), random.Random(size.seed)
        scenes = []
        for cards in given["scenes"][: size.of(len(given["scenes"]), 1)]:
            early, late = rng.sample(given["early"], size.of(24, 12)), rng.sample(given["late"], size.of(16, 8))
            scenes.append({"cards": cards, "early": early, "said": early[: size.of(8, 3)], "late": late})
        return {"scenes": scenes, "tokens": size.of(40, QUICK_TOKENS), "seed": size.seed}

    def openings(self, size: Size) -> list[Opening]:
        """Return the first replies of every scene, speaker by speaker."""
        plan = self.plan(size)
        return [o for number, scene in enumerate(plan["scenes"]) for o in _first(plan, number, scene)]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Let the speakers of every scene reply, first without and then with a chat before the question."""
        plan, result = self.plan(size), Result([])
        for number, scene in enumerate(plan["scenes"]):
            first = _first(plan, number, scene)
            fits, _ = fitting_openings(reader, first)
            found = _written(reader, scene, first, advance) if len(fits) == len(first) else None
            if found is None:
                names = ", ".join(scene["cards"])
                result.notes.append(
                    f"{names} left out: their chat is longer than the context of {reader.context} tokens"
                )
                continue
            early, late, turn = found
            if turn < (whole := 2 * len(scene["said"]) * len(scene["cards"])):
                result.notes.append(
                    f"late replies after {turn} of {whole} messages: the context has {reader.context} tokens"
                )
            _compare(result, scene, early, late, turn)
        return result


def _first(plan: Any, number: int, scene: Any) -> list[Opening]:
    """The first replies of a scene: every speaker answers every question."""
    seed = 1000 * (len(plan["scenes"]) * plan["seed"] + number)
    return _openings(scene, _lines(scene, "early"), (), seed, plan["tokens"])


def _openings(scene: Any, lines: list[Line], before: Chat, seed: int, tokens: int) -> list[Opening]:
    """A reply to each question by its speaker, with a chat before it."""
    return [
        Opening((("system", scene["cards"][name]), *before, _asked(name, question)), seed + i, tokens)
        for i, (name, question) in enumerate(lines)
    ]


def _lines(scene: Any, which: str) -> list[Line]:
    return [(name, question) for name in scene["cards"] for question in scene[which]]


def _written(
    reader: Reader, scene: Any, openings: list[Opening], advance: Advance | None
) -> tuple[dict[Line, str], dict[Line, str], int] | None:
    """The first replies, the late ones, and how many messages come before the late ones: as many as fit into the
    context. None if not even one question to every speaker does."""
    early = dict(zip(_lines(scene, "early"), replies_to(reader, openings, advance), strict=True))
    lines = _lines(scene, "late")
    for count in range(len(scene["said"]), 0, -1):
        questions = [(name, question) for question in scene["said"][:count] for name in scene["cards"]]
        before = tuple(message for line in questions for message in (_asked(*line), ("assistant", early[line])))
        late = _openings(scene, lines, before, openings[-1].seed + 1, openings[-1].tokens)
        if all(fits_with_reply(reader, o) for o in late):
            return early, dict(zip(lines, replies_to(reader, late, advance), strict=True)), len(before)
    return None


def _asked(name: str, question: str) -> tuple[str, str]:
    return "user", f"{name}? {question}"


def _compare(result: Result, scene: Any, early: dict[Line, str], late: dict[Line, str], turn: int) -> None:
    """Add a figure per reply and other speaker, whom the reply could be taken for."""
    names = list(scene["cards"])
    seen = {line: " ".join(w for w in words(text) if w.capitalize() not in names) for line, text in early.items()}
    later = {line: " ".join(w for w in words(text) if w.capitalize() not in names) for line, text in late.items()}
    for pair in combinations(names, 2):
        first, last = ({line: text for line, text in found.items() if line[0] in pair} for found in (seen, later))
        taken: Counter[tuple[str, str]] = Counter()
        guessed = _guesses(first, last)
        if guessed is None:
            result.notes.append(f"{' and '.join(pair)} cannot be told apart: most of their replies have no words")
        for lines, guesses, at in zip((first, last), guessed or (None, None), (0, turn), strict=True):
            for i, (name, question) in enumerate(lines):
                value = 0.5 if guesses is None else float(guesses[i] == name)
                item, group = f"{name} of {'/'.join(pair)}: {question}", f"{'/'.join(names)}: {question}"
                for metric in ("recognised", "late") if at else ("recognised",):
                    result.figures.append(Figure(metric, item, value, group, turn=at))
                if guesses is not None and not value and at:
                    taken[name, guesses[i]] += 1
        each = len(scene["late"])
        result.notes.extend(f"{name} is taken for {other} in {n} of {each} late replies"
                            for (name, other), n in sorted(taken.items()))  # fmt: skip
    for line in [line for line in late if line[1] in scene["late"][:2]][: max(0, 5 - len(result.examples))]:
        result.examples.append(Example(f"{line[0]}: {line[1]}", line[1], line[0], late[line]))


def _guesses(first: dict[Line, str], last: dict[Line, str]) -> tuple[Any, Any] | None:
    """The speakers that a classifier recognises: of the first replies, each judged without its fold, and of the late
    ones. None if half of the first replies are empty, and nothing could be learnt."""
    texts, speakers = list(first.values()), [name for name, _ in first]
    if sum(map(bool, texts)) <= len(texts) // 2:
        return None
    classifier = word_classifier().set_params(tfidfvectorizer__min_df=1)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    early = cross_val_predict(classifier, texts, speakers, cv=folds)
    return early, classifier.fit(texts, speakers).predict(list(last.values()))
