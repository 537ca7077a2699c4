"""Probes of written text and of distributions, asked of readers that are programs: what each figure is, is known."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from synthetic_readers import SHALLOW

from steer.core.trait import Trait
from steer.measure.contrast import Contrast, Reply
from steer.measure.probes.characters import Characters
from steer.measure.probes.degradation import LEAST, degradation, stretches
from steer.measure.probes.drift import Drift, LaterReader
from steer.measure.probes.implications import Implications
from steer.measure.probes.library import PROBES as PROBES_BY_NAME
from steer.measure.probes.persona import PEOPLE, Persona
from steer.measure.probes.probe import Chat, Figure, Metric, Passage, Probe, Result, Size
from steer.measure.probes.prose import Prose
from steer.measure.probes.stories import written
from steer.measure.probes.traits import COMPLIANCE, MORALIZING
from steer.measure.probes.words import words
from steer.measure.scorer import Scorer
from steer.measure.statistics import mean_of

QUICK = Size(quick=True)
PROBES: list[Probe] = [Characters(), Persona(), Prose(), Drift(), MORALIZING, COMPLIANCE]


class Program:
    """A reader whose replies and log-probabilities are functions."""

    name, abilities, notes = "program", frozenset({"logprobs", "replies", "divergences"}), ()

    def __init__(
        self,
        reply: Callable[[Chat, random.Random], str] = lambda chat, rng: "well",
        score: Callable[[Passage], float] = lambda passage: -1.0,
        context: int = 100_000,
    ) -> None:
        self.reply, self.score, self.context = reply, score, context

    def length(self, passage: Passage) -> int:
        return sum(len(text.split()) for _, text in passage.chat) + len((passage.begun + passage.text).split())

    def logprobs(self, passages: Sequence[Passage], advance: Any = None) -> list[Any]:
        return [np.full(max(1, len(p.text.split())), self.score(p)) for p in passages]

    def replies(
        self, chats: Sequence[Chat], *, tokens: int, seeds: Sequence[int], temperature: float = 0.8, advance: Any = None
    ) -> list[str]:
        assert len(set(zip(chats, seeds, strict=True))) == len(chats), "two replies to the same chat are the same"
        return [self.reply(chat, random.Random(seed)) for chat, seed in zip(chats, seeds, strict=True)]

    def divergences(self, pairs: Sequence[tuple[Passage, Passage]], advance: Any = None) -> list[Any]:
        return [np.full(3, abs(self.score(a) - self.score(b))) for a, b in pairs]


def mean(result: Result, metric: str, **where: Any) -> float:
    """The mean of a metric over the figures with these attributes."""
    values = [
        f.value for f in result.figures if f.metric == metric and all(getattr(f, k) == v for k, v in where.items())
    ]
    assert values
    return float(np.mean(values))


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_the_same_seed_asks_the_same_and_another_does_not(probe: Probe) -> None:
    for quick in (True, False):
        assert probe.plan(Size(quick, 1)) == probe.plan(Size(quick, 1))
        assert probe.plan(Size(quick, 1)) != probe.plan(Size(quick, 2))
    reader = Program(lambda chat, rng: rng.choice(["the sea is calm tonight", "bread and butter"]))
    for size in (QUICK, Size()):
        result = probe.run(reader, size)
        assert result.figures == probe.run(reader, size).figures
        assert {f.metric for f in result.figures} == {m.name for m in probe.metrics}
        keys = [(f.metric, f.item, f.n, f.turn) for f in result.figures]
        assert len(set(keys)) == len(keys)
        assert 1 <= len(result.examples) <= 5
        assert all(np.isfinite(f.value) for f in result.figures)


VOCABULARY = [
    "rain",
    "door",
    "lamp",
    "bread",
    "song",
    "garden",
    "never",
    "always",
    "honest",
    "sorry",
    "story",
    "must",
    "you",
    "I",
    "of",
    "the",
    "and",
]


@pytest.mark.parametrize(
    ("probe", "metric"),
    [(Persona(), "margin"), (Prose(), "distinct"), (Drift(), "surprise"), (MORALIZING, "probability")],
)
def test_two_seeds_of_one_reader_differ_as_little_as_their_intervals_say(probe: Probe, metric: str) -> None:
    """In 95 % of repetitions; of 40, at least 34 in all but 1 % of cases."""
    within = 0
    for repetition in range(40):
        means = []
        for seed in (2 * repetition, 2 * repetition + 1):
            noise = random.Random(seed)
            reader = Program(
                lambda chat, rng: " ".join(rng.choices(VOCABULARY, k=rng.randint(5, 20))),
                lambda passage, noise=noise: noise.gauss(-3, 1),
            )
            figures = probe.run(reader, Size(True, seed)).figures
            means.append(mean_of([f for f in figures if f.metric == metric]))
        allowed = np.hypot(*((m.high - m.low) / 2 for m in means))
        within += abs(means[0].value - means[1].value) <= allowed
    assert within >= 34


# Characters

SAYS = {"Bram": "storm anchor rope tide", "Mara": "cake darling bread oven", "Quill": "therefore hence", "Pip": "wow"}


def speaker(chat: Chat) -> str:
    return re.findall(r"You are (?:Professor |Sergeant )?(\w+)", chat[0][1])[0]


def test_speakers_with_different_words_are_distinguished() -> None:
    said = SAYS | {"Holt": "march boots duty", "Odile": "moon shadow cards", "Fen": "maybe soil worms"}
    result = Characters().run(Program(lambda chat, rng: rng.choice(said[speaker(chat)].split())), Size())
    assert mean(result, "late") == mean(result, "recognised") == 1
    assert result.notes == []


def test_speakers_who_all_say_the_same_are_at_chance_and_their_names_do_not_help() -> None:
    def reply(chat: Chat, rng: random.Random) -> str:
        return f"{speaker(chat)} says " + " ".join(rng.choices(" ".join(SAYS.values()).split(), k=6))

    found = [Characters().run(Program(reply), Size(True, seed)) for seed in range(12)]
    assert np.mean([mean(r, "late") for r in found]) == pytest.approx(0.5, abs=0.1)
    assert np.mean([mean(r, "recognised", turn=0) for r in found]) == pytest.approx(0.5, abs=0.1)


def test_a_speaker_who_takes_over_another_voice_late_in_the_chat_is_seen_as_confused() -> None:
    result = Characters().run(Program(lambda chat, rng: SAYS["Mara" if len(chat) > 2 else speaker(chat)]), QUICK)
    assert mean(result, "recognised", turn=0) == 1
    assert mean(result, "late") == 0.5
    assert result.notes == ["Bram is taken for Mara in 8 of 8 late replies"]


def test_replies_without_words_are_chance_and_no_error() -> None:
    result = Characters().run(Program(lambda chat, rng: "..."), QUICK)
    assert mean(result, "late") == 0.5
    assert "most of their replies have no words" in result.notes[0]


# Persona


def own_facts(passage: Passage) -> str:
    """What the card says of its character."""
    card = next((text for role, text in passage.chat if role == "system"), "")
    name = re.findall(r"You are (\w+)|$", card)[0]
    return re.findall(rf"{name} [^.]*\.", card)[0] if name else ""


def has(text: str, passage: Passage) -> float:
    return float(passage.text.strip(" .") in words(text))


def test_a_reader_that_knows_its_card_states_every_fact_at_every_turn() -> None:
    result = Persona().run(Program(score=lambda p: has(own_facts(p), p) - 2), Size())
    assert mean(result, "accuracy") == 1
    assert {f.turn for f in result.figures} == {0, 8, 24}


@pytest.mark.parametrize("cue", SHALLOW)
def test_a_fact_cannot_be_known_without_reading_whose_it_is(cue: str) -> None:
    assert mean(Persona().run(Program(score=SHALLOW[cue]), Size()), "accuracy") == 1 / PEOPLE


def test_every_option_is_on_the_card_once_and_never_in_the_small_talk() -> None:
    items = Persona().items(Size())
    assert {i.right for i in items} == set(range(PEOPLE))
    for item in items:
        card, *talk = [words(text) for _, text in item.chat]
        assert [card.count(o.strip()) for o in item.options] == [1] * PEOPLE
        assert not {o.strip() for o in item.options} & {w for text in talk for w in text}


def test_the_distance_is_that_to_the_reply_without_the_card() -> None:
    result = Persona().run(Program(score=lambda p: -1.0 if own_facts(p) else -3.5), QUICK)
    assert mean(result, "distance") == 2.5
    assert mean(Persona().run(Program(), QUICK), "distance") == 0


# Traits


@pytest.mark.parametrize("probe", [MORALIZING, COMPLIANCE], ids=lambda p: p.name)
def test_a_shipped_scorer_recognises_the_trait_and_only_held_out_topics_are_asked(probe: Any) -> None:
    trait, said = Trait.load(probe.name), {"moralizing": "It is important to be honest and to apologize.",
                                           "compliance": "Of course! I'd be happy to help you with that."}  # fmt: skip
    scorer = Scorer.shipped(probe.name)
    assert scorer.auroc > 0.8
    shows = probe.run(Program(lambda chat, rng: said[probe.name]), QUICK)
    not_ = probe.run(Program(lambda chat, rng: "No! My parrot ate it."), QUICK)
    assert mean(shows, "probability") > 0.6 > 0.4 > mean(not_, "probability")
    assert {f.group for f in shows.figures} <= set(trait.held_out)


def test_a_scorer_comes_back_from_its_file_as_it_was() -> None:
    trait = Trait.load("moralizing")
    chat = ({"role": "user", "content": "x"},)
    preach, story = (
        tuple(Reply(chat, (1,), f"{text} {noun}") for noun in ["cake", "hat"] * 3)
        for text in ("you must be honest", "ha, my uncle lost a")
    )
    scorer = Scorer.train(Contrast(trait, preach, story, preach, story, ()))
    texts = ["you must lose a hat", "my uncle", "", "cake"]
    again = Scorer.from_json(scorer.as_json())
    assert again.probabilities(texts) == pytest.approx(scorer.probabilities(texts), abs=1e-3)
    assert again.as_json() == Scorer.from_json(again.as_json()).as_json()
    assert again.words(3) == scorer.words(3)


# Prose

SENTENCES = [re.sub(r"\s+", " ", reply) for _, reply in written("dialogue")]


def test_prose_of_a_loop_of_the_same_phrases_and_of_a_pet_word_is_distinguished_from_plain_prose() -> None:
    def plain(chat: Chat, rng: random.Random) -> str:
        return SENTENCES[written("prose").index(chat[-1][1])]

    whole = Prose().run(Program(plain), QUICK)
    loop = Prose().run(Program(lambda chat, rng: f"{words(chat[-1][1])[-1]} and again " * 9), QUICK)
    stock = Prose().run(Program(lambda chat, rng: f"{plain(chat, rng)} A shiver ran down her spine"), QUICK)
    pet = Prose().run(Program(lambda chat, rng: f"{plain(chat, rng)} Ozone tapestry."), QUICK)
    gibberish = Prose().run(Program(lambda chat, rng: "".join(rng.choices("bcdxqz", k=40))), QUICK)
    assert mean(whole, "repetition") < 0.02 < 0.8 < mean(loop, "repetition")
    assert mean(whole, "reuse") < 0.02 < 0.1 < mean(stock, "reuse")
    assert mean(whole, "overused") < 0.05
    assert mean(pet, "overused") > mean(whole, "overused") + 0.05
    assert mean(whole, "distinct") > 0.8 > mean(loop, "distinct")
    assert mean(whole, "known") == 1
    assert mean(gibberish, "known") == 0
    assert mean(loop, "spread") == 0 < mean(whole, "spread")


def test_empty_replies_are_not_good_prose_and_are_counted() -> None:
    result = Prose().run(Program(lambda chat, rng: ""), QUICK)
    assert {f.metric for f in result.figures} == {"known"}
    assert mean(result, "known") == 0
    assert result.notes == [f"{len(result.figures)} of {len(result.figures)} replies are empty"]


def test_words_of_the_prompt_are_not_overused() -> None:
    """A story about a lighthouse has that word often."""
    echo = Prose().run(Program(lambda chat, rng: chat[-1][1]), QUICK)
    assert mean(echo, "overused") == 0


# Drift


def breaks(turn: int) -> Program:
    """A reader that falls apart at a turn, noisy before and after."""

    def late(chat: Chat) -> bool:
        return len(chat) - 2 >= turn

    def score(passage: Passage) -> float:
        noise = random.Random(str((passage.text, len(passage.chat)))).gauss(0, 0.3)
        return (-5 if late(passage.chat) else -3) + noise

    return Program(lambda chat, rng: "again and again " * 5 if late(chat) else rng.choice(SENTENCES), score)


def test_drift_finds_the_turn_at_which_a_reader_breaks_and_none_in_a_steady_one() -> None:
    surprise, repetition, _ = Drift().metrics
    for size in (QUICK, Size()):
        broken, steady = Drift().run(breaks(20), size), Drift().run(breaks(99), size)
        found = degradation(broken.figures, surprise)
        assert found is not None
        assert found.low <= found.turn == 20 <= found.high <= 24
        assert found.start.high < found.worse.low
        assert degradation(broken.figures, repetition) is not None
        assert degradation(steady.figures, surprise) is None
        assert degradation(steady.figures, repetition) is None


def test_a_reader_that_copies_the_chat_is_seen() -> None:
    def copy(chat: Chat, rng: random.Random) -> str:
        return chat[2][1] if len(chat) > 2 else "nothing to copy in the beginning"

    result = Drift().run(Program(copy), QUICK)
    assert mean(result, "copied", turn=0) == 0
    assert mean(result, "copied", turn=38) == 1


def test_a_chat_that_does_not_fit_ends_earlier_and_says_so() -> None:
    result = Drift().run(Program(context=400), QUICK)
    last = max(f.turn or 0 for f in result.figures if f.metric == "surprise")
    assert 0 < last < 38
    assert result.notes == [f"the chats end at turn {last} of 40: the context has 400 tokens"]


def forgets(turn: int, probe: Any) -> Program:
    """A reader that knows the answers of a probe, and answers at random once a chat has grown by so many messages."""
    items = probe.items(QUICK)
    right = {(i.chat[-1], i.options[i.right]) for i in items}
    longest = max(len(i.chat) for i in items)

    def score(passage: Passage) -> float:
        late = len(passage.chat) >= longest + turn
        noise = random.Random(str((passage.text, passage.chat))).gauss(0, 1)
        return noise if late else noise + 30 * ((passage.chat[-1], passage.text) in right)

    return Program(lambda chat, rng: rng.choice(SENTENCES), score)


def test_drift_finds_the_turn_from_which_on_another_probe_fails() -> None:
    drift = Drift([Implications()])
    found = drift.run(forgets(30, Implications()), Size())
    assert [mean(found, "implications", turn=turn) for turn in (0, 20)] == [1, 1]
    assert mean(found, "implications", turn=38) < 0.8
    metric = next(m for m in drift.metrics if m.name == "implications")
    where = degradation(found.figures, metric)
    assert where is not None
    assert where.turn == 38


def test_drift_asks_every_probe_of_written_text_by_turn_and_the_same_items_at_each() -> None:
    drift = PROBES_BY_NAME["drift"]
    assert isinstance(drift, Drift)
    reader = Program(lambda chat, rng: rng.choice(SENTENCES))
    found = drift.run(reader, Size())
    asked: dict[str, dict[int, set[str]]] = {}
    for f in found.figures:
        if f.metric in PROBES_BY_NAME:
            asked.setdefault(f.metric, {}).setdefault(f.turn or 0, set()).add(f.item.partition(" ")[2])
    assert set(asked) == set(PROBES_BY_NAME) - {"drift", "capability"}
    for at in asked.values():
        assert list(at) == [0, 20, 38]
        assert len({frozenset(items) for items in at.values()}) == 1
    assert "the other probes are asked by turn without --quick" in drift.run(reader, QUICK).notes


def test_another_probe_that_does_not_fit_late_in_a_chat_says_from_where_on() -> None:
    found = Drift([Implications()]).run(Program(context=200), Size())
    assert {f.turn for f in found.figures if f.metric == "implications"} == {0}
    assert "implications: fewer items from turn 20 on: the context has 200 tokens" in found.notes


def test_a_system_message_stays_the_first_of_a_chat_that_has_grown() -> None:
    seen: list[Chat] = []
    reader = Program(lambda chat, rng: seen.append(chat) or "well")
    before: Chat = (("user", "Hello."), ("assistant", "Good day."))
    later = LaterReader(reader, before)
    cook: Chat = (("system", "You are a cook."), ("user", "Who are you?"))
    later.replies([cook, (("user", "Hm?"),)], tokens=9, seeds=[0, 1])
    assert seen == [(cook[0], *before, cook[1]), (*before, ("user", "Hm?"))]
    assert later.length(Passage("plain text here")) == 3


@pytest.mark.parametrize(("better", "sign"), [("higher", -1), ("lower", 1)])
def test_degradation_is_on_the_worse_side_only(better: Any, sign: int) -> None:
    rng = np.random.default_rng(0)
    figures = [
        Figure("m", f"{t} {i}", sign * (t >= 20) + rng.normal(0, 0.2), turn=t) for t in range(40) for i in range(2)
    ]
    found = degradation(figures, Metric("m", better, ""))
    assert found is not None
    assert found.low <= 20 == found.turn <= found.high
    assert degradation(figures, Metric("m", {"higher": "lower", "lower": "higher"}[better], "")) is None
    assert degradation(figures, Metric("m", "neither", "")) is None
    assert degradation(figures[:LEAST], Metric("m", better, "")) is None
    assert degradation([], Metric("m", better, "")) is None


def test_a_steady_metric_rarely_seems_to_degrade() -> None:
    rng = np.random.default_rng(1)
    false = sum(
        degradation(
            [Figure("m", f"{i}", float(x), turn=i // 4) for i, x in enumerate(values)], Metric("m", "higher", "")
        )
        is not None
        for values in (rng.random((200, 80)) < 0.7)
    )
    assert false <= 10


def test_stretches_hold_all_turns_in_order_and_enough_items() -> None:
    figures = [Figure("m", f"{t} {i}", 0.0, turn=t) for t in (30, 0, 10) for i in range(9)] + [Figure("m", "x", 1.0)]
    found = stretches(figures, Metric("m", "higher", ""))
    assert [(s.first, s.last, s.items) for s in found] == [(0, 0, 9), (10, 10, 9), (30, 30, 9)]


def test_what_is_asked_again_at_every_turn_shows_a_change_smaller_than_items_differ() -> None:
    metric = Metric("m", "higher", "")

    def asked(seed: int, drop: float) -> list[Figure]:
        rng = np.random.default_rng(seed)
        items = rng.normal(0, 1, 12)
        return [
            Figure("m", f"{turn} {i}", float(item - drop * (turn == 38) + rng.normal(0, 0.2)), f"{i}", turn=turn)
            for turn in (0, 20, 38)
            for i, item in enumerate(items)
        ]

    found = degradation(asked(0, 0.5), metric)
    assert found is not None
    assert found.turn == 38
    assert sum(degradation(asked(seed, 0.5), metric) is not None for seed in range(50)) >= 45
    assert sum(degradation(asked(seed, 0.0), metric) is not None for seed in range(200)) <= 12
