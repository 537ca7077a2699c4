"""Directions by difference of means, on a tiny model whose weights make the answer known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_chat
import torch
from tiny_chat import save_tiny_chat

from steer.core.sampler import Sampler
from steer.core.trait import Trait
from steer.errors import SteerError, TraitNotFoundError, UsageError
from steer.finding.directions import candidates, finished_direction, orthogonal
from steer.finding.traits import find_trait
from steer.measure.contrast import Contrast, Reply, contrast_replies, reply_means, reply_tokens
from steer.measure.scorer import Scorer, clear_replies
from steer.model.steered import SteeredModel, load
from steer.verbs.tables import finding_table

SEED = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("find") / "chat"))


def replies(model: SteeredModel, words: list[str]) -> tuple[Reply, ...]:
    chat = ({"role": "user", "content": "hello"},)
    return tuple(Reply(chat, tuple(model.tokenizer(w, add_special_tokens=False).input_ids), w) for w in words)


@pytest.fixture(scope="module")
def contrast(model: SteeredModel) -> Contrast:
    lying, telling = (
        ["lie lie ba", "ba lie be", "lie bi lie", "bo lie"],
        ["truth ba", "be truth truth", "truth bi", "bo truth"],
    )
    trait = Trait("t", "s", "w", "o", ("lie",), ("a",), ("b",))
    return Contrast(
        trait,
        replies(model, lying[:2]),
        replies(model, telling[:2]),
        replies(model, lying[2:]),
        replies(model, telling[2:]),
        replies(model, ["ba be bi", "bo bu da de", "di do du"]),
    )


def test_reply_means_are_over_response_tokens_alone_whatever_the_padding(model: SteeredModel) -> None:
    short, long = replies(model, ["lie", "truth ba be bi bo bu"])
    together = reply_means(model, [short, long])
    for reply, mean in zip((short, long), together, strict=True):
        prompt = model.prompt_ids(reply.chat)
        with model.record() as residuals, torch.no_grad():
            model.hf(torch.tensor([prompt + list(reply.ids)]))
        for site in range(model.anatomy.blocks):
            expected = residuals[site][0, len(prompt) :].float().mean(0)
            torch.testing.assert_close(mean[site], expected, atol=1e-5, rtol=1e-4)


def test_vectors_are_unit_and_orthogonal_to_the_neutral_mean(model: SteeredModel, contrast: Contrast) -> None:
    found = candidates(model, contrast)
    neutral = reply_means(model, contrast.neutral).mean(0)
    torch.testing.assert_close(found.vectors.norm(dim=-1), torch.ones(model.anatomy.blocks))
    cosine = (found.vectors * neutral).sum(-1) / neutral.norm(dim=-1)
    assert cosine.abs().max() < 1e-5


def test_vectors_point_from_without_to_with(model: SteeredModel, contrast: Contrast) -> None:
    found = candidates(model, contrast)
    assert (found.with_mean > found.without_mean).all()
    direction = finished_direction(model, found, 1, {"seed": 0})
    assert direction.gap == pytest.approx(float(found.with_mean[1] - found.without_mean[1]))


def test_a_trait_with_words_to_know_it_by_is_read_on_held_out_replies(model: SteeredModel, contrast: Contrast) -> None:
    assert max(candidates(model, contrast).auroc) == 1.0


def test_statistics_are_those_of_neutral_response_tokens(model: SteeredModel, contrast: Contrast) -> None:
    found = candidates(model, contrast)
    direction = finished_direction(model, found, 1, {})
    tokens = reply_tokens(model, contrast.neutral, 1)
    projection = tokens @ direction.vector
    assert direction.mean == pytest.approx(float(projection.mean()), abs=1e-5)
    assert direction.std == pytest.approx(float(projection.std()), rel=1e-4)
    assert direction.residual_norm == pytest.approx(float(tokens.norm(dim=-1).median()), rel=1e-5)
    assert direction.provenance["neutral_tokens"] == len(tokens)
    assert direction.provenance["checkpoint"] == Path(model.name).name  # and not where it lies on this machine


def test_orthogonal_leaves_nothing_along_the_other_vector() -> None:
    torch.manual_seed(0)
    vectors, to = torch.randn(4, 64, dtype=torch.float64), torch.randn(4, 64, dtype=torch.float64) * 100
    assert (orthogonal(vectors, to) * to).sum(-1).abs().max() < 1e-12


def test_orthogonal_to_several_leaves_nothing_in_their_span() -> None:
    torch.manual_seed(0)
    vectors, a, b = (torch.randn(4, 64, dtype=torch.float64) for _ in range(3))
    for others in ((a, b), (a, b, a, a + b)):  # some of which are in the span of the others
        clean = orthogonal(vectors, *others)
        torch.testing.assert_close(clean.norm(dim=-1), torch.ones(4, dtype=torch.float64))
        assert max((clean * o).sum(-1).abs().max() for o in (a, b)) < 1e-12
    torch.testing.assert_close(orthogonal(vectors, a, b), orthogonal(vectors, b, a, a + b))
    left = orthogonal(a + b, a, b)  # rounding error
    assert left.norm(dim=-1).max() < 1e-5


def test_what_is_kept_is_projected_out_at_every_site_and_the_cost_is_there(
    model: SteeredModel, contrast: Contrast
) -> None:
    plain = candidates(model, contrast)
    other = torch.nn.functional.normalize(
        plain.vectors + 0.15 * torch.randn(plain.vectors.shape, generator=SEED), dim=-1
    )
    found = candidates(model, contrast, keep=[other])
    assert found.plain is not None
    assert torch.equal(found.plain.vectors, plain.vectors)
    assert found.plain.auroc == plain.auroc
    assert (plain.vectors * other).sum(-1).min() > 0.1
    assert (found.vectors * other).sum(-1).abs().max() < 1e-6
    neutral = reply_means(model, contrast.neutral).mean(0)
    assert ((found.vectors * neutral).sum(-1) / neutral.norm(dim=-1)).abs().max() < 1e-5
    torch.testing.assert_close(found.vectors.norm(dim=-1), torch.ones(model.anatomy.blocks))
    # Statistics are those of the projected vectors.
    means = reply_means(model, contrast.fit_with)
    torch.testing.assert_close(found.with_mean, torch.einsum("nsd,sd->s", means, found.vectors) / len(means),
                               atol=1e-5, rtol=1e-4)  # fmt: skip


def test_a_found_direction_says_what_keeping_another_trait_cost(
    model: SteeredModel, contrast: Contrast, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, hidden = (
        tuple(replace(r, chat=({"role": "user", "content": f"{i}"},)) for i, r in enumerate((*fit, *held)))
        for fit, held in zip(contrast.sides[:2], contrast.sides[2:], strict=True)
    )  # each reply to a different topic
    contrast = Contrast(contrast.trait, shown, hidden, shown, hidden, contrast.neutral)
    other = Trait("other", "s", "be well", "be not", (), ("ba", "be", "bi", "bo"), ("bu", "da"))
    trait = replace(other, name="t", with_instruction="ba ba", without_instruction="truth")
    found = find_trait(model, trait, site=1, contrast=replace(contrast, trait=trait), keep=[other])
    kept = found.direction.provenance["keep"]
    assert found.candidates.plain is not None
    assert kept["traits"] == ["other"]
    assert 0 < kept["cosine"] < 1
    assert kept["cosine"] == pytest.approx(float(found.direction.vector @ found.candidates.plain.vectors[1]), abs=1e-4)
    assert (kept["auroc_before"], kept["auroc"]) == (
        round(found.candidates.plain.auroc[1], 4), round(found.candidates.auroc[1], 4),
    )  # fmt: skip
    assert found.as_json()["keep"] == kept
    assert f"without the direction of other: cosine {kept['cosine']:.2f}" in finding_table(found)
    plain = find_trait(model, trait, site=1, contrast=replace(contrast, trait=trait))
    assert "keep" not in plain.direction.provenance
    assert torch.equal(plain.direction.vector, found.candidates.plain.vectors[1])
    for keep in ([trait], [other, other]):
        with pytest.raises(UsageError, match="keep: expected traits beside t, each once"):
            find_trait(model, trait, site=1, contrast=contrast, keep=keep)
    twin = replace(trait, name="twin")
    monkeypatch.setattr("steer.finding.traits.contrast_for", lambda *_, **__: replace(contrast, trait=twin))
    with pytest.raises(TraitNotFoundError, match="not made of those of twin"):
        find_trait(model, trait, keep=[twin], site=1, contrast=replace(contrast, trait=trait))


def test_replies_that_are_all_empty_are_reported_before_anything_is_read(contrast: Contrast) -> None:
    two = tuple(Reply(({"role": "user", "content": w},), (9,), w) for w in ("ba", "be"))
    contrast = replace(contrast, fit_with=two, fit_without=two)
    contrast.check()
    for part, says in (("held_out_with", "found 0"), ("fit_without", "found 0"), ("neutral", "found 0")):
        with pytest.raises(SteerError, match=f"expected replies to the topics of {part}, {says}"):
            replace(contrast, **{part: ()}).check()


def test_replies_without_a_word_in_common_are_an_error_of_one_line(model: SteeredModel, contrast: Contrast) -> None:
    other = tuple(Reply(({"role": "user", "content": w},), (9,), w) for w in ("ba", "be", "bi", "bo"))
    alike = replace(contrast, fit_with=other[:2], fit_without=other[2:])
    for judge in (Scorer.train, clear_replies):
        with pytest.raises(SteerError, match="expected replies that a classifier on words can learn from"):
            judge(alike)


@pytest.fixture(scope="module")
def thinker(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    """A model with tokens for the marks of thoughts, whose template opens them unless it is asked not to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_chat, "WORDS", [*tiny_chat.WORDS, "<think>", "</think>"])
        opened = "{% if add_generation_prompt %}<think> {% endif %}"
        place = tmp_path_factory.mktemp("thinks") / "chat"
        return load(save_tiny_chat(tiny_llama, place, template=tiny_chat.TEMPLATE + opened))


