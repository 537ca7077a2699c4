"""Batches: exact shuffles that can be gone on with, and a stream whose buffer holds what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import SPECIAL, WORDS, save_tiny_chat

from steer.errors import MismatchError, UsageError
from steer.model.steered import SteeredModel, load
from steer.sae import passes
from steer.sae.harvest import harvest
from steer.sae.passes import ModelStream
from steer.sae.shards import Activations, Harvest, ShuffledRows, is_held_out

ROWS, BATCH = 103, 10
HELD = [2, 32, 33, 42, 53]
"""The first documents of any text that are held out at a share of 0.05."""


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("stream") / "chat"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Passages of random words, each a separate document at a context of 16. Special tokens, other ones in front of
    each, see to it that no two tokens of the text have the same residual stream."""
    file = tmp_path_factory.mktemp("text") / "a.txt"
    draw = torch.Generator().manual_seed(4)
    passages = [[WORDS[int(i)] for i in torch.randint(len(WORDS), (8 + n % 5,), generator=draw)] for n in range(150)]
    fronts = [[SPECIAL[n // 6**digit % 6] for digit in range(4)] for n in range(150)]
    file.write_text("\n\n".join(" ".join(f + p) for f, p in zip(fronts, passages, strict=True)))
    return str(file)


@pytest.fixture(scope="module")
def made(model: SteeredModel, text: str, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    return harvest(model, tmp_path_factory.mktemp("made") / "h", sites=[1], sources=text, context=16, shard_tokens=500)


def numbered(shard: int = 25) -> Activations:
    """Row n holds n."""
    return Activations(list(torch.arange(ROWS).bfloat16()[:, None].split(shard)))


def shuffled(rank: int = 0, world: int = 1, seed: int = 0) -> ShuffledRows:
    return ShuffledRows(numbered(), torch.arange(ROWS), BATCH, seed, rank, world)


def take(batches: ShuffledRows | ModelStream, count: int) -> torch.Tensor:
    return torch.cat([next(batches) for _ in range(count)])


def rows_of(x: torch.Tensor) -> Counter[bytes]:
    return Counter(row.view(torch.int16).numpy().tobytes() for row in x)


def test_every_row_comes_once_an_epoch_in_another_order_each() -> None:
    given = take(shuffled(), 31)[:, 0].int().tolist()
    epochs = [given[n * ROWS : (n + 1) * ROWS] for n in range(3)]
    assert all(sorted(e) == list(range(ROWS)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert epochs[1] != take(shuffled(seed=1), 11)[:ROWS, 0].int().tolist()


def test_slices_of_the_ranks_join_to_the_batch_of_one_process() -> None:
    ranks = [shuffled(rank=r, world=2) for r in range(2)]
    whole = shuffled()
    for _ in range(25):
        assert torch.equal(torch.cat([next(r) for r in ranks]), next(whole))


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a multiple of the 3 processes, found 10"):
        shuffled(world=3)


@pytest.mark.parametrize("step", [0, 3, 10, 21])
def test_shuffled_rows_go_on_from_a_state(step: int) -> None:
    first, again = shuffled(), shuffled()
    take(first, step) if step else None
    again.load_state_dict(first.state_dict())
    assert torch.equal(take(again, 15), take(first, 15))
    with pytest.raises(MismatchError, match="seed"):
        shuffled(seed=1).load_state_dict(first.state_dict())


def test_documents_are_held_out_whole_and_the_same_in_every_run(made: Harvest) -> None:
    train, held = made.split(0.2)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(made.tokens))
    assert not set(made.document[train].tolist()) & set(made.document[held].tolist())
    again = Harvest.open(made.place).split(0.2)
    assert torch.equal(again[1], held)
    assert len(held)
    # A share that grows takes documents, and gives none back.
    assert set(made.split(0.1)[1].tolist()) <= set(held.tolist())


def test_the_share_held_out_is_the_share_asked_for_and_its_hash_never_changes() -> None:
    numbers = torch.arange(100_000)
    assert is_held_out(numbers, 0.05).float().mean() == pytest.approx(0.05, abs=0.003)
    assert is_held_out(numbers, 0.05).nonzero()[:5, 0].tolist() == HELD
    assert not is_held_out(numbers, 0).any()


def test_a_harvest_gives_its_training_rows_and_never_a_held_out_one(made: Harvest) -> None:
    train, _ = made.split(0.2)
    batches = made.batches(1, 32, held_out=0.2)
    given = take(batches, -(-len(train) // 32))[: len(train)]
    assert rows_of(given) == rows_of(made.activations(1)[train])
    held = made.held_out_rows(1, held_out=0.2)
    assert len(held) == made.tokens - len(train)
    assert not rows_of(held) & rows_of(given)
    assert len(made.held_out_rows(1, 7, held_out=0.2)) == 7
    with pytest.raises(UsageError, match=r"all .* held out"):
        made.batches(1, 32, held_out=1.1)
    with pytest.raises(UsageError, match="no document is held out"):
        made.held_out_rows(1, held_out=0)


def streamed(model: SteeredModel, text: str, **options: object) -> ModelStream:
    settings = {"site": 1, "batch": 20, "buffer": 300, "context": 16, "held_out": 0.2, "batch_tokens": 128}
    return ModelStream(model, text, **(settings | options))


def fed(model: SteeredModel, text: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[ModelStream, list]:
    """A stream, and every row that its forward passes made for training, in order."""
    stream, rows, run = streamed(model, text, **options), [], passes.passes

    def recorded(*args: Any, **settings: Any) -> Iterator[passes.Pass]:
        for p in run(*args, **settings):
            rows.append(p.residuals[1][~p.outliers(stream.state_dict()["limit"])[1]].bfloat16())
            yield p

    monkeypatch.setattr(passes, "passes", recorded)
    return stream, rows


def test_the_buffer_holds_what_it_says_and_no_token_is_lost_or_given_twice(
    model: SteeredModel, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, rows = fed(model, text, monkeypatch)
    given = []
    for _ in range(60):
        given.append(next(stream))
        assert len(stream.state_dict()["buffer"]) == 300
        # What was made = what was given + the buffer + less than a pass that waits.
        waiting = len(torch.cat(rows)) - 300 - 20 * len(given)
        assert 0 <= waiting < 128
    state = stream.state_dict()
    assert rows_of(torch.cat([*given, state["buffer"], state["waiting"]])) == rows_of(torch.cat(rows))
    assert len(state["buffer"]) == 300


def test_the_buffer_mixes_as_far_as_its_size(model: SteeredModel, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, rows = fed(model, text, monkeypatch)
    given = take(stream, 30)
    place = {row.view(torch.int16).numpy().tobytes(): n for n, row in enumerate(torch.cat(rows))}
    born = torch.tensor([place[row.view(torch.int16).numpy().tobytes()] for row in given]).float()
    batches = born.view(30, 20)
    # Neighbours in the text are strangers in a batch, which spreads over as many tokens as the buffer holds.
    assert batches[5:].std(1).mean() > 150
    waited = torch.arange(30)[:, None] * 20 + 300 - batches
    assert waited[15:].mean() == pytest.approx(300, rel=0.25)


def test_a_stream_begins_its_text_anew_and_never_gives_held_out_rows(
    model: SteeredModel, text: str, made: Harvest
) -> None:
    stream = streamed(model, text)
    given = take(stream, 250)
    assert stream.epoch >= 2
    train, held = made.split(0.2)
    allowed = rows_of(made.activations(1)[train])
    assert len(stream.held_out) == len(held)
    close = torch.cdist(given.float(), made.activations(1)[train].float()).min(1).values
    assert close.max() < 0.2  # other batches round otherwise, by a bit of bf16
    assert not rows_of(given) & rows_of(stream.held_out)
    counts = rows_of(given).values()
    assert max(counts) <= stream.epoch + 1
    assert len(rows_of(given)) > 0.9 * len(allowed)


@pytest.mark.parametrize("steps", [0, 7, 130])
def test_a_stream_goes_on_from_a_state(model: SteeredModel, text: str, steps: int) -> None:
    first = streamed(model, text)
    for _ in range(steps):
        next(first)
    state = first.state_dict()
    expected = take(first, 40)
    again = streamed(model, text)
    again.load_state_dict(state)
    assert torch.equal(take(again, 40), expected)
    with pytest.raises(MismatchError, match="seed"):
        streamed(model, text, seed=3).load_state_dict(state)


def test_processes_stream_different_documents_and_share_the_held_out_ones(model: SteeredModel, text: str) -> None:
    ranks = [streamed(model, text, rank=r, world=2) for r in range(2)]
    given = [take(r, 20) for r in ranks]
    assert [len(g) for g in given] == [200, 200]
    assert not rows_of(given[0]) & rows_of(given[1])
    assert torch.equal(ranks[0].held_out, ranks[1].held_out)


def test_held_out_rows_of_a_stream_are_as_many_as_asked_for(model: SteeredModel, text: str) -> None:
    assert len(streamed(model, text, held_out_tokens=50).held_out) == 50


def test_a_stream_without_text_to_train_on_is_an_error(model: SteeredModel, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none beside held-out"):
        next(streamed(model, text, held_out=1.1))
    with pytest.raises(UsageError, match="expected held-out documents"):
        streamed(model, text, held_out=0)
    with pytest.raises(UsageError, match="at least a batch"):
        streamed(model, text, buffer=19)
