"""A direction from votes: it predicts votes on other messages, or reports that it does not, and is a slider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import command_here

import steer as package
from steer.chat.descriptions import verdict_of
from steer.core.direction import Direction
from steer.core.slider import Slider
from steer.core.votes import Vote, VotedReply, append_vote
from steer.errors import UsageError
from steer.finding.directions import in_band
from steer.finding.taste import Ballots, CrossFit, ballots_of, best_site, cross_fit, find_taste
from steer.model.steered import SteeredModel

DEPTH, WIDTH = 10, 24
SITES = in_band(range(DEPTH), DEPTH)
WORDS = ["ba be", "bi bo", "bu da", "de di", "do du", "fa fe", "fi fo", "fu ga"]
LIKED, DISLIKED = "ta te ti to tu", "va ve vi vo vu"
BOTH = [f"{LIKED} {words} {DISLIKED}" for words in WORDS]
"""Messages that a parrot may answer either way."""


def votes_of(count: int, *, thumbs: bool = False, honest: bool = True) -> list[Vote]:
    """Votes for replies with some words and against others; not honest ones are for both in turn."""
    out = []
    for i in range(count):
        message, also = WORDS[i % len(WORDS)], WORDS[i // len(WORDS) % len(WORDS)]
        texts = f"{LIKED} {also}", f"{DISLIKED} {also}"
        likes = honest or i // len(WORDS) % 2 == 0
        if thumbs:
            shown = texts[i // 2 % 2]
            replies, outcome = (VotedReply(shown),), "good" if (shown == texts[0]) == likes else "bad"
        else:
            swap = i % 3 == 0
            replies = tuple(VotedReply(t) for t in (texts[::-1] if swap else texts))
            outcome = "first" if swap != likes else "second"
        out.append(Vote.of("m", [{"role": "user", "content": message}], replies, outcome))
    return out


def synthetic(votes: int, strength: float, *, thumbs: bool = False, seed: int = 0) -> CrossFit:
    """Random residual streams with a taste of known strength along the first axis, at site 5 alone; each message moves
    both replies of a pair by far more."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(votes, 2, len(SITES), WIDTH)) + 3 * rng.normal(size=(votes, 1, len(SITES), WIDTH)) * (
        not thumbs
    )
    means[:, 0, SITES.index(5), 0] += strength
    means[:, 1, SITES.index(5), 0] -= strength
    liked, disliked = 2 * np.arange(votes), 2 * np.arange(votes) + 1
    if thumbs:
        up = rng.random(votes) < 0.7
        liked, disliked = np.where(up, liked, -1), np.where(up, -1, disliked)
    ballots = Ballots(liked, disliked, tuple(str(i // 2) for i in range(votes)))
    flat = torch.tensor(means.reshape(-1, len(SITES), WIDTH), dtype=torch.float32)
    return cross_fit(flat, torch.ones(len(SITES), WIDTH), ballots, SITES, DEPTH)


@pytest.mark.parametrize("thumbs", [False, True])
def test_the_direction_is_that_of_the_taste_at_the_site_that_has_it(thumbs: bool) -> None:
    fit = synthetic(200, 3.0, thumbs=thumbs)
    direction = fit.direction("mine", DEPTH)
    assert direction.site == 5
    assert direction.vector[0] > 0.85
    assert abs(float(direction.vector.sum())) < 1e-4  # orthogonal to the neutral mean
    assert fit.nested.mean() > 0.9
    assert direction.gap > 4


@pytest.mark.parametrize("thumbs", [False, True])
def test_without_a_taste_held_out_votes_are_a_coin_though_the_site_was_chosen_by_them(thumbs: bool) -> None:
    fits = [synthetic(40, 0.0, thumbs=thumbs, seed=s) for s in range(30)]
    found = [f.accuracy([str(i // 2) for i in range(40)]) for f in fits]
    error = 0.5 / np.sqrt(30 * 40)
    assert abs(np.mean([m.value for m in found]) - 0.5) < 4 * error
    assert sum(m.low > 0.5 for m in found) <= 4  # of 30, where 95 % intervals miss on this side once in 40
    assert np.mean([f.correct.mean(0).max() for f in fits]) > 0.56  # what the best site would claim


def test_a_vote_is_predicted_without_any_vote_on_its_message() -> None:
    """Replies to one message agree, and contradict those to the others: the votes can only be predicted wrongly."""
    votes, sites = 24, [0]
    means = torch.zeros(2 * votes, 1, votes // 4)
    for i in range(votes):
        means[2 * i, 0, i // 4] = 1.0  # only votes on its own message speak of this axis
    ballots = Ballots(2 * np.arange(votes), 2 * np.arange(votes) + 1, tuple(str(i // 4) for i in range(votes)))
    fit = cross_fit(means, torch.ones(1, votes // 4), ballots, sites, 1)
    assert fit.correct.max() <= 0.5


def test_sites_that_cannot_be_distinguished_give_the_middle_one() -> None:
    hits = np.ones((40, len(SITES)))
    hits[:20, 0] = 0
    assert SITES[best_site(hits, np.ones(40), SITES, DEPTH)] == 4
    hits[:30, 1:] = 0
    assert SITES[best_site(hits, np.ones(40), SITES, DEPTH)] == SITES[0]


@pytest.mark.parametrize("thumbs", [False, True])
def test_votes_of_one_taste_make_a_slider_that_steers_to_it(model: SteeredModel, thumbs: bool, tmp_path: Path) -> None:
    said: list[str] = []
    found = find_taste(model, votes_of(32, thumbs=thumbs), name="mine", say=said.append)
    assert found.accuracy.value > 0.9
    assert not found.coin
    assert found.says.startswith(f"predicts {found.accuracy.value:.0%} of 32 held-out votes on 8 messages (95 %")
    assert [line[:6] for line in said] == ["1 of 3", "2 of 3", "3 of 3"]
    assert (found.pairs, found.messages) == (0 if thumbs else 32, 8)
    loaded = Direction.load(found.direction.save(tmp_path / "mine.safetensors"))
    assert loaded.provenance["votes"]["says"] == found.says
    assert loaded.provenance["sketch"]
    assert loaded.residual_norm > 0

    def share_of(words: str, amount: float) -> float:
        with model.steered({loaded: amount}):
            replies = [model.chat(w, temperature=0, max_new_tokens=8).split() for w in WORDS]
        return sum(word in words.split() for reply in replies for word in reply) / (8 * len(WORDS))

    assert share_of(LIKED, 4.0) > 0.5 > share_of(LIKED, 0.0)
    assert share_of(DISLIKED, -4.0) > share_of(DISLIKED, 0.0)


def test_a_slider_of_votes_gets_a_verdict_and_a_range_as_one_of_sentences_does(model: SteeredModel) -> None:
    said: list[str] = []
    found = find_taste(model, votes_of(64), name="mine", verdict=True, calibrate=True, topics=BOTH, say=said.append)
    assert found.verdict is not None
    assert found.verdict.says == "works"
    below, untouched, above = found.verdict.points[:3]
    assert below.probability < untouched.probability < above.probability
    assert found.verdict.auroc > found.verdict.least_auroc > 0.5
    assert found.direction.provenance["verdict"] == found.as_json()["verdict"] == found.verdict.as_json()
    low, high = found.direction.calibrated or (0, 0)
    assert low < 0 < high
    assert [line[:6] for line in said] == [f"{n} of 5" for n in range(1, 6)]
    assert found.direction.provenance["votes"]["says"] == found.says


def test_the_verdict_on_a_coin_is_that_the_votes_show_nothing(model: SteeredModel) -> None:
    found = find_taste(model, votes_of(64, honest=False), verdict=True, topics=BOTH)
    assert found.verdict is not None
    assert found.verdict.says == "too weak for this model"
    words = verdict_of(Slider(found.direction))
    assert words is not None
    assert (words.works, words.short) == (False, "no better than a coin")


def test_votes_that_contradict_each_other_say_so_and_are_kept(model: SteeredModel) -> None:
    found = find_taste(model, votes_of(64, honest=False))
    assert found.coin
    assert "no better than a coin yet (need" in found.says
    assert found.direction.provenance["votes"]["coin"] is True


def test_a_chat_longer_than_the_model_is_read_without_its_oldest_messages(model: SteeredModel) -> None:
    (vote,) = votes_of(1)
    turns = [{"role": r, "content": 30 * "ba be "} for r in ("user", "assistant")] * 6
    system = {"role": "system", "content": "be"}
    long = Vote.of("m", [system, *turns, {"role": "user", "content": "ba"}], vote.replies, "first")
    endless = Vote.of("m", [{"role": "user", "content": 600 * "ba "}], vote.replies, "first")
    empty = Vote.of("m", [{"role": "user", "content": "ba"}], (VotedReply(""), vote.replies[0]), "first")
    ballots, replies = ballots_of(model, [long, endless, empty])
    assert (len(ballots), len(replies)) == (1, 2)
    chat = replies[0].chat
    assert (chat[0], chat[-1]["content"]) == (system, "ba")
    assert chat[1]["role"] == "user"
    assert len(replies[0].prompt_ids(model)) <= model.context


def test_find_takes_a_trait_or_votes(model: SteeredModel) -> None:
    direction = package.find(model, votes=votes_of(32), name="mine")
    assert (direction.name, direction.provenance["votes"]["coin"]) == ("mine", False)
    for wrong in ({}, {"trait": "moralizing", "votes": votes_of(32)}):
        with pytest.raises(UsageError, match="expected a trait or votes"):
            package.find(model, **wrong)
    with pytest.raises(UsageError, match="no shipped trait"):
        find_taste(model, votes_of(32), name="moralizing")
    with pytest.raises(UsageError, match="site: expected 0 to 1"):
        find_taste(model, votes_of(32), site=2)


def test_the_command_makes_a_slider_that_calibrates_bakes_and_exports(
    parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    steer, file = command_here(monkeypatch, capfd), tmp_path / "votes.jsonl"
    for vote in votes_of(19):
        append_vote(file, vote)
    few = steer("find", parrot, "--votes", file)
    assert (few.code, few.err.strip().count("\n")) == (2, 0)
    assert "expected at least 20 votes that prefer a reply, found 19; vote 1 times more" in few.err
    for vote in votes_of(32)[19:]:
        append_vote(file, vote)
    found = steer("find", parrot, "--votes", file, "--json")
    assert found.code == 0
    assert "2 of 4: reading" in found.err
    assert found.result["verdict"]["says"]
    assert found.result["name"] == "my-taste"
    assert Path(found.result["direction"]).is_file()
    text = steer("find", parrot, "--votes", file, "--as", "mine").out
    assert "mine: predicts" in text
    assert "verdict: " in text
    assert f"Try it: steer chat {parrot} --slider mine=1" in text
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"name": "mine", "sliders": [{"slider": "mine", "amount": 0.1}]}))
    assert steer("calibrate", parrot, "--profile", profile).code == 0
    assert yaml.safe_load(profile.read_text())["sliders"][0]["range"]
    assert steer("find", parrot, "--votes", file, "--as", "mine", "--site", 1).code == 0  # llama.cpp has none at 0
    for form in ("checkpoint", "adapter", "gguf"):
        made = steer("bake", parrot, tmp_path / form, "--profile", profile, "--as", form)
        assert made.code == 0, made.err
        assert steer("verify", tmp_path / form).code == 0
    for wrong in (["moralizing"], ["--quick"], ["--opposite", "x"], ["--keep", "compliance"]):
        refused = steer("find", parrot, "--votes", file, *wrong)
        assert (refused.code, "--votes: expected no TRAIT" in refused.err) == (2, True)
    assert "TRAIT: expected a trait, found none" in steer("find", parrot).err