def test_only_what_follows_the_thoughts_is_measured(thinker: SteeredModel) -> None:
    chat = ({"role": "user", "content": "hello"},)
    ids = thinker.encode("<think> lie lie </think> truth ba")
    reply = Reply.of(thinker, chat, ids, torch.zeros(3, 32))
    assert (reply.text, reply.ids, reply.mean) == ("truth ba", tuple(ids[-2:]), None)
    assert reply.prompt_ids(thinker)[-4:] == ids[:4]
    assert thinker.text(reply.prompt_ids(thinker)).count("<think>") == 2  # the template's, closed at once, and its own
    (mean,) = reply_means(thinker, [reply])
    with thinker.record([1]) as residuals, torch.no_grad():
        thinker.hf(torch.tensor([[*thinker.prompt_ids(chat, thoughts=False), *ids]]))
    torch.testing.assert_close(mean[1], residuals[1][0, -2:].mean(0), atol=1e-5, rtol=1e-4)
    assert Reply.from_json(json.loads(json.dumps(reply.as_json()))) == reply
    assert "thoughts" not in Reply.of(thinker, chat, ids[-2:]).as_json()


def test_find_asks_for_no_thoughts_and_says_how_many_come_anyway(
    thinker: SteeredModel, caplog: pytest.LogCaptureFixture
) -> None:
    trait = Trait("t", "s", "w", "o", ("lie", "truth"), ("well",), ("yes",))

    def replies_saying(word: str) -> Contrast:
        (token,) = thinker.encode(word)
        return contrast_replies(thinker, trait, sampler=Sampler(4, 0.0, logit_bias=((token, 100.0),)))

    with caplog.at_level("WARNING", "steer"):
        found = replies_saying("yes")
        assert caplog.records == []
        assert {r.text for side in found.sides for r in side} == {"yes yes yes yes"}
        assert thinker.text(found.fit_with[0].prompt_ids(thinker)).split()[-2:] == ["<think>", "</think>"]
        assert replies_saying("<think>").fit_with == ()
    (said,) = (r.getMessage() for r in caplog.records)
    assert "replies begin with thoughts" in said
    assert "are nothing else in 4 tokens" in said
