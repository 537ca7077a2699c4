"""The reader in this process: what it scores is what the model itself says, read once and in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_chat import hooks_on
from tiny_eval import save_by_letters

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.errors import CheckpointError, UsageError
from steer.measure import readers
from steer.measure.probes.probe import Chat, Passage
from steer.measure.readers import LocalReader, batches
from steer.model.steered import SteeredModel, load

CHAT: Chat = (("system", "Tom is in the inn."), ("user", "Where is Tom?"))
LONGER: Chat = (*CHAT, ("assistant", " In the inn."), ("user", "And then?"))
PASSAGES = [
    Passage(" in the inn", " He is", CHAT),
    Passage(" on the hill", " He is", CHAT),
    Passage(" He is gone", "", CHAT),
    Passage(" He is", "", LONGER),
    Passage("The hen ran on."),
    Passage(" And then the rain.", "The hen ran on."),
    Passage("er and on", "The hen ran on and und"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    return save_by_letters(tiny_llama, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(place: Path) -> SteeredModel:
    return load(place, dtype="float32")


def alone(model: SteeredModel, edit: Edit | None, ids: list[int], start: int, reply: int) -> np.ndarray:
    """Log-probabilities of ids[start:], by the hooks and transformers' own forward."""
    handles = [
        model.hf.get_submodule(name).register_forward_hook(hook)
        for name, hook in (model.hooks(edit, reply_start=reply) if edit else [])
    ]
    try:
        with torch.no_grad():
            scores = model.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    return scores[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])].numpy()


def edits(direction: Direction) -> list[Edit | None]:
    late = Slider(direction, "add", 1.5, Schedule("reply", after=2))
    return [None, Edit(add=((direction, -2.0),)), Edit(ablate=(direction,)), Edit(moves=(late,))]


@pytest.mark.parametrize("number", range(4))
def test_scores_are_those_of_the_model_itself_under_every_edit(
    number: int, model: SteeredModel, make_direction: Callable[..., Direction]
) -> None:
    edit = edits(make_direction())[number]
    reader = LocalReader(model, edit)
    for passage, found in zip(PASSAGES, reader.logprobs(PASSAGES), strict=True):
        tokens = reader.tokens(passage)
        assert len(found) == len(tokens.ids) - tokens.start
        expected = alone(model, edit, list(tokens.ids), tokens.start, tokens.reply)
        assert found == pytest.approx(expected, abs=2e-5)
    assert hooks_on(model) == 0


def test_the_scored_tokens_are_those_of_the_text(model: SteeredModel) -> None:
    reader = LocalReader(model)

    def scored(passage: Passage) -> str:
        tokens = reader.tokens(passage)
        return model.tokenizer.decode(tokens.ids[tokens.start :])

    assert scored(PASSAGES[0]) == " in the inn"
    assert scored(PASSAGES[5]) == " And then the rain."
    assert scored(PASSAGES[4]) == "he hen ran on."  # the first token has nothing before it
    assert scored(Passage("e and on", "The hen ran on h")) == "he and on"  # "he" is one token, across the boundary
    assert reader.length(PASSAGES[0]) == len(model.prompt_ids(readers.as_chat(CHAT))) + len(
        model.encode(" He is in the inn")
    )


def test_texts_that_begin_others_are_read_with_them(model: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(model: SteeredModel, texts: list[list[int]], **more: object) -> object:
        read.append(sum(map(len, texts)))
        return prefill(model, texts, **more)

    prefill = readers.prefill
    monkeypatch.setattr(readers, "prefill", counted)
    words = ["The", *["hen", "ran", "on", "and", "in"] * 4]
    passages = [Passage(f" {words[i]}", " ".join(words[:i])) for i in range(1, len(words))]
    together = LocalReader(model).logprobs(passages)
    assert read == [len(model.encode(" ".join(words))) - 1]
    for passage, found in zip(passages, together, strict=True):
        assert found == pytest.approx(LocalReader(model).logprobs([passage])[0], abs=2e-5)


def test_divergence_is_zero_to_itself_and_as_computed_by_hand_to_another(model: SteeredModel) -> None:
    reader = LocalReader(model)
    with_card, bare = Passage(" In the inn.", "", CHAT), Passage(" In the inn.", "", CHAT[1:])
    same, other = reader.divergences([(with_card, with_card), (with_card, bare)])
    assert same == pytest.approx(0, abs=1e-6)

    def distributions(passage: Passage) -> torch.Tensor:
        tokens = reader.tokens(passage)
        with torch.no_grad():
            scores = model.hf(input_ids=torch.tensor([tokens.ids])).logits[0]
        return scores[tokens.start - 1 : -1].log_softmax(-1)

    p, q = distributions(with_card), distributions(bare)
    assert other == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), abs=1e-5)


def test_replies_are_paired_by_their_seeds_and_the_same_in_any_batch(
    model: SteeredModel, make_direction: Callable[..., Direction], monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [CHAT, LONGER, CHAT]
    first = LocalReader(model).replies(chats, tokens=12, seeds=[1, 2, 3])
    assert first[0] != first[2]
    assert LocalReader(model, Edit(add=((make_direction(), 0.0),))).replies(chats, tokens=12, seeds=[1, 2, 3]) == first
    monkeypatch.setattr(readers, "TOKENS", 1)
    assert LocalReader(model).replies(chats, tokens=12, seeds=[1, 2, 3]) == first


def test_standing_sliders_do_not_act(model: SteeredModel, make_direction: Callable[..., Direction]) -> None:
    before = LocalReader(model).logprobs(PASSAGES)
    model.sliders.put(make_direction(), 3.0)
    try:
        after = LocalReader(model).logprobs(PASSAGES)
    finally:
        model.sliders.reset()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_base_model_reads_chats_with_the_plain_template_and_says_so(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    reader = LocalReader(load(save_by_letters(tiny_llama, tmp_path / "base", template=None), dtype="float32"))
    assert "plain" in reader.notes[0]
    assert "User: Where is Tom?\nAssistant:" in reader.model.tokenizer.decode(reader.tokens(PASSAGES[0]).ids)
    assert len(reader.logprobs(PASSAGES)[0]) == len(reader.model.encode(" in the inn"))


def test_numbers_that_are_not_finite_are_one_line_that_names_the_model(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    broken = load(save_by_letters(tiny_llama, tmp_path / "broken"), dtype="float32")
    broken.hf.model.norm.weight.data[3] = float("nan")
    with pytest.raises(CheckpointError, match="broken: expected finite numbers"):
        LocalReader(broken).logprobs(PASSAGES[:1])


def test_a_passage_longer_than_the_context_is_refused(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    short = save_by_letters(tiny_llama, tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(UsageError, match="at most 32 tokens, its context"):
        LocalReader(load(short, dtype="float32")).logprobs(PASSAGES)


def test_batches_hold_what_fits_and_keep_stories_together() -> None:
    story = list(range(100, 400))
    texts = [[*story, i] for i in range(5)] + [[i] * 3 for i in range(20)] + [[7] * (readers.TOKENS + 5)]
    found = list(batches(texts))
    assert sorted(i for batch in found for i in batch) == list(range(len(texts)))
    assert [25] in found
    assert all(len(b) == 1 or len(b) * max(len(texts[i]) for i in b) <= readers.TOKENS for b in found)
    assert any(set(range(5)) <= set(b) for b in found)
